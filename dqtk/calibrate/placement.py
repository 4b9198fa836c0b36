"""Which steps of a pipeline run are kept to learn from: evenly over the run, around one noise level, or all of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

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
class Every:
    """All steps, whatever their number."""

    def choose(self, levels: Sequence[float], num: int, run: int) -> list[int]:
        return list(range(len(levels)))
