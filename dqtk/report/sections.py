"""Sections of the report page below the scores: image pairs, curves per step, bits per layer, the plan, how to reproduce."""

import base64
import json
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .charts import Line, bits_chart, legend, line_chart
from .comparison import Comparison, Row
from .markup import folded, number, plural, row, section, table, text
from .numbers import DASH, MINUS, TIMES, bytes_text, ratio_text
from .ranges import MOST, RangeCurve

_UPSCALED_BELOW = 256  # pixels: smaller pictures are enlarged without smoothing
NAMES = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "frame_changes": "changes"}
_DIFFERENCE = f"Difference {TIMES}4"
_STYLES = {
    ("candidate", "own"): "own",
    ("candidate", "same"): "same",
    ("floor", "own"): "floor-own",
    ("floor", "same"): "floor-same",
}


def pairs_section(comparison: Comparison, max_pairs: int) -> str:
    """The worst pairs with divider and difference view; empty for ``max_pairs`` 0."""
    rows = comparison.worst_first()
    shown = rows[:max_pairs]
    if not shown:
        return ""
    order = next(iter(shown[0].scores), None)
    which = "All pairs" if len(shown) == len(rows) else f"The {len(shown)} worst of {len(rows)} pairs"
    words = f"{which}, worst first" + (f" by {NAMES.get(order, order)}." if order else ".")
    words += " Left of the divider the original, right of it the candidate; the difference view shows"
    words += f" |original {MINUS} candidate|, four times amplified."
    card = "15rem" if max(png_size(shown[0].images["reference"])) < _UPSCALED_BELOW else "22rem"
    cards = "".join(_pair(pair, index) for index, pair in enumerate(shown, start=1))
    button = f'<button type="button" id="all-differences" aria-pressed="false">{_DIFFERENCE} everywhere</button>'
    body = f'<div class="bar-row"><p class="note">{escape(words)}</p>{button}</div>'
    return section("pairs", "Pictures", "", f'{body}<ol class="pairs" style="--card:{card}">{cards}</ol>')


def _pair(pair: Row, index: int) -> str:
    width, height = png_size(pair.images["reference"])
    prompt = escape(pair.prompt)

    def image(side: str, words: str) -> str:
        data = base64.b64encode(pair.images[side]).decode()
        size = f'width="{width}" height="{height}" draggable="false"'
        return f'<img class="{side}" alt="{words}: {prompt}" {size} src="data:image/png;base64,{data}">'

    pixels = " pixels" if max(width, height) < _UPSCALED_BELOW else ""
    tags = '<span class="tag start">original</span><span class="tag end">candidate</span>'
    tags += f'<span class="tag amplified">difference {TIMES}4</span>'
    label = f"{_DIFFERENCE}, pair {index}: {prompt}"
    return (
        f'<li class="pair" style="--split:50%"><div class="stage{pixels}"><div class="images">{image("reference", "Original")}'
        f'{image("candidate", "Candidate")}</div><span class="divider"></span>{tags}</div>'
        f'<div class="controls"><input type="range" min="0" max="100" value="50" aria-label="Divider, pair {index}: {prompt}">'
        f'<button type="button" aria-pressed="false" aria-label="{label}">{_DIFFERENCE}</button></div>'
        f'<div class="words"><p class="prompt">{prompt}</p>{facts_html(pair)}</div></li>'
    )


def facts_html(pair: Row) -> str:
    """Scores, oracle and seed of a pair as a list."""
    facts = "".join(
        f"<div{' class=lost' if lost else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value, lost in _facts(pair)
    )
    return f'<dl class="facts">{facts}</dl>'


def _facts(pair: Row) -> list[tuple[str, str, bool]]:
    """(name, value, whether the candidate lost what the original had right) under a picture."""
    found = []
    for name, value in pair.scores.items():
        shown = "equal" if math.isinf(value) else f"{value:.1f} dB" if name in ("psnr", "frame_changes") else f"{value:.3f}"
        found.append((NAMES.get(name, name), shown, False))
    if pair.oracle:
        before, after = pair.oracle["reference"], pair.oracle["candidate"]
        lost = bool(before.all_correct) and after.all_correct is False
        found.append(("oracle", f"{before.mean:.2f} \N{RIGHTWARDS ARROW} {after.mean:.2f}", lost))
    return [*found, ("seed", str(pair.seed), False)]


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height from the header (PNG specification, IHDR)."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def curves_section(comparison: Comparison) -> str:
    """Both error curves as charts, and as a table; empty where no denoiser calls were recorded."""
    curves = comparison.curves
    if not curves:
        return ""
    styles = [_STYLES[curve.pipeline, curve.kind] for curve in curves]
    sqnr = [Line(label=c.label, style=style, values=c.sqnr_db) for c, style in zip(curves, styles, strict=True)]
    angle = [Line(label=c.label, style=style, values=_distance(c.cosine)) for c, style in zip(curves, styles, strict=True)]
    words = (
        f"The denoiser's output against the original's, over {plural(curves[0].num_images, comparison.noun())}. "
        "Own trajectory: both run freely, errors add up. "
        "Same inputs: the original's inputs of each step through the candidate, the error of that step alone."
    )
    charts = (
        ("SQNR, higher is closer", line_chart("SQNR per step, in dB", "step", "dB", sqnr)),
        (
            "Distance in direction, lower is closer",
            line_chart("Logarithm of one minus cosine, per step", "step", f"log\u2081\u2080 (1 {MINUS} cosine)", angle),
        ),
    )
    figures = "".join(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>" for caption, chart in charts)
    numbers = folded("Error per step as a table", _curve_table(comparison))
    return section("steps", "Error per step", words, f'{legend(sqnr)}<div class="charts">{figures}</div>{numbers}')


def ranges_section(curves: Sequence[RangeCurve]) -> str:
    """Ranges over the noise level by role, as a chart and as a table; empty where none were seen at several levels."""
    if not curves:
        return ""
    words = (
        "What the inputs of the original's layers span moves with the noise level. Bits that one calibrated range for all levels "
        "leaves unused at each of them, the median over a role's layers: where a curve is high, a static scale is too coarse. "
        "Ranges found at every call, or per interval of the level, follow them."
    )
    chart = f'{legend(range_lines(curves))}<div class="charts"><figure>{range_chart(curves)}</figure></div>'
    numbers = folded("Every role as a table", _ranges_table(curves))
    return section("ranges", "Ranges over the noise level", words, chart + numbers)


def range_lines(curves: Sequence[RangeCurve]) -> list[Line]:
    """The roles whose ranges move most, of those seen at the levels of the first."""
    drawn = [curve for curve in curves if curve.levels == curves[0].levels][:MOST]
    return [
        Line(label=f"{curve.role} ({plural(curve.num_layers, 'layer')})", style=f"r{index}", values=curve.unused)
        for index, curve in enumerate(drawn)
    ]


def range_chart(curves: Sequence[RangeCurve]) -> str:
    """Their unused bits over the level, from noise to picture."""
    names = [f"{level:.2f}".removeprefix("0") for level in curves[0].levels]
    words = "Unused bits over the noise level", "noise level, from noise to picture", "unused bits"
    return line_chart(*words, range_lines(curves), names)


def _ranges_table(curves: Sequence[RangeCurve]) -> str:
    levels = sorted({level for curve in curves for level in curve.levels}, reverse=True)
    rows = []
    for curve in curves:
        known = dict(zip(curve.levels, curve.unused, strict=True))
        cells = [number(f"{known[level]:.1f}" if level in known else DASH) for level in levels]
        rows.append(row(curve.role, [number(str(curve.num_layers)), *cells]))
    return table(
        "Unused bits by role and noise level", ("Role", "Layers", *(f"{level:.2f}" for level in levels)), rows, style="dense"
    )


def _distance(cosine: tuple[float, ...]) -> tuple[float, ...]:
    """log10(1 - cosine); a gap where the direction is the same."""
    return tuple(math.log10(1 - value) if 1 - value > 1e-15 else math.inf for value in cosine)


def _curve_table(comparison: Comparison) -> str:
    curves = comparison.curves
    columns = ["Step", "timestep"] + [name for curve in curves for name in (f"{curve.label}, dB", "cosine")]
    longest = max(curves, key=lambda curve: len(curve.sqnr_db))
    rows = []
    for step, timestep in enumerate(longest.timesteps):
        cells = [number(DASH if timestep is None else f"{timestep:g}")]
        for curve in curves:
            if step < len(curve.sqnr_db):
                sqnr = curve.sqnr_db[step]
                cells += [number("equal" if sqnr == math.inf else f"{sqnr:.2f}"), number(f"{curve.cosine[step]:.6f}")]
            else:
                cells += [number(DASH), number(DASH)]
        rows.append(row(str(step + 1), cells))
    return table("Error per step", columns, rows, style="tall dense")


def bits_section(plan: Mapping[str, Any] | None) -> str:
    """Bars of bits per layer and the list of layers behind them; empty without a plan."""
    if not plan or not plan.get("sites"):
        return ""
    sites = plan["sites"]
    rows = []
    for site in sites:
        bits = [text(_bits(site["weight_bits"])), text(_bits(site["input_bits"]))]
        shape = text(TIMES.join(map(str, site["shape"])))
        rest = [text(str(site["spec"]), mono=True), text(str(site["why"]))]
        rows.append(row(site["id"], [text(str(site["role"])), shape, *bits, *rest]))
    columns = ("Layer", "Role", "Shape", "Weights", "Inputs", "How", "Why")
    listed = table("Every layer", columns, rows, numbers_from=len(columns), style="tall dense")
    kept = sum(site["weight_bits"] is None for site in sites)
    words = f"{plural(len(sites), 'layer')} in order, grouped by block; {len(sites) - kept} quantized, {kept} kept at 16 bits."
    words += " Taller is more bits."
    return section("bits", "Bits per layer", words, bits_chart(sites) + folded("Every layer: shape, bits and why", listed))


def _bits(value: float | None) -> str:
    return "16" if value is None else f"{value:g}"


def plan_section(plan: Mapping[str, Any] | None) -> str:
    """Components with honest bytes, and roles with their bits; empty without a plan."""
    if not plan:
        return ""
    components = []
    for name, part in plan.get("components", {}).items():
        before, after = part["bytes_before"], part["bytes_after"]
        small = f"{part['class']}, {part['num_parameters']:,} parameters, {100 * part['quantized_share']:.1f} % quantized"
        components.append(
            row(name, [number(bytes_text(before)), number(bytes_text(after), small=ratio_text(before, after))], small=small)
        )
    counted = Counter((str(site["role"]), _bits(site["weight_bits"]), _bits(site["input_bits"])) for site in plan.get("sites", ()))
    roles = [row(role, [number(str(num)), number(weights), number(inputs)]) for (role, weights, inputs), num in counted.items()]
    tables = ""
    if components:
        tables += table("Components", ("Component", "bf16", "Quantized"), components)
    if roles:
        tables += table("Roles and bits", ("Role", "Layers", "Weights", "Inputs"), roles, style="dense")
    words = f"Recipe {plan.get('recipe', '?')}, plan {plan.get('hash', '?')}."
    words += " Sizes count codes, scales and everything that stays at 16 bits."
    return section("plan", "Plan", words, f'<div class="columns">{tables}</div>')


def reproduce_section(comparison: Comparison, command: str) -> str:
    """The command, seeds, settings, versions and machine."""
    settings = {
        "seed": comparison.seed,
        "seeds per prompt": comparison.seeds_per_prompt,
        "batch size": comparison.timing.batch_size,
        "compute dtype": comparison.dtype,
        **comparison.call_kwargs,
    }
    shown = f"<pre><code>{escape(command)}</code></pre>" if command else ""
    words = f"Each {comparison.noun('picture')} has its own seed, shown under it:"
    words += " a CPU generator with that seed gives its starting noise in any batch."
    return again_section(words, shown, {"Settings": settings, "Versions": comparison.versions, "Machine": comparison.hardware})


def again_section(words: str, body: str, tables_of: Mapping[str, Mapping[str, Any]]) -> str:
    """How to reproduce: ``words``, ``body`` (HTML), and small tables of what has to be the same, by their headings."""
    tables = ""
    for label, values in tables_of.items():
        said = {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        rows = [row(key, [text(value)]) for key, value in said.items()]
        tables += f"<div><h3>{label}</h3>{table(label, (), rows, style='dense')}</div>"
    return section("again", "How to reproduce", words, f'{body}<div class="columns">{tables}</div>')
