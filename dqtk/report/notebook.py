"""Pictures beside each other in a notebook: a grid, a slider, an amplified difference, an enlarged crop.

Everything is a PIL image or an object with ``_repr_html_``, so a notebook shows it as the last line of a cell and nothing here
needs IPython. The slider is one range input over two stacked pictures, moved by CSS and one inline handler; where scripts do not
run (a notebook on a code host) the two pictures stand side by side in its stead.
"""

import base64
import io
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from dqtk.calibrate import Stats
from dqtk.sites import Site

from .ranges import range_curves, widths_of
from .sections import range_chart, range_lines

_LABEL = 16  # pixels of height

# A picture that stands alone has no page to take colours from.
_CHART_STYLE = (
    "text{font:11.5px system-ui,sans-serif;fill:#5f646b}.grid{stroke:#e4e1db}.line{fill:none;stroke-width:2;stroke:#1c1e21}"
    ".line.r0{stroke:#b3491b}.dot.r0{fill:#b3491b}.line.r1{stroke:#4a78b5;stroke-dasharray:7 3}.dot.r1{fill:#4a78b5}"
    ".line.r2{stroke:#1f7a6d;stroke-dasharray:2 4}.dot.r2{fill:#1f7a6d}.line.r3{stroke-dasharray:9 3 2 3}"
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
        lines = range_lines(curves)
        rows = "".join(
            f'<line class="line {line.style}" x1="46" x2="76" y1="{265 + 17 * i}" y2="{265 + 17 * i}"/>'
            f'<text x="84" y="{269 + 17 * i}">{escape(line.label)}</text>'
            for i, line in enumerate(lines)
        )
        chart = range_chart(curves).replace("<svg ", '<svg width="440" height="250" ', 1)
        height = 270 + 17 * len(lines)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440 {height}" width="620"><style>{_CHART_STYLE}</style>'
            f'<rect width="440" height="{height}" fill="#fcfbf9"/>{chart}{rows}</svg>'
        )


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
