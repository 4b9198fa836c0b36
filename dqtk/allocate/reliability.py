"""Whether scores can be believed: do they rise with the bits, and do they stand out from rounding in another float dtype?"""

from collections.abc import Sequence

from dqtk.plan import Plan
from dqtk.spec import LayerSpec

from .sensitivity import Sensitivity


def monotone(plans: Sequence[Plan], found: Sensitivity) -> tuple[int, int]:
    """Of the sites with several specs: how many score better with each wider weight at equal inputs, and with each wider input at
    equal weights; and how many there are.

    Specs of equal widths are not compared, nor those whose widths change with the noise level. Random scores of n widths would be
    in order in 1 of n! sites.
    """
    in_order = several = 0
    for choices in zip(*(plan.choices for plan in plans), strict=True):
        scores: dict[tuple[int, int], list[float]] = {}
        for spec in dict.fromkeys(choice.spec for choice in choices if isinstance(choice.spec, LayerSpec)):
            widths = (spec.weight.bits, 16 if spec.input is None else spec.input.bits)
            scores.setdefault(widths, []).append(found.of(choices[0].site, spec))
        pairs = [
            (a, b) for a in scores for b in scores if a != b and a[0] <= b[0] and a[1] <= b[1] and (a[0] == b[0] or a[1] == b[1])
        ]
        several += bool(pairs)
        in_order += bool(pairs) and all(max(scores[narrow]) < min(scores[wide]) for narrow, wide in pairs)
    return in_order, several


def describe_reliability(plans: Sequence[Plan], found: Sensitivity) -> str:
    """Two lines for people."""
    in_order, several = monotone(plans, found)
    specs = [c.spec for plan in plans for c in plan.choices if isinstance(c.spec, LayerSpec)]
    inputs = {None if spec.input is None else spec.input.bits for spec in specs}
    what = "the weight" if len(inputs - {None}) < 2 else "weight and input"
    lines = [f"scores rise with the bits of {what} at {in_order} of {several} sites"]
    for component, floor in found.floors.items():
        mine = [score for (site, _), score in found.scores.items() if site.startswith(f"{component}:")]
        above = sum(score >= floor for score in mine)
        lines.append(f"{component} in another float dtype scores {floor:.1f}; {above} of {len(mine)} scores are no worse than that")
    return "\n".join(lines)
