"""Whether scores can be believed: do they rise with the bits, and do they stand out from rounding in another float dtype?"""

from collections.abc import Sequence

from dqtk.plan import Plan
from dqtk.spec import LayerSpec

from .sensitivity import Sensitivity


def monotone(plans: Sequence[Plan], found: Sensitivity, *, to_the_floor: bool = False) -> tuple[int, int]:
    """Of the sites with several specs: how many score better with each wider weight at equal inputs, and with each wider input at
    equal weights; and how many there are.

    Specs of equal widths are not compared, nor those whose widths change with the noise level. Random scores of n widths would be
    in order in 1 of n! sites. to_the_floor: two scores that are both no worse than the floor may stand in any order.
    """
    in_order = several = 0
    for choices in zip(*(plan.choices for plan in plans), strict=True):
        scores: dict[tuple[int, int], list[float]] = {}
        for spec in dict.fromkeys(choice.spec for choice in choices if isinstance(choice.spec, LayerSpec)):
            widths = (spec.weight.bits, 16 if spec.input is None else spec.input.bits)
            scores.setdefault(widths, []).append(found.of(choices[0].site, spec))
        floor = found.floors.get(choices[0].site.id) if to_the_floor else None
        pairs = [
            (max(scores[a]), min(scores[b]))
            for a in scores
            for b in scores
            if a != b and a[0] <= b[0] and a[1] <= b[1] and (a[0] == b[0] or a[1] == b[1])
        ]
        several += bool(pairs)
        in_order += bool(pairs) and all(
            narrow < wide or (floor is not None and min(narrow, wide) >= floor) for narrow, wide in pairs
        )
    return in_order, several


def describe_reliability(plans: Sequence[Plan], found: Sensitivity) -> str:
    """Two lines or more for people."""
    in_order, several = monotone(plans, found)
    faint = monotone(plans, found, to_the_floor=True)[0] - in_order
    specs = [c.spec for plan in plans for c in plan.choices if isinstance(c.spec, LayerSpec)]
    inputs = {None if spec.input is None else spec.input.bits for spec in specs}
    what = "the weight" if len(inputs - {None}) < 2 else "weight and input"
    also = f", and at {faint} more but for scores above rounding in another float dtype" if faint else ""
    lines = [f"scores rise with the bits of {what} at {in_order} of {several} sites{also}"]
    measured: dict[tuple[str, float], list[float]] = {}
    for (site, _), score in found.scores.items():
        if site in found.floors:
            measured.setdefault((site.partition(":")[0], found.floors[site]), []).append(score)
    for (component, floor), mine in measured.items():
        above = sum(score >= floor for score in mine)
        lines.append(f"{component} in another float dtype scores {floor:.1f}; {above} of {len(mine)} scores are no worse than that")
    return "\n".join(lines)
