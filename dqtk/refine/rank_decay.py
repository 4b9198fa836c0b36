"""A branch that helps while learning and is gone at the end (QVGen, Huang et al. 2025, arXiv 2505.11497, sections 3.2 and 3.3).

Beside the rounded weight stands up @ down, at the start the best approximation of what rounding left over, so that learning starts
near the original and gradients are small. Its rank is halved phase by phase: within a phase the weaker half fades (half a cosine
from 1 to 0), then the stronger one is factorized anew, strongest direction first: 32, 16, 8, 4, 2, 1, none. The codes learn
meanwhile and take over what fades. Here the branch is in steps of the grid, so one rate serves all layers, and the last tenth of
the iterations has none.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dqtk.spec import RankDecay

from .left_over import left_over

if TYPE_CHECKING:
    from .trained import Trained

DECAYING = ("decay_down", "decay_up")  # names of the numbers
DECAYS = 0.9  # of the iterations


class Branch:
    """One layer's branch. parameters: float32, down [R, K] and up [N, R], strongest direction first; zeros behind the rank."""

    def __init__(self, target: Tensor, rank: int, iterations: int):
        """target [N, K]: what the branch stands for, in steps of the grid."""
        rank = min(rank, *target.shape)
        self.ranks = [rank >> phase for phase in range(rank.bit_length() + 1)]  # 32, 16, ..., 1, 0
        self.starts = [round(phase * DECAYS * iterations / (len(self.ranks) - 1)) for phase in range(len(self.ranks))]
        self.gate: Tensor | None = None  # [R] while there is a branch
        left, values, right = torch.linalg.svd(target, full_matrices=False)
        root = values[:rank].sqrt()
        factors = (right[:rank] * root[:, None]).contiguous(), (left[:, :rank] * root).contiguous()
        self.parameters = dict(zip(DECAYING, (nn.Parameter(factor) for factor in factors), strict=True))

    @staticmethod
    def of(mine: "Trained", exact: Mapping[str, nn.Module], choice: RankDecay, iterations: int) -> "Branch":
        """The branch of a layer (or part) that stands for one of these layers."""
        return Branch(left_over(mine, exact[mine.path]), choice.rank, iterations)

    @torch.no_grad()
    def begin(self, iteration: int) -> list[nn.Parameter]:
        """What this iteration computes with; the numbers that were put anew. A function of the iteration, but for these."""
        phase = sum(start <= iteration for start in self.starts) - 1
        rank = self.ranks[phase]
        if rank == 0:
            self.gate = None
            return []
        down, up = self.parameters.values()
        half, begin, end = self.ranks[phase + 1], self.starts[phase], self.starts[phase + 1]
        self.gate = torch.zeros(len(down), device=down.device)
        self.gate[:half] = 1
        self.gate[half:rank] = (1 + math.cos(math.pi * (iteration - begin) / max(1, end - begin))) / 2
        if iteration != begin or phase == 0:
            return []
        # up down = Q_u (R_u R_d^T) Q_d^T: only the small matrix in the middle is decomposed
        (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up[:, :rank]), torch.linalg.qr(down[:rank].T)
        left, values, right = torch.linalg.svd(r_up @ r_down.T)
        root = values.sqrt()
        down.zero_()
        up.zero_()
        down[:rank] = root[:, None] * (right @ q_down.T)
        up[:, :rank] = (q_up @ left) * root
        return [down, up]

    def levels(self) -> Tensor | None:
        """float32 [N, K], in steps of the grid; None where the branch is not there yet, or no more."""
        if self.gate is None:
            return None
        down, up = self.parameters.values()
        return (up * self.gate) @ down
