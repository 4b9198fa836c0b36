"""Which steps of a pipeline run are kept to learn from: evenly, around one noise level, where ranges move, or all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .levels import angle_of

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 lie evenly however many there are


class Placement(Protocol):
    """A way to choose steps. Frozen data: its text says what statistics depend on."""

    def choose(self, levels: Sequence[float], num: int, run: int) -> list[int]:
        """Indices of at most ``num`` steps, ascending.

        Args:
            levels: noise level of every step of the run, in [0, 1].
            num: from 1 to the number of steps.
            run: number of the run, so that the next one takes other steps.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Evenly:
    """Evenly over the steps of a run, each run shifted against the last (Q-Diffusion, Li et al. 2023, arXiv 2302.04304)."""

    def choose(self, levels: Sequence[float], num: int, run: int) -> list[int]:
        shift = (run * _GOLDEN) % 1
        return sorted({int((i + shift) / num * len(levels)) for i in range(num)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """Drawn, seeded, with a weight normal in the noise level (PTQ4DM, Shang et al. 2022, arXiv 2211.15736, there in the timestep).

    level: mean, in [0, 1]; PTQ4DM found calls nearer to the picture than to the noise best. spread: standard deviation.
    """

    level: float = 0.4
    spread: float = 0.4

    def __post_init__(self) -> None:
        if not (0 <= self.level <= 1 and 0 < self.spread < math.inf):
            raise ValueError(
                f"Around: level must be from 0 to 1 and spread positive, got {self.level!r} and {self.spread!r}. Use Around()."
            )

    def choose(self, levels: Sequence[float], num: int, run: int) -> list[int]:
        distance = (torch.tensor(levels, dtype=torch.float64) - self.level) / self.spread
        weight = torch.exp(-distance.square() / 2).clamp(min=1e-12)  # far away is unlikely, not impossible
        drawn = torch.multinomial(weight, num, generator=torch.Generator().manual_seed(run))
        return sorted(drawn.tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class ByDrift:
    """More steps where the ranges of inputs move faster with the noise level, fewer where they rest.

    ``calibrate.intervals.by_drift`` makes it of statistics. moved: how far they move within every one of equal intervals of the
    level's angle, from 0 to pi / 2; any unit. floor: what an interval counts at least, as a share of the mean, so that quiet levels
    are seen too.
    """

    moved: tuple[float, ...]
    floor: float = 0.5

    def __post_init__(self) -> None:
        if not self.moved or not all(0 <= value < math.inf for value in self.moved) or not 0 < self.floor < math.inf:
            raise ValueError(
                f"ByDrift: moved must be at least one number from 0 up, and floor positive, got {self.moved!r} and {self.floor!r}. "
                "Use calibrate.intervals.by_drift."
            )

    def choose(self, levels: Sequence[float], num: int, run: int) -> list[int]:
        weight = self._weights(levels)
        share = torch.zeros_like(weight)  # how often a step is taken: at most always
        for _ in range(len(levels)):
            free = share < 1
            rest = num - float((~free).sum())
            share = torch.where(free, weight * (rest / weight[free].sum()), 1.0) if bool(free.any()) else share
            if not bool((share > 1 + 1e-9).any()):
                break
            share = share.clamp(max=1)
        ends = share.cumsum(0)
        shift = min(max((run * _GOLDEN) % 1, 1e-6), 1 - 1e-6)  # clear of sums that round
        marks = torch.arange(num, dtype=torch.float64) + shift  # one step per mark: systematic sampling
        return sorted(set(torch.searchsorted(ends, marks.clamp(max=float(ends[-1]) - 1e-9), right=True).tolist()))

    def _weights(self, levels: Sequence[float]) -> torch.Tensor:
        """float64 [steps]: movement between half the way to one neighbour and half the way to the other."""
        angle = torch.tensor([angle_of(level) for level in levels], dtype=torch.float64)
        moved = torch.tensor(self.moved, dtype=torch.float64)
        least = self.floor * float(moved.mean()) or 1.0
        path = torch.cat([torch.zeros(1, dtype=torch.float64), moved.clamp(min=least).cumsum(0)])
        middles = (angle[1:] + angle[:-1]) / 2
        first, last = (2 * angle[:1] - middles[:1], 2 * angle[-1:] - middles[-1:]) if len(middles) else (angle, angle)
        at = (torch.cat([first, middles, last]) / (math.pi / 2) * len(moved)).clamp(0, len(moved))
        low = at.floor().clamp(0, len(moved) - 1).long()
        way = path[low] + (at - low) * (path[low + 1] - path[low])
        return way.diff().abs().clamp(min=1e-12)


@dataclass(frozen=True, kw_only=True, slots=True)
class Every:
    """All steps, whatever their number."""

    def choose(self, levels: Sequence[float], num: int, run: int) -> list[int]:
        return list(range(len(levels)))
