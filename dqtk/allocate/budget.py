"""Budgets: a number and a unit as people type them (``4.5bits``, ``300MB``, ``2TBOPs``, ``12ms``), and shares of them by group."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

UNITS = {
    "bits": ("bits", 1),
    "b": ("bytes", 1),
    "bytes": ("bytes", 1),
    "kb": ("bytes", 10**3),
    "mb": ("bytes", 10**6),
    "gb": ("bytes", 10**9),
    "kib": ("bytes", 2**10),
    "mib": ("bytes", 2**20),
    "gib": ("bytes", 2**30),
    "bops": ("bops", 1),
    "gbops": ("bops", 10**9),
    "tbops": ("bops", 10**12),
    "pbops": ("bops", 10**15),
    "ms": ("ms", 1),
    "s": ("ms", 10**3),
}
_ALLOWED = "a number with bits, MB, GB, MiB, GiB, GBOPs, TBOPs, ms or s"


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """amount of a unit: "bits" (average per weight), "bytes", "bops" (multiplications times bits of both factors) or "ms"."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:g} {self.unit}"

    def total(self, num_weights: float) -> float:
        """The budget of all sites together, in bits, bytes, BOPs or milliseconds."""
        return self.amount * num_weights if self.unit == "bits" else self.amount

    def words(self, cost: float, num_weights: float) -> str:
        """A cost of all sites together in the unit of the budget: ``4.49 bits per weight``."""
        return f"{cost / num_weights:.4g} bits per weight" if self.unit == "bits" else f"{cost:.6g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """``"4.5bits"`` -> a budget. Raises ``ValueError`` for another unit, or a number that is not above 0."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    unit = UNITS.get(match[2].lower()) if match else None
    try:
        amount = float(match[1]) if match else math.nan
    except ValueError:
        amount = math.nan
    if unit is None or not 0 < amount < math.inf:
        raise ValueError(f"allocate: budget must be {_ALLOWED}, got {text!r}. For example 4.5bits.")
    return Budget(amount=amount * unit[1], unit=unit[0])


def divided(total: float, at_16_bits: Mapping[str, float], ratios: Mapping[str, float]) -> dict[str, float]:
    """A total over groups: a group's share of its cost at 16 bits is its ratio times that of a group without one.

    MixDQ's k: with costs in bits, B_content = k * B_quality. Where only one group has sites, it gets everything.

    Args:
        total: of all groups.
        at_16_bits: group -> its cost at 16 bits.
        ratios: group -> above 0; below 1 gives the rest more.
    """
    for ratio in ratios.values():
        if not 0 < ratio < math.inf:
            raise ValueError(f"allocate: ratio must be a number above 0, got {ratio}. MixDQ tried 0.46 to 1.36 for weights.")
    weight = {group: cost * ratios.get(group, 1.0) for group, cost in at_16_bits.items()}
    return {group: total * mine / math.fsum(weight.values()) for group, mine in weight.items()}
