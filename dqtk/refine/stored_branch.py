"""A low-rank branch that a layer stores (``LowRank``, SVDQuant) while it learns: its factors move by shares of their mean size and
are rounded to their stored dtype in every forward.

The branch multiplies inputs that are not rounded, so at 4-bit inputs it can take over what these lose.
"""

import torch
from torch import Tensor, nn

FACTORS = ("branch_down", "branch_up")  # names of the numbers


class StoredBranch:
    """parameters: float32, of the shapes of ``down`` [R, K] and ``up`` [N, R]."""

    def __init__(self, down: Tensor, up: Tensor):
        self.stored = (down, up)
        self.size = [factor.float().square().mean().sqrt() for factor in self.stored]
        self.parameters = {name: nn.Parameter(torch.zeros_like(x.float())) for name, x in zip(FACTORS, self.stored, strict=True)}

    def __call__(self) -> tuple[Tensor, Tensor]:
        """down and up with gradients: float32 numbers of the stored dtype."""
        down, up = (
            factor.float() + size * moved
            for factor, size, moved in zip(self.stored, self.size, self.parameters.values(), strict=True)
        )
        down, up = (x + (x.to(self.stored[0].dtype).float() - x).detach() for x in (down, up))
        return down, up
