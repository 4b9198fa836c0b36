"""Bits for layers that are known by name only: a sensitivity log and sizes in, choices out. No model is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .budget import Budget
from .groups import Grouped, Ratios, allocate_groups, groups_of_names, ratios_of
from .program import Candidate, protected

FORMAT_VERSION = 1
FULL = 16  # bits of a protected layer

LOSSES = {
    "score": lambda score: -score,
    "noise": lambda score: 10 ** (-score / 10),
}
"""How a score becomes a loss. score: the sum of scores is made as large as possible, as in MixDQ. noise: scores are dB, and noise
powers of layers that err independently add up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """bits: layer -> width. groups: of ``allocate_groups``, with costs in bits. sizes: layer -> number of weights."""

    budget: Budget
    loss: str
    bits: dict[str, int]
    groups: dict[str, Grouped]
    sizes: dict[str, float]

    def average(self, layers: Sequence[str] | None = None) -> float:
        """Bits per weight of these layers, or of all."""
        some = self.bits if layers is None else layers
        return sum(self.bits[layer] * self.sizes[layer] for layer in some) / sum(self.sizes[layer] for layer in some)

    def to_json(self) -> dict[str, Any]:
        """JSON-clean data: budget, groups, average and the choice of every layer."""
        return {
            "format_version": FORMAT_VERSION,
            "budget": str(self.budget),
            "loss": self.loss,
            "average_bits": self.average(),
            "groups": {name: self._group(group) for name, group in self.groups.items()},
            "choices": self.bits,
        }

    def table(self) -> str:
        """One line per group, and the total."""
        lines = []
        for name, group in self.groups.items():
            row = self._group(group)
            widths = ", ".join(f"{bits} bit: {num}" for bits, num in row["layers"].items())
            lines.append(f"{name}: {row['average_bits']:.3f} of {row['budget_bits']:.3f} bits, loss {row['loss']:.6g}; {widths}")
        return "\n".join([*lines, f"{len(self.bits)} layers, {self.average():.3f} bits per weight; budget {self.budget}"])

    def _group(self, group: Grouped) -> dict[str, Any]:
        layers = list(group.allocation.chosen)
        widths = Counter(self.bits[layer] for layer in layers)
        return {
            "budget_bits": group.budget / sum(self.sizes[layer] for layer in layers),
            "average_bits": self.average(layers),
            "loss": group.allocation.loss,
            "layers": {str(bits): widths[bits] for bits in sorted(widths)},
        }


def allocate_from_logs(
    scores: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, float],
    budget: Budget,
    *,
    loss: str = "score",
    groups: Mapping[str, Sequence[str]] | None = None,
    ratio: float | Ratios | None = None,
    protect: float | None = None,
) -> Chosen:
    """Bits for every layer of a log.

    Args:
        scores: layer -> bits -> score; higher is better (``read_sensitivity``).
        sizes: layer -> number of weights, or of input elements.
        budget: average bits, or bytes, of all these layers.
        loss: a name of ``LOSSES``.
        groups: group -> globs of the names; what none matches is the rest. Used with a ratio only.
        ratio: average bits of a group over those of the rest; None: one program over all layers.
        protect: layers whose best score is below this are kept at 16 bits.
    Raises:
        ValueError: a budget in BOPs or ms, or one that is too small; a ratio without groups or the other way round.
    """
    mine = _grouped(list(scores), budget, groups or {}, ratio)
    losses = LOSSES[loss]
    candidates = {
        layer: [Candidate(cost=bits * sizes[layer], loss=losses(score)) for bits, score in row.items()]
        for layer, row in scores.items()
    }
    widths = {layer: list(row) for layer, row in scores.items()}
    for layer in [] if protect is None else protected(candidates, losses(protect)):
        candidates[layer], widths[layer] = [Candidate(cost=FULL * sizes[layer], loss=0.0)], [FULL]
    num_weights, unit = sum(sizes.values()), 8 if budget.unit == "bytes" else 1
    total = budget.total(num_weights) * unit
    full = {layer: FULL * size for layer, size in sizes.items()}
    found = allocate_groups(
        candidates,
        total,
        mine,
        ratios_of(ratio, mine),
        full,
        lambda cost: budget.words(cost / unit, num_weights),
    )
    picked = {layer: index for group in found.values() for layer, index in group.allocation.chosen.items()}
    bits = {layer: widths[layer][picked[layer]] for layer in scores}
    return Chosen(budget=budget, loss=loss, bits=bits, groups=found, sizes=dict(sizes))


def _grouped(
    layers: Sequence[str], budget: Budget, groups: Mapping[str, Sequence[str]], ratio: float | Ratios | None
) -> dict[str, str]:
    """Layer -> group. Raises ``ValueError`` for what a log cannot say."""
    if budget.unit not in ("bits", "bytes"):
        raise ValueError(f"allocate: budget for a log must be in bits or bytes, got {budget}. A log does not know what layers do.")
    if (ratio is None) != (not groups):
        raise ValueError(
            f"allocate: a ratio and the patterns of groups must be given together, got ratio {ratio} and {dict(groups)}. "
            "Without them one program decides over all layers."
        )
    return groups_of_names(layers, groups)
