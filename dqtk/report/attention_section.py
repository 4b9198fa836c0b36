"""The page's section on attention: how much of it is computed, by head and by noise level, and what masks look like."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from dqtk.attention.facts import mask_of

from .attention import masks_picture
from .charts import Line, block_of, legend, line_chart
from .markup import folded, number, plural, row, section, table, text

DASH = "\N{EN DASH}"


def attention_section(plan: Mapping[str, Any] | None) -> str:
    """Densities of heads as bars, over the noise level as a chart, masks as pictures, every attention as a table; empty where no
    attention is in blocks."""
    found = _in_blocks(plan)
    if not found:
        return ""
    known = [each for each in found if each["densities"]]
    body = _heads(known) + _levels(known) + _masks(known) if known else ""
    return section("attention", "Attention", attention_words(plan), body + folded("Every attention", _every(found)))


def attention_words(plan: Mapping[str, Any] | None) -> str:
    """How many attentions are in blocks, what they run as, and how much of them is computed; empty without any."""
    found = _in_blocks(plan)
    if not found:
        return ""
    runs = Counter(each["kernel"] for each in found)
    words = "; ".join(f"{kernel} ({num})" for kernel, num in runs.items())
    words = f"{plural(len(found), 'attention')} in blocks. Runs as: {words}."
    shares = [share for each in found for group in each["densities"] or () for share in group]
    if shares:
        mean, least, most = (f"{100 * of(shares):.1f}" for of in (fmean, min, max))
        words += f" {mean} % of the blocks are computed, {least} to {most} % by head."
    return words


def _in_blocks(plan: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    return [each for each in (plan or {}).get("attention", ()) if each.get("kernel")]


def _heads(known: Sequence[Mapping[str, Any]]) -> str:
    """A bar per head, as tall as the share of its blocks that is computed, on average over the noise levels."""
    rows = []
    for each in known:
        name = block_of(each["id"])
        shares = [fmean(head) for head in zip(*each["densities"], strict=True)]
        bars = "".join(
            f'<span class="slot" title="{escape(f"{name}, head {head}: {100 * share:.1f} % of the blocks")}">'
            f'<i class="bar b08" style="height:{100 * share:.1f}%"></i></span>'
            for head, share in enumerate(shares)
        )
        rows.append(f'<li><span class="block" title="{escape(name)}">{escape(name)}</span><span class="bars">{bars}</span></li>')
    return f'<p class="note">Share of blocks per head; a full bar is all of them.</p><ul class="blocks">{"".join(rows)}</ul>'


def _levels(known: Sequence[Mapping[str, Any]]) -> str:
    """Least, mean and most density of an attention, from noise to picture; of those with as many intervals as the first."""
    groups = len(known[0]["densities"])
    drawn = [[fmean(group) for group in each["densities"]] for each in known if len(each["densities"]) == groups]
    if groups < 2:
        return ""
    over = [list(values) for values in zip(*drawn, strict=True)][::-1]
    lines = [
        Line(label=label, style=style, values=tuple(of(values) for values in over))
        for label, style, of in (("most", "r1", max), ("mean", "r3", fmean), ("least", "r2", min))
    ]
    chart = line_chart("Computed blocks over the noise level", "interval, from noise to picture", "share of blocks", lines)
    return f'{legend(lines)}<div class="charts"><figure>{chart}</figure></div>'


def _masks(known: Sequence[Mapping[str, Any]]) -> str:
    figures = []
    for each in known:
        if "mask" in each:
            buffer = io.BytesIO()
            masks_picture(mask_of(each["mask"])).save(buffer, format="PNG")
            data = base64.b64encode(buffer.getvalue()).decode()
            name = escape(each["id"])
            figures.append(
                f'<figure><div class="scroll" tabindex="0" role="region" aria-label="Masks of {name}">'
                f'<img alt="Masks of the heads of {name}" src="data:image/png;base64,{data}"></div>'
                f"<figcaption>{name}, every head at the least noise: computed blocks dark, queries down, keys across.</figcaption>"
                "</figure>"
            )
    return "".join(figures)


def _every(found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for each in found:
        shares = [share for group in each["densities"] for share in group]
        orders = ", ".join(f"{name} {num}" for name, num in Counter(each["orders"]).most_common()) or DASH
        widths = ", ".join(f"{name} {num}" for name, num in each["widths"].items())
        share = number(f"{100 * fmean(shares):.1f} %" if shares else DASH)
        rows.append(row(each["id"], [text(str(each["heads"])), text(each["spec"]), text(orders), text(widths), share]))
    columns = ("Attention", "Heads", "How", "Orders, heads", "Widths, heads", "Computed")
    return table("Every attention", columns, rows, numbers_from=5, style="tall dense")
