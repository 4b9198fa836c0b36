"""Clips side by side, and the difference of two, frame by frame, played and scrubbed together.

Frames travel as one lossless PNG per side (``film.py``) and are drawn onto canvases one by one, so that what is seen is what was
scored: a video element would show them through a codec, and two of them are never at the same frame. Where scripts do not run, the
sheets of frames stand in their stead. The style sheet and the script (``player.css``, ``player.js``) serve the report page and
notebooks alike.
"""

import base64
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

import numpy as np
from PIL import Image

from .film import columns_of, frames_of_png, png_of, sheet_of
from .numbers import TIMES

RATE = 8  # frames per second: half of what most models are trained at, slow enough to look
MAX_BYTES = 6_000_000  # of a player's sheets, as PNG; a longer film is shown in every second frame, or every third
_WIDTH, _HEIGHT = 100, 22  # of the line of scores, in units of its own


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameValues:
    """Values of one score, a frame each (``inf``: equal), and its name and unit."""

    name: str
    values: tuple[float, ...]
    unit: str = ""

    def words(self, value: float) -> str:
        """A value as people read it."""
        if math.isinf(value):
            return "equal"
        return f"{self.name} {value:.1f} {self.unit}" if self.unit else f"{self.name} {value:.3f}"


def asset(name: str) -> str:
    """A file of this folder as text."""
    return resources.files("dqtk.report").joinpath(name).read_text(encoding="utf-8")


def thinned(png: bytes, num_frames: int, every: int) -> tuple[bytes, int]:
    """The sheet of every so many frames, and how many those are."""
    if every == 1:
        return png, num_frames
    kept = frames_of_png(png, num_frames)[::every]
    return png_of(sheet_of(kept)), len(kept)


def stride_of(num_bytes: int, num_frames: int) -> int:
    """Every which frame of sheets so large fits into a page."""
    return min(math.ceil(num_bytes / MAX_BYTES), max(1, num_frames // 2))


def player_html(
    films: Sequence[tuple[str, bytes]],
    num_frames: int,
    size: tuple[int, int],
    *,
    words: str,
    difference: bool = False,
    score: FrameValues | None = None,
) -> str:
    """Stage and controls. ``films``: names, and sheets as PNG files; ``size``: (width, height) of a frame; ``words``: what is
    shown, for labels; ``difference``: of the first two, beside them."""
    every = stride_of(sum(len(png) for _, png in films), num_frames)
    stage, num, shown = f'width="{size[0]}" height="{size[1]}"', num_frames, ""
    for name, png in films:
        kept, num = thinned(png, num_frames, every)
        alt, data = escape(f"{name}, all frames: {words}"), base64.b64encode(kept).decode()
        shown += f"<figure><figcaption>{escape(name)}</figcaption><canvas {stage} hidden></canvas>"
        shown += f'<img alt="{alt}" src="data:image/png;base64,{data}"></figure>'
    if difference:
        shown += f'<figure hidden><figcaption>difference {TIMES}4</figcaption><canvas class="apart" {stage}></canvas></figure>'
    values = [score.words(value) for value in score.values[::every]] if score is not None else []
    facts = {"frames": num, "columns": columns_of(num), "every": every, "of": num_frames, "rate": RATE, "values": values}
    line = _line(score) if score is not None else ""
    label = escape(f"Frame: {words}")
    return (
        f'<div class="player" data-film="{escape(json.dumps(facts))}"><div class="panes">{shown}</div>'
        f'<div class="reel" hidden><button type="button" class="play" aria-label="{escape(f"Play: {words}")}">Play</button>'
        f'<div class="scrub">{line}<input type="range" min="0" max="{num - 1}" value="0" aria-label="{label}"></div>'
        f'<output aria-live="off"></output></div></div>'
    )


def _line(score: FrameValues) -> str:
    """The score over the frames as a small line above the scrubber; frames that are equal leave a gap."""
    finite = [value for value in score.values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    span, last = max(high - low, 1e-9), len(score.values) - 1
    points = [
        f"{_WIDTH * i / last:.1f},{1 + (_HEIGHT - 2) * (high - value) / span:.1f}"
        for i, value in enumerate(score.values)
        if math.isfinite(value)
    ]
    title = escape(f"{score.name} per frame, {low:.3g} to {high:.3g} {score.unit}".strip())
    return (
        f'<svg class="spark" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{title}">'
        f'<title>{title}</title><polyline points="{" ".join(points)}"/></svg>'
    )


@dataclass(frozen=True, slots=True, repr=False)
class Player:
    """Two clips in a notebook, played together, with the difference of their pixels; each a list of frames of one size.

    Raises ``ValueError`` when it is shown, for clips of different lengths or sizes.
    """

    before: Sequence[Image.Image]
    after: Sequence[Image.Image]
    before_label: str = "original"
    after_label: str = "quantized"
    words: str = ""

    def __repr__(self) -> str:
        return f"Player({len(self.before)} frames)"

    def _repr_html_(self) -> str:
        sizes = {frame.size for frame in (*self.before, *self.after)}
        if len(self.before) != len(self.after) or len(sizes) != 1:
            raise ValueError(
                f"Player: clips must be equally long and of one size, got {len(self.before)} and {len(self.after)} frames of "
                f"{sorted(sizes)}. Cut or resize one."
            )
        first, second = (png_of(sheet_of([frame.convert("RGB") for frame in clip])) for clip in (self.before, self.after))
        films = [(self.before_label, first), (self.after_label, second)]
        words = self.words or f"{self.before_label} and {self.after_label}"
        size, num = self.before[0].size, len(self.before)
        body = player_html(films, num, size, words=words, difference=True, score=self._score())
        name = f"dqtk-{secrets.token_hex(4)}"
        script = f"(()=>{{{asset('player.js')}\nwire(document.querySelector('#{name} .player'));}})()"
        return f'<div id="{name}" style="max-width:40rem"><style>{asset("player.css")}</style>{body}<script>{script}</script></div>'

    def _score(self) -> FrameValues | None:
        """PSNR per frame, for the line above the scrubber."""
        pairs = zip(self.before, self.after, strict=True)
        errors = [
            float(np.square(np.asarray(a.convert("RGB"), dtype=np.float64) - np.asarray(b.convert("RGB"))).mean()) for a, b in pairs
        ]
        return FrameValues(name="PSNR", values=tuple(10 * math.log10(255**2 / e) if e else math.inf for e in errors), unit="dB")
