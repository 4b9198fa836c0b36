"""Shifts of a matrix of stored integers that learn: each by itself, or as the product of two thin matrices, an adapter of low rank.

What is shifted is rounded in every forward, so an adapter merges exactly: of codes that is QALoRA of EfficientDM (He et al. 2023,
arXiv 2310.03270, section 3.2), there in the unit of the weight, here in steps of the grid. Of zero points it is QA-LoRA (Xu et al.
2023, arXiv 2309.14717): an adapter that sees the sum of a group's inputs adds the same number to all weights of a group, which is
what a zero point does. There zero points become floats; here they are rounded, so that the stored form stays.
"""

import math

import torch
from torch import Tensor, nn

CODES, ZEROS = ("moved", "down", "up"), ("zero", "zero_down", "zero_up")  # names of the numbers: free, or thin


class Shifts:
    """float32 [R, C], zero at the start. parameters: by name, the first of ``names`` or the other two."""

    def __init__(self, names: tuple[str, str, str], like: Tensor, rank: int | None, draw: torch.Generator):
        self.parameters: dict[str, nn.Parameter] = {}
        rows, columns = like.shape
        if rank is None or rank >= min(rows, columns):
            self.parameters[names[0]] = nn.Parameter(torch.zeros_like(like, dtype=torch.float32))
            return
        down = torch.randn(rank, columns, generator=draw) / math.sqrt(rank)  # drawn on the CPU: the same on every device
        self.parameters[names[1]] = nn.Parameter(down.to(like.device))
        self.parameters[names[2]] = nn.Parameter(torch.zeros(rows, rank, device=like.device))

    def __call__(self) -> Tensor:
        """The shifts now."""
        first, *other = self.parameters.values()
        return other[0] @ first if other else first
