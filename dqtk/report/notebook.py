"""Pictures beside each other in a notebook: a grid, a slider, an amplified difference, an enlarged crop. And numbers as pictures.

Everything is a PIL image or an object with ``_repr_html_``, so a notebook shows it as the last line of a cell and nothing here
needs IPython. The slider is one range input over two stacked pictures, moved by CSS and one inline handler; where scripts do not
run (a notebook on a code host) the two pictures stand side by side in its stead.
"""

import base64
import io
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from dqtk.allocate.from_plans import Offers
from dqtk.allocate.frontier import frontier
from dqtk.calibrate import Stats
from dqtk.sites import ROLES, Site

from .allocation import front_chart, front_lines
from .charts import Line, block_of
from .ranges import range_curves, widths_of
from .sections import range_chart, range_lines

_LABEL = 16  # pixels of height
_CELL, _ROW, _ROLES, _GAP = 23, 17, 110, 16  # of a map of layers: width and height of a cell, width of the names, between maps
_PALE, _DARK = (243, 241, 236), (179, 73, 27)

# A picture that stands alone has no page to take colours from; a notebook may put its rules beside those of others.
_CHART_STYLE = (
    ".dqtk-chart text{font:11.5px system-ui,sans-serif;fill:#5f646b}.grid{stroke:#e4e1db}"
    ".line{fill:none;stroke-width:2;stroke:#1c1e21}"
    ".line.r0{stroke:#b3491b}.dot.r0{fill:#b3491b}.line.r1{stroke:#4a78b5;stroke-dasharray:7 3}.dot.r1{fill:#4a78b5}"
    ".line.r2{stroke:#1f7a6d;stroke-dasharray:2 4}.dot.r2{fill:#1f7a6d}.line.r3{stroke-dasharray:9 3 2 3}"
    ".line.own{stroke:#b3491b}.dot.own{fill:#b3491b}.line.same{stroke:#1f5fa8;stroke-dasharray:6 4}.dot.same{fill:#1f5fa8}"
    ".line.r4{stroke:#7a8087}.dot.r4{fill:#7a8087}.line.r5{stroke:#1f5fa8;stroke-dasharray:1 3}.dot.r5{fill:#1f5fa8}"
)


def grid(images: Sequence[Image.Image], labels: Sequence[str] = (), *, columns: int = 4, scale: int = 2) -> Image.Image:
    """Pictures of one size in rows of ``columns``, enlarged ``scale`` times without smoothing, each under its label.

    Raises ``ValueError`` for no pictures, several sizes, or another number of labels than pictures.
    """
    if not images or len({image.size for image in images}) != 1:
        sizes = sorted({image.size for image in images})
        raise ValueError(f"grid: images must be at least one and of one size, got {len(images)} of sizes {sizes}. Resize them.")
    if labels and len(labels) != len(images):
        raise ValueError(f"grid: labels must be one per image ({len(images)}), got {len(labels)}. Leave them out for none.")
    width, height = (side * scale for side in images[0].size)
    above, gap = (_LABEL if labels else 0), 4
    num_rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, num_rows * (height + above + gap) - gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * (width + gap), i // columns * (height + above + gap)
        if labels:
            pen.text((x + 2, y + 2), labels[i][: max(1, width // 6)], fill="black")
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y + above))
    return sheet


def difference(a: Image.Image, b: Image.Image, *, gain: float = 8.0) -> Image.Image:
    """128 + gain * (a - b) per channel, cut to 0..255: grey where the two agree. Raises ``ValueError`` for two sizes."""
    if a.size != b.size:
        raise ValueError(f"difference: both pictures must have one size, got {a.size} and {b.size}. Resize one.")
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (a, b))
    return Image.fromarray(np.clip(128 + gain * (first - second), 0, 255).astype(np.uint8))


def crop(image: Image.Image, box: tuple[int, int, int, int], *, zoom: int = 6) -> Image.Image:
    """The part (left, top, right, bottom) enlarged ``zoom`` times, every pixel a square."""
    part = image.crop(box)
    return part.resize((part.width * zoom, part.height * zoom), Image.Resampling.NEAREST)


@dataclass(frozen=True, slots=True)
class Slider:
    """Two pictures of one size, one over the other, with a handle between them."""

    before: Image.Image
    after: Image.Image
    before_label: str = "original"
    after_label: str = "quantized"
    scale: int = 4

    def _repr_html_(self) -> str:
        name = f"dqtk-{secrets.token_hex(4)}"
        width, height = (side * self.scale for side in self.before.size)
        labels = (escape(self.before_label), escape(self.after_label))
        pair = [_data_uri(image) for image in (self.before, self.after)]
        style = f"width:{width}px;height:{height}px;image-rendering:pixelated"
        first, second = (f'<img src="{uri}" alt="{label}" style="{style}">' for uri, label in zip(pair, labels, strict=True))
        # Without scripts: side by side. The script puts the second over the first and shows the handle.
        script = (
            f"(()=>{{const r=document.getElementById('{name}'),b=r.querySelector('.over'),i=r.querySelector('input');"
            "r.querySelector('.stack').style.position='relative';b.style.position='absolute';b.style.left='0';b.style.top='0';"
            "i.hidden=false;const move=()=>b.style.clipPath=`inset(0 0 0 ${i.value}%)`;i.oninput=move;move();})()"
        )
        return (
            f'<div id="{name}"><div class="stack" style="display:inline-block"><span>{first}</span>'
            f'<span class="over">{second}</span></div>'
            f'<div>{labels[0]} | {labels[1]}</div><input type="range" value="50" hidden style="width:{width}px" '
            f'aria-label="{labels[0]} to {labels[1]}"><script>{script}</script></div>'
        )


@dataclass(frozen=True, slots=True, repr=False)
class Ranges:
    """How far ranges of inputs move with the noise level, by role: statistics of a static recipe, and the sites of its plan."""

    stats: Stats
    sites: Sequence[Site]

    def __repr__(self) -> str:
        return f"Ranges({len({key.site for key in self.stats.inputs})} layers, {self.stats.num_prompts} prompts)"

    def _repr_svg_(self) -> str:
        curves = range_curves(widths_of(self.stats), self.sites)
        if not curves:
            raise ValueError(
                "Ranges: stats must hold ranges at two noise levels at least, got none. "
                "Calibrate a static recipe, such as w8a8-static."
            )
        return _standing_alone(range_chart(curves), range_lines(curves))


@dataclass(frozen=True, slots=True, repr=False)
class Front:
    """What other budgets would buy, as the scores of layers expect it, beside the best single plan that fits into each."""

    offers: Offers

    def __repr__(self) -> str:
        return f"Front({len(self.offers.plans)} plans, {len(self.offers.rows)} layers)"

    def _repr_svg_(self) -> str:
        points = frontier(self.offers)
        if not points:
            losses = sorted(set(self.offers.kinds.values()))
            raise ValueError(f"Front: losses must be noise powers, got {losses}. Others do not add up to what a whole model loses.")
        return _standing_alone(front_chart(points, self.offers), front_lines(points))


@dataclass(frozen=True, slots=True, repr=False)
class LayerMap:
    """A number per layer as coloured cells: roles down, blocks across, a map per name beside each other.

    values: name -> site id -> number; layers without one are left out. Where a block has several layers of a role, the cell is the
    least of theirs. low_is_dark: the least number is the darkest (scores: the layer that loses most), else the largest is. Blocks
    go by their first letter and number; hovering says the rest.
    """

    sites: Sequence[Site]
    values: Mapping[str, Mapping[str, float]]
    low_is_dark: bool = True

    def __repr__(self) -> str:
        return f"LayerMap({', '.join(self.values)}: {len(self.sites)} layers)"

    def _repr_svg_(self) -> str:
        maps = {name: self._cells(numbers) for name, numbers in self.values.items()}
        numbers = [number for cells in maps.values() for number in cells.values()]
        if not numbers:
            raise ValueError("LayerMap: values must hold a finite number of one of the sites, got none. Their keys are site ids.")
        low, high = min(numbers), max(numbers)
        used = {cell for cells in maps.values() for cell in cells}
        roles = [role for role in ROLES if role in {role for role, _ in used}]
        blocks = [block for block in dict.fromkeys(block_of(site.id) for site in self.sites) if block in {b for _, b in used}]
        parts = [_word(_ROLES - 8, 48 + _ROW * i, role, "end") for i, role in enumerate(roles)]
        for index, (name, cells) in enumerate(maps.items()):
            left = _ROLES + index * (len(blocks) * _CELL + _GAP)
            parts.append(f'<text x="{left}" y="14">{escape(name)}</text>')
            parts += [_word(left + _CELL * (i + 0.5), 31, _short(block), "middle", block) for i, block in enumerate(blocks)]
            for (role, block), number in cells.items():
                x, y = left + _CELL * blocks.index(block), 36 + _ROW * roles.index(role)
                parts.append(_cell(x, y, number, self._darkness(number, low, high), f"{block} {role}: {number:.4g}"))
        width, height = _ROLES + len(maps) * (len(blocks) * _CELL + _GAP), 42 + _ROW * len(roles)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'style="font:11px system-ui,sans-serif"><rect width="{width}" height="{height}" fill="#fcfbf9"/>{"".join(parts)}</svg>'
        )

    def _cells(self, numbers: Mapping[str, float]) -> dict[tuple[str, str], float]:
        """(role, block) -> the least number of its layers."""
        found: dict[tuple[str, str], float] = {}
        for site in self.sites:
            if math.isfinite(number := numbers.get(site.id, math.inf)):
                key = (site.role, block_of(site.id))
                found[key] = min(number, found.get(key, math.inf))
        return found

    def _darkness(self, number: float, low: float, high: float) -> float:
        """0 pale, 1 dark."""
        share = (number - low) / (high - low) if high > low else 0.5
        return 1 - share if self.low_is_dark else share


def _word(x: float, y: float, word: str, anchor: str, hover: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="#5f646b">{escape(word)}{_hover(hover)}</text>'


def _cell(x: float, y: float, number: float, darkness: float, hover: str) -> str:
    """A coloured cell with its number."""
    colour = ",".join(f"{round(pale + darkness * (dark - pale))}" for pale, dark in zip(_PALE, _DARK, strict=True))
    ink = "#fff" if darkness > 0.6 else "#1c1e21"
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL - 1}" height="{_ROW - 1}" fill="rgb({colour})">{_hover(hover)}</rect>'
        f'<text x="{x + (_CELL - 1) / 2}" y="{y + 12}" text-anchor="middle" fill="{ink}" pointer-events="none">{number:.0f}</text>'
    )


def _hover(words: str) -> str:
    return f"<title>{escape(words)}</title>" if words else ""


def _short(block: str) -> str:
    """First letter and number of a block: ``t0`` of ``transformer: transformer_blocks.0``."""
    path = block.rpartition(": ")[2]
    number = re.search(r"\d+$", path)
    return path[:1] + (number[0] if number else "")


def _standing_alone(chart: str, lines: Sequence[Line]) -> str:
    """A line chart with its legend and colours."""
    rows = "".join(
        f'<line class="line {line.style}" x1="46" x2="76" y1="{265 + 17 * i}" y2="{265 + 17 * i}"/>'
        f'<text x="84" y="{269 + 17 * i}">{escape(line.label)}</text>'
        for i, line in enumerate(lines)
    )
    placed = chart.replace("<svg ", '<svg width="440" height="250" ', 1)
    height = 270 + 17 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="dqtk-chart" viewBox="0 0 440 {height}" width="620">'
        f"<style>{_CHART_STYLE}</style>"
        f'<rect width="440" height="{height}" fill="#fcfbf9"/>{placed}{rows}</svg>'
    )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
