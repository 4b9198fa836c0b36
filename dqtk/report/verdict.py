"""The result in one sentence, by fixed rules, so that a report never flatters.

PSNR against the original is put in words by the median pair: 35 dB and more "hard to tell apart", 25 to 35 "the same picture with
visible differences in detail", 15 to 25 "the same subject, drawn differently in places", below 15 "different pictures". That is
a rule of thumb of this house for same-seed pairs, not a law; the noise floor says what a mere change of rounding does to the
same pipeline. "No further away than the noise floor" is said only where the whole interval of the paired difference ends within
``FLOOR_MARGIN_DB`` of it: an interval that merely includes 0 may come from few prompts and hide 9 dB.
"""

from typing import TYPE_CHECKING

from .numbers import number_text, range_text

if TYPE_CHECKING:
    from .comparison import Comparison, Measure

FLOOR_MARGIN_DB = 0.5
_WORDS = (
    (35.0, "{} that are hard to tell from the original's"),
    (25.0, "the same {} with visible differences in detail"),
    (15.0, "the same subjects, drawn differently in places"),
    (float("-inf"), "other {} than the original's"),
)


def verdict(comparison: "Comparison") -> str:
    """One or two sentences: closeness, the noise floor, what an oracle says, size."""
    psnr = next((m for m in comparison.measures if m.name == "psnr" and m.estimate is not None), None)
    parts = [f"{comparison.candidate_name} paints {_closeness(psnr, comparison)}{_floor(psnr, comparison)}."]
    oracle = next((m for m in comparison.measures if m.name == "oracle_change" and m.estimate is not None), None)
    if oracle is not None:
        parts.append(_oracle(oracle, comparison.noun("picture") + "s"))
    return " ".join(parts)


def _closeness(psnr: "Measure | None", comparison: "Comparison") -> str:
    num, things = len(comparison.rows), comparison.noun("picture") + "s"
    images = comparison.noun() if num == 1 else comparison.noun() + "s"
    if psnr is None or psnr.estimate is None:
        return f"{num} {images} beside the original (PSNR was not measured)"
    exact = psnr.detail.get("exact_matches", 0)
    if exact == num:
        return f"exactly the original's {things}: {num} {images}, equal to the last bit"
    value, median, worst = psnr.estimate, psnr.detail["median"], psnr.detail["worst"]
    words = next(words for least, words in _WORDS if median >= least).format(things)
    if value.low is None:
        return f"{words}: PSNR {value.value:.1f} dB over {num} {images}"
    return (
        f"{words}: mean PSNR {value.value:.1f} dB (95 % interval {value.low:.1f} to {value.high:.1f}), "
        f"{median:.1f} dB in the median and {worst:.1f} dB in the worst of {num} {images}"
    )


def _floor(psnr: "Measure | None", comparison: "Comparison") -> str:
    if psnr is None or psnr.floor is None or psnr.estimate is None or psnr.estimate.value == psnr.floor.value:
        return ""
    closeness = f"identical {comparison.noun('picture')}s" if psnr.floor_identical else f"{psnr.floor.value:.1f} dB"
    floor = f"the noise floor ({closeness})"
    beyond = psnr.detail.get("beyond_floor", {})
    value, low, high = (beyond.get(end) for end in ("value", "low", "high"))
    if high is not None and high <= FLOOR_MARGIN_DB:
        return f"; no further away than {floor}, to within {FLOOR_MARGIN_DB} dB"
    if low is not None and low <= 0:
        mean = f"{number_text(abs(value), 1)} dB {'further' if value > 0 else 'nearer'} in the mean"
        return f"; not clearly further away than {floor} in {comparison.num_prompts} prompts ({mean})"
    return f"; the noise floor is {closeness}"


WIDE = 0.1  # of the interval of the oracle's change: a wider one rules out nothing that matters


def _oracle(oracle: "Measure", things: str) -> str:
    change = oracle.estimate
    assert change is not None
    figures = number_text(change.value, 3, "+")
    unclear = wide = False
    if change.low is not None and change.high is not None:
        figures += f", 95 % interval {range_text(change.low, change.high, 3, '+')}"
        unclear, wide = change.low <= 0 <= change.high, change.high - change.low > WIDE
    if unclear and wide:
        return f"Whether the captions are shown less well, the oracle cannot tell from so few {things} ({figures})."
    if unclear or change.value == 0:
        return f"The oracle sees no clear change in whether the captions are shown ({figures})."
    return f"The oracle finds the captions shown {'better' if change.value > 0 else 'worse'} than before ({figures})."
