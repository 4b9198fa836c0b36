"""Pictures of numbers as strings: a line chart (inline SVG) and bars of bits per layer (HTML).

Colours, strokes and fonts are the style sheet's: elements carry classes only, so that both follow light and dark. Every line
has its own dash and marker besides its colour. The page prints the same numbers as a table.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 440, 250  # SVG units; about one pixel on a phone, at most 1.4 on a wide screen
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 38


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line: ``style`` is its CSS class; ``values`` by step, where ``inf`` (no error) leaves a gap."""

    label: str
    style: str
    values: tuple[float, ...]


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], names: Sequence[str] = ()) -> str:
    """An SVG with axes, grid and one polyline per line, steps counted from 1 or by their ``names``."""
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    num_steps = max((len(line.values) for line in lines), default=0)
    if not finite or not num_steps:
        return f'<p class="muted">{escape(title)}: nothing to draw, every output was equal.</p>'
    ticks = round_ticks(min(finite), max(finite))
    low, high = ticks[0], ticks[-1]

    def x(step: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((step - 1) / (num_steps - 1) if num_steps > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for step in _step_ticks(num_steps):
        name = escape(names[step - 1]) if names else step
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{name}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="axis" x="11" y="{_TOP + 92}" text-anchor="middle" transform="rotate(-90 11 {_TOP + 92})">')
    parts.append(f"{escape(y_label)}</text>")
    for line in lines:
        points = [(x(i), y(v)) for i, v in enumerate(line.values, start=1) if math.isfinite(v)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline class="line {escape(line.style)}" points="{path}"><title>{escape(line.label)}</title></polyline>')
        if num_steps <= 30:
            parts += [f'<circle class="dot {escape(line.style)}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>' for px, py in points]
    return "".join(parts) + "</svg>"


def legend(lines: Sequence[Line]) -> str:
    """Samples and names of the lines, as an HTML list."""
    key = '<svg class="key" viewBox="0 0 30 10" aria-hidden="true"><line class="line {}" x1="1" x2="29" y1="5" y2="5"/></svg>'
    items = "".join(f"<li>{key.format(escape(line.style))}{escape(line.label)}</li>" for line in lines)
    return f'<ul class="legend">{items}</ul>'


def round_ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that enclose [low, high]."""
    span = max(high - low, abs(high) * 1e-6, 1e-9)
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many digits as their distance has: 2.5 apart is not 2 or 3 apart."""
    step = ticks[1] - ticks[0]
    digits = next(n for n in range(16) if abs(round(step, n) - step) <= 1e-9 * step)
    return [f"{tick:z.{digits}f}" for tick in ticks]


def _step_ticks(num_steps: int) -> list[int]:
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if num_steps / n <= 10)
    return (
        [1, *(n for n in range(every, num_steps + 1, every) if n > 1.5 * max(every, 2) - 1)]
        if every > 1
        else list(range(1, num_steps + 1))
    )


def bits_chart(sites: Sequence[Mapping[str, Any]]) -> str:
    """One bar per site, as tall as its weight bits (16: kept), grouped by block; hovering names it."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        groups.setdefault(block_of(site["id"]), []).append(site)
    rows = []
    for block, members in groups.items():
        bars = "".join(_bar(site) for site in members)
        num = f"{len(members)} layer{'s' if len(members) != 1 else ''}"
        rows.append(f'<li><span class="block" title="{escape(block)}">{escape(block)}</span><span class="bars">{bars}</span>')
        rows.append(f'<span class="visually-hidden">{num}</span></li>')
    classes = sorted({bits_class(site["weight_bits"]) for site in sites})
    names = {"b02": "2 to 3 bits", "b04": "4 to 5 bits", "b08": "6 to 8 bits", "b16": "16 bits (kept)"}
    keys = "".join(f'<li><span class="swatch {name}"></span>{names[name]}</li>' for name in classes)
    return f'<ul class="legend">{keys}</ul><ul class="blocks">{"".join(rows)}</ul>'


def _bar(site: Mapping[str, Any]) -> str:
    bits = site["weight_bits"]
    inputs = site["input_bits"]
    words = "kept at 16 bits" if bits is None else f"{bits:g}-bit weights, {'16' if inputs is None else f'{inputs:g}'}-bit inputs"
    title = f"{site['id']} {list(site['shape'])}: {words}. {site['why']}"
    height = 100 * min(16 if bits is None else bits, 16) / 16
    return f'<span class="slot" title="{escape(title)}"><i class="bar {bits_class(bits)}" style="height:{height:.1f}%"></i></span>'


def bits_class(bits: float | None) -> str:
    """The CSS class of a bit width: b02, b04, b08 or b16."""
    if bits is None or bits > 8:
        return "b16"
    return "b02" if bits < 4 else "b04" if bits < 6 else "b08"


def block_of(site_id: str) -> str:
    """The block of a site id ``component:path``: through the first numbered part, else its first part."""
    component, _, path = site_id.rpartition(":")
    match = re.match(r"(.*?\.\d+)(\.|$)", path)
    block = match.group(1) if match else path.split(".")[0]
    return f"{component}: {block}" if component else block
