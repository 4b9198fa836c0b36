"""Whether scores can be believed: do they rise with the bits, and do they stand out from rounding in another float dtype?"""

from collections.abc import Sequence
from itertools import pairwise

from dqtk.plan import Plan

from .sensitivity import Sensitivity


def monotone(plans: Sequence[Plan], found: Sensitivity) -> tuple[int, int]:
    """Of the sites with several specs: how many have a better score for each wider weight, and how many there are.

    Specs with weights of one width are not compared. Random scores of n widths would be in order in 1 of n! sites.
    """
    in_order = several = 0
    for choices in zip(*(plan.choices for plan in plans), strict=True):
        widths: dict[int, list[float]] = {}
        for spec in dict.fromkeys(choice.spec for choice in choices if choice.spec is not None):
            widths.setdefault(spec.weight.bits, []).append(found.of(choices[0].site, spec))
        if len(widths) > 1:
            several += 1
            ordered = [widths[bits] for bits in sorted(widths)]
            in_order += all(max(a) < min(b) for a, b in pairwise(ordered))
    return in_order, several


def describe_reliability(plans: Sequence[Plan], found: Sensitivity) -> str:
    """Two lines for people."""
    in_order, several = monotone(plans, found)
    lines = [f"scores rise with the bits of the weight at {in_order} of {several} sites"]
    for component, floor in found.floors.items():
        mine = [score for (site, _), score in found.scores.items() if site.startswith(f"{component}:")]
        above = sum(score >= floor for score in mine)
        lines.append(f"{component} in another float dtype scores {floor:.1f}; {above} of {len(mine)} scores are no worse than that")
    return "\n".join(lines)
