"""A comparison as plain text for a terminal."""

import textwrap
from typing import TYPE_CHECKING

from .attention_section import attention_words
from .numbers import DASH, bytes_text, number_text, range_text, ratio_text
from .verdict import verdict

if TYPE_CHECKING:
    from .comparison import Comparison

WIDTH = 100  # columns
_NAME = 36


def as_text(comparison: "Comparison") -> str:
    """Verdict, scores with intervals and noise floor, times, sizes, kernels; lines of at most 100 columns."""
    lines = [*textwrap.wrap(verdict(comparison), WIDTH), ""]
    lines.append(f"{'score':<{_NAME}}{'value':>9}   {'95 % interval':<22}{'noise floor':>12}".rstrip())
    for m in comparison.measures:
        name = f"{m.label} ({m.unit})" if m.unit else m.label
        if m.estimate is None:
            lines += _row(name, f"not measured: {m.not_measured}")
            continue
        floor = DASH if m.floor is None else number_text(m.floor.value, m.digits)
        if m.floor_identical:
            floor = "identical"
        value, interval = number_text(m.estimate.value, m.digits), range_text(m.estimate.low, m.estimate.high, m.digits)
        if m.identical:
            value, interval = "identical", ""
        lines.append(f"{name:<{_NAME}}{value:>9}   {interval:<22}{floor:>12}")
    t = comparison.timing
    lines += ["", *_row(f"time per {comparison.noun()}", f"{t.reference:.3f} s -> {t.candidate:.3f} s ({t.note})")]
    for pair in comparison.sizes:
        for place, before, after in pair.places():
            if before and after is not None:
                change = f"{bytes_text(before)} -> {bytes_text(after)} ({ratio_text(before, after)})"
                lines += _row(f"{pair.name} {place}", change)
        if pair.candidate is not None and pair.candidate.zeros is not None:
            lines += _row(f"{pair.name} exact zeros", f"{pair.candidate.zeros:.1%} of the quantized weights")
    for kernel, num in (comparison.plan_summary or {}).get("kernels", {}).items():
        lines += _row("ran", f"{kernel}: {num} layers")
    if words := attention_words(comparison.plan_summary):
        lines += _row("attention", words)
    return "\n".join(lines)


def _row(name: str, text: str) -> list[str]:
    """One line, or several with the text indented under itself."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{name:<{_NAME}}",
        subsequent_indent=" " * _NAME,
        break_on_hyphens=False,
        break_long_words=False,
    )
