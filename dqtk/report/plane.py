"""Points in a plane as inline SVG: quality against size, with intervals. Colours and fonts are the style sheet's."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
    bottom, top, right = min(lows), max(highs), max(dot.x for dot in dots) * 1.15
    margin = (top - bottom) * 0.12 or abs(top) * 0.05 or 1.0
    bottom, top = bottom - margin, top + margin

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * value / right

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for i in range(5):
        across, up = right * i / 4, bottom + (top - bottom) * i / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(up):.1f}" y2="{y(up):.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y(up) + 4:.1f}" text-anchor="end">{up:.3g}</text>')
        parts.append(
            f'<text class="tick" x="{x(across):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{across:.3g}</text>'
        )
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
        parts.append(f'<text class="tick" x="{x(dot.x) + 8:.1f}" y="{y(dot.y) - 6:.1f}">{escape(dot.label)}</text>')
    return "".join(parts) + "</svg>"
