"""The report page: one self-contained HTML file that can be mailed, archived and opened from disk.

No network (a content security policy in the page forbids it), no framework: strings, a style sheet and a page of script that
stand beside this file. Pictures are the exact PNGs as data URIs. Everything that comes from outside (prompts, names, paths) is
escaped. What the page shows is decided here and in ``sections``; how it looks is ``page.css``; only dividers and difference
views need script.
"""

import os
import secrets
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from . import environment
from .attention_section import attention_section
from .clips import clips_section, frames_section
from .comparison import Comparison, Estimate, Measure
from .markup import number, plural, row, section, table
from .numbers import DASH, TIMES, bytes_text, number_text, range_text, ratio_text
from .player import asset
from .sections import bits_section, curves_section, pairs_section, plan_section, ranges_section, reproduce_section
from .verdict import verdict

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$css</style>
</head>
<body>
<a class="skip" href="#scores">Skip to the scores</a>
<main class="page">
$body
<footer>Made by dqtk $version, $created. Everything on this page is in this file.</footer>
</main>
<script>
$js</script>
</body>
</html>
""")


def write_page(
    comparison: Comparison,
    path: str | Path,
    plan_summary: Mapping[str, Any] | None = None,
    command: str = "",
    *,
    max_pairs: int = 24,
) -> Path:
    """Write the page of a comparison to ``path`` and return it.

    ``plan_summary`` (default: the comparison's own) adds bits per layer, the plan and the kernels that ran; ``command`` is what was
    typed. The ``max_pairs`` worst pairs are embedded, and the page says so. Written beside ``path`` and renamed at the end, so
    a page that exists is whole. Raises ``ValueError`` for a negative ``max_pairs``.
    """
    if max_pairs < 0:
        raise ValueError(f"write_page: max_pairs must be at least 0, got {max_pairs}. 0 leaves the pictures out.")
    return write_whole(Path(path), render_page(comparison, plan_summary, command, max_pairs=max_pairs))


def write_whole(path: Path, text: str) -> Path:
    """A page that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render_page(
    comparison: Comparison, plan_summary: Mapping[str, Any] | None = None, command: str = "", *, max_pairs: int = 24
) -> str:
    """The page as text; arguments as in ``write_page``."""
    plan = plan_summary if plan_summary is not None else comparison.plan_summary
    body = [
        _header(comparison, plan),
        _scores(comparison),
        clips_section(comparison, max_pairs) if comparison.num_frames > 1 else pairs_section(comparison, max_pairs),
        frames_section(comparison),
        curves_section(comparison),
        ranges_section(comparison.ranges),
        _cost(comparison, plan),
        bits_section(plan),
        attention_section(plan),
        plan_section(plan),
        reproduce_section(comparison, command),
    ]
    title = f"{comparison.candidate_name} against {comparison.reference_name}"
    return blank_page(title, "\n".join(part for part in body if part), comparison.versions.get("dqtk", ""), comparison.created)


def blank_page(title: str, body: str, version: str | None = None, created: str | None = None) -> str:
    """The page's frame, style sheet and script around ``body`` (HTML). Default: this version, now."""
    return _PAGE.substitute(
        title=escape(title),
        policy=_POLICY,
        css=asset("page.css") + asset("player.css"),
        js=asset("player.js") + asset("page.js"),
        body=body,
        version=escape(environment.versions()["dqtk"] if version is None else version),
        created=escape(environment.now() if created is None else created),
    )


def _header(comparison: Comparison, plan: Mapping[str, Any] | None) -> str:
    recipe = f", recipe {escape(str(plan['recipe']))}" if plan and plan.get("recipe") else ""
    tiles = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>'
        for name, value, more in _tiles(comparison, plan)
    )
    return (
        f'<header><p class="kicker">Comparison with the original, pair by pair{recipe}</p>'
        f"<h1>{escape(comparison.candidate_name)} against {escape(comparison.reference_name)}</h1>"
        f'<p class="verdict">{escape(verdict(comparison))}</p><dl class="tiles">{tiles}</dl></header>'
    )


def _tiles(comparison: Comparison, plan: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Key figures: (name, value, further words)."""
    found = []
    for m in comparison.measures:
        if m.name in ("psnr", "oracle_change") and m.estimate is not None:
            name, sign = ("Mean PSNR", "") if m.name == "psnr" else (m.label, "+")
            value = f"{number_text(m.estimate.value, m.digits, sign)} {m.unit}".strip()
            same = f"every {comparison.noun('picture')} is the original's"
            shown = ("identical", same) if m.identical else (value, _interval(m.estimate, m.digits))
            found.append((name, *shown))
    total = _total_sizes(comparison, plan)
    if total is not None:
        label, before, after = total
        found.append((label, ratio_text(before, after), f"{bytes_text(before)} to {bytes_text(after)}"))
    t = comparison.timing
    if t.candidate > 0:
        words = f"original {t.reference:.3g} s, {t.reference / t.candidate:.2f}{TIMES} as fast"
        found.append((f"Time per {comparison.noun()}", f"{t.candidate:.3g} s", words))
    return found


def _total_sizes(comparison: Comparison, plan: Mapping[str, Any] | None) -> tuple[str, int, int] | None:
    """What the size tile shows: the quantized components as the plan accounts for them, else everything on disk, else in memory."""
    if plan and plan.get("components"):
        parts = [c for c in plan["components"].values() if c["quantized_share"] > 0]
        if parts:
            return "Size of quantized parts", sum(c["bytes_before"] for c in parts), sum(c["bytes_after"] for c in parts)
    for place, label in (("on_disk", "Size on disk"), ("in_memory", "Size in memory")):
        before = [getattr(pair.reference, place) for pair in comparison.sizes if pair.reference is not None]
        after = [getattr(pair.candidate, place) for pair in comparison.sizes if pair.candidate is not None]
        known_before, known_after = [b for b in before if b is not None], [a for a in after if a is not None]
        if known_after and sum(known_before):
            return label, sum(known_before), sum(known_after)
    return None


def _interval(estimate: Estimate, digits: int) -> str:
    if estimate.low is None:
        return "no interval: one prompt only"
    return f"95 % interval {range_text(estimate.low, estimate.high, digits)}"


def _scores(comparison: Comparison) -> str:
    floor = comparison.floor_name
    columns = ["Score", comparison.candidate_name] + ([floor] if floor is not None else [])
    pairs, prompts = plural(len(comparison.rows), f"{comparison.noun()} pair"), plural(comparison.num_prompts, "prompt")
    words = f"{pairs} from {prompts}, same prompt and same starting noise. Small figures are 95 % bootstrap intervals over prompts."
    if comparison.num_frames > 1:
        words += f" Each clip counts as the mean over its {comparison.num_frames} frames, which are scored before any codec."
    if floor is not None:
        words += f" The column \u201c{floor}\u201d shows the same scores for the original with another rounding:"
        words += " distances of that size are not quantization's doing."
    rows = [_score_row(m, comparison, floor=floor is not None) for m in comparison.measures]
    return section("scores", "Scores", words, table("Table of scores", columns, rows))


def _score_row(m: Measure, comparison: Comparison, *, floor: bool) -> str:
    label = f"{m.label}, {m.unit}" if m.unit else m.label
    if m.estimate is None:
        why = f"<b>{escape(label)}</b>: not measured<small>{escape(m.not_measured or '')}</small>"
        return f'<tr class="left-out"><th scope="row" colspan="{3 if floor else 2}">{why}</th></tr>'
    cells = [number("identical") if m.identical else _cell(m.estimate, m.digits)]
    if floor:
        cells.append(number("identical") if m.floor_identical else _cell(m.floor, m.digits))
    return row(label, cells, small=_notes(m, comparison))


def _cell(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return number(DASH)
    small = range_text(estimate.low, estimate.high, digits) if estimate.low is not None else ""
    return number(number_text(estimate.value, digits), small=small)


def _notes(m: Measure, comparison: Comparison) -> str:
    """What stands under a score's name."""
    parts = []
    if "worst" in m.detail and not m.identical:
        parts.append("higher is closer" if m.higher_is_better else "lower is closer")
        parts.append(f"worst {m.detail['worst']:.{m.digits}f}")
    if "worst_frame" in m.detail and not m.identical:
        parts.append(f"worst frame {m.detail['worst_frame']:.{m.digits}f}")
    if "pooled" in m.detail and not m.identical:
        parts.append(f"of the pooled error {m.detail['pooled']:.{m.digits}f}")
    if m.detail.get("exact_matches"):
        parts.append(
            f"{m.detail['exact_matches']} of {plural(m.num_samples, 'pair')} equal, counted as {m.detail['cap']:g} {m.unit}"
        )
    if m.detail.get("floor_exact_matches"):
        parts.append(f"of the noise floor {m.detail['floor_exact_matches']} equal, counted alike")
    for key, words in (("num_capped", ""), ("floor_num_capped", " of the noise floor")):
        if m.detail.get(key):
            parts.append(f"{plural(m.detail[key], comparison.noun())}{words} above {m.detail['cap_db']:g} dB, counted as that")
    if "right_to_wrong" in m.detail:
        lost = plural(m.detail["right_to_wrong"], comparison.noun("picture"))
        parts.append(f"{lost} turned wrong, {m.detail['wrong_to_right']} turned right")
    if "num_steps" in m.detail:
        parts.append(f"{plural(m.num_samples, comparison.noun())}, {plural(m.detail['num_steps'], 'step')}")
    return "; ".join(parts)


def _cost(comparison: Comparison, plan: Mapping[str, Any] | None) -> str:
    t = comparison.timing
    times = [number(f"{t.reference:.3f} s"), number(f"{t.candidate:.3f} s", small=ratio_text(t.reference, t.candidate))]
    rows = [row(f"Time per {comparison.noun()}", times)]
    for pair in comparison.sizes:
        for words, before, after in pair.places():
            if before is not None or after is not None:
                cells = [number(bytes_text(before)), number(bytes_text(after), small=ratio_text(before, after))]
                rows.append(row(f"{pair.name or 'top folder'} {words}", cells))
        zeros = [size.zeros if size is not None else None for size in (pair.reference, pair.candidate)]
        if any(share is not None for share in zeros):
            cells = [number(DASH if share is None else f"{share:.1%}") for share in zeros]
            rows.append(row(f"{pair.name} exact zeros among quantized weights", cells))
    body = table("Table of sizes and times", ("What", "Original", "Candidate"), rows)
    kernels = [row(str(name), [number(str(num))]) for name, num in (plan or {}).get("kernels", {}).items()]
    if kernels:
        body += "<h3>What ran</h3>" + table("Kernels that ran", ("Kernel", "Layers"), kernels)
    note = f"Time: {t.note}, on {_machine(comparison)}. In memory: weights as they lie there, computing in {comparison.dtype}."
    return section("cost", "Size and time", note, body)


def _machine(comparison: Comparison) -> str:
    hardware = comparison.hardware
    if "accelerator" in hardware:
        return hardware["accelerator"]
    return f"{hardware.get('processor', 'an unknown processor')}, {plural(int(hardware.get('threads', '1')), 'thread')}"
