"""Points in a plane as inline SVG: quality against size, with intervals. Colours and fonts are the style sheet's."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .charts import round_ticks, tick_texts

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 16, 44


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One point with its vertical interval (None: none)."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def plane(title: str, x_label: str, y_label: str, dots: Sequence[Dot]) -> str:
    """An SVG with axes and a labelled point per dot; the horizontal axis begins at 0."""
    lows = [dot.low if dot.low is not None else dot.y for dot in dots]
    highs = [dot.high if dot.high is not None else dot.y for dot in dots]
    up, across = round_ticks(min(lows), max(highs)), round_ticks(0, max(dot.x for dot in dots))
    bottom, top, right = up[0], up[-1], across[-1]

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / right

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, text in zip(up, tick_texts(up), strict=True):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(across, tick_texts(across), strict=True):
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    parts.append(
        f'<text class="axis" x="13" y="{height}" text-anchor="middle" transform="rotate(-90 13 {height})">{escape(y_label)}</text>'
    )
    for dot in dots:
        words = f"{dot.label}: {dot.x:.4g}, {dot.y:.4g}"
        if dot.low is not None and dot.high is not None:
            parts.append(
                f'<line class="line own" x1="{x(dot.x):.1f}" x2="{x(dot.x):.1f}" y1="{y(dot.low):.1f}" y2="{y(dot.high):.1f}"/>'
            )
        parts.append(
            f'<circle class="dot own" cx="{x(dot.x):.1f}" cy="{y(dot.y):.1f}" r="4"><title>{escape(words)}</title></circle>'
        )
        # Beside the point, on the side where there is room.
        side, anchor = (8, "start") if x(dot.x) < _WIDTH * 0.6 else (-8, "end")
        parts.append(
            f'<text class="tick" x="{x(dot.x) + side:.1f}" y="{y(dot.y) - 6:.1f}" text-anchor="{anchor}">{escape(dot.label)}</text>'
        )
    return "".join(parts) + "</svg>"
