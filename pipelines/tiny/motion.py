"""The captioned world in motion, for the embedded video pipeline: 17 frames of 64x64, one object on a straight way.

"a small red circle moving right quickly on a striped background": shape, colour, size, direction, speed and background are named;
where the object is, is not. Everything is derived from ``(seed, index)``; one combination in ten is held out, as in ``scenes``. The
oracle reads the frames one by one, and the way from the places of the object in them.
"""

import hashlib
import itertools
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .oracle import Verdict, read, softmin
from .scenes import BACKGROUNDS, COLOURS, SHAPES, SIZE, background_tone, coverage

FRAMES = 17
SIZES = {"small": 14.0, "medium": 22.0}  # pixels, the longer side
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
SPEEDS = {"slowly": 0.75, "quickly": 2.0}  # pixels per frame
WAY = FRAMES - 1  # steps between the first and the last frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Moving:
    """One object that moves straight and evenly."""

    shape: str
    colour: str
    size: str
    direction: str
    speed: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} moving {self.direction} {self.speed} on a {self.background} background"


def is_held_out(clip: Moving) -> bool:
    """Whether this combination of attributes is kept away from training (one in ten, by SHA-256 of the attributes)."""
    text = "Moving" + repr(sorted(asdict(clip).items()))
    return hashlib.sha256(text.encode()).digest()[0] < 26


@lru_cache(maxsize=1)
def _all() -> dict[str, Moving]:
    values = (SHAPES, COLOURS, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS)
    names = ("shape", "colour", "size", "direction", "speed", "background")
    clips = [Moving(**dict(zip(names, row, strict=True))) for row in itertools.product(*values)]
    return {clip.caption: clip for clip in clips}


def sample_clip(seed: int, index: int, split: str = "train") -> Moving:
    """The clip number ``index`` of stream ``seed``. ``split`` is "train" or "heldout"; the two never share a combination."""
    if split not in ("train", "heldout"):
        raise ValueError(f"sample_clip: split must be 'train' or 'heldout', got {split!r}.")
    rng, clips = np.random.default_rng([seed, index, 2]), list(_all().values())
    while True:
        clip = clips[int(rng.integers(len(clips)))]
        if is_held_out(clip) == (split == "heldout"):
            return clip


def captions(num: int, seed: int = 0, split: str = "heldout") -> list[str]:
    """``num`` captions for prompts; held-out combinations unless asked otherwise."""
    return [sample_clip(seed, i, split).caption for i in range(num)]


def parse_caption(caption: str) -> Moving:
    """The clip that a caption of this grammar describes. Raises ``ValueError`` for any other text."""
    if caption not in _all():
        raise ValueError(
            f"parse_caption: caption must follow the grammar of pipelines/tiny/motion.py, got {caption!r}. "
            "Use captions(num) to draw some."
        )
    return _all()[caption]


def suite(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """``num`` held-out captions as a suite of prompts in VBench's format; ``motion_suite.json`` is ``suite(24)``.

    Everything moves, so nothing is asked about flickering; the style of a clip is its background.
    """
    dimensions = ["subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality"]
    dimensions += ["imaging_quality", "appearance_style", "temporal_style", "overall_consistency"]
    clips = [sample_clip(seed, i, "heldout") for i in range(num)]
    told = [{"appearance_style": {"appearance_style": f"a {clip.background} background"}} for clip in clips]
    return [
        {"prompt_en": clip.caption, "dimension": dimensions, "auxiliary_info": info} for clip, info in zip(clips, told, strict=True)
    ]


def centres(clip: Moving, rng: np.random.Generator) -> np.ndarray:
    """Places of the object in all frames: [FRAMES, 2], x and y in pixels; the whole way lies inside the picture."""
    (dx, dy), speed, half = DIRECTIONS[clip.direction], SPEEDS[clip.speed], SIZES[clip.size] / 2 + 1
    travel = speed * WAY
    start = rng.uniform(half, SIZE - half - travel)
    along = start + speed * np.arange(FRAMES)
    along = along if dx + dy > 0 else SIZE - along
    across = np.full(FRAMES, rng.uniform(half + 4, SIZE - half - 4))
    return np.stack([along, across] if dx else [across, along], axis=1)


def render(clip: Moving, seed: int = 0, index: int = 0) -> np.ndarray:
    """Paint the clip: uint8 RGB [FRAMES, 64, 64, 3]. ``(seed, index)`` fixes where the object is."""
    places = centres(clip, np.random.default_rng([seed, index, 3]))
    ground = np.repeat(background_tone(clip.background)[..., None], 3, axis=2)
    colour = np.asarray(COLOURS[clip.colour], dtype=np.float32)
    frames = []
    for x, y in places:
        alpha = coverage(clip.shape, (float(x), float(y)), SIZES[clip.size])[..., None]
        frames.append(np.rint(ground * (1 - alpha) + colour * alpha).astype(np.uint8))
    return np.stack(frames)


def judge(frames: np.ndarray, caption: str | Moving) -> Verdict:
    """Score a clip against a caption of the grammar, or its scene.

    frames: uint8 RGB [F, 64, 64, 3], F at least 3. Graded like pictures: shape, colour, size and background are means over frames
    (0 where a frame shows no object), direction and speed are read from the straight line nearest to the object's places,
    smoothness from its distance to them, count is the share of frames with one object.
    """
    clip = parse_caption(caption) if isinstance(caption, str) else caption
    if frames.ndim != 4 or len(frames) < 3:
        raise ValueError(f"judge: frames must be [F, {SIZE}, {SIZE}, 3], F at least 3, got {list(frames.shape)}.")
    readings = [read(frame) for frame in frames]
    found = [max(reading.objects, key=lambda o: o.extent, default=None) for reading in readings]
    graded: dict[str, tuple[float, bool]] = {}
    for name in ("shape", "colour"):
        wanted = getattr(clip, name)
        rows = [getattr(o, name) for o in found if o is not None]
        graded[name] = _mean([row[wanted] for row in rows], len(frames)), _most(rows, len(frames)) == wanted
    sizes = [softmin({n: abs(o.extent - _extent(clip.shape, s)) for n, s in SIZES.items()}, 1.5) for o in found if o is not None]
    graded["size"] = _mean([row[clip.size] for row in sizes], len(frames)), _most(sizes, len(frames)) == clip.size
    grounds = [reading.background for reading in readings]
    graded["background"] = _mean([g[clip.background] for g in grounds], len(frames)), _most(grounds, len(frames)) == clip.background
    single = _mean([float(len(reading.objects) == 1) for reading in readings], len(frames))
    graded["count"] = single, single > 0.5
    graded |= _way([None if o is None else o.centre for o in found], clip)
    return Verdict(attributes={k: p for k, (p, _) in graded.items()}, correct={k: ok for k, (_, ok) in graded.items()})


def _way(places: list[tuple[float, float] | None], clip: Moving) -> dict[str, tuple[float, bool]]:
    """Direction, speed and smoothness of the way through these places, a frame each."""
    seen = [(number, *place) for number, place in enumerate(places) if place is not None]
    if len(seen) < 3:
        return dict.fromkeys(("direction", "speed", "smoothness"), (0.0, False))
    time, *axes = np.asarray(seen, dtype=np.float64).T
    lines = [np.polyfit(time, values, 1) for values in axes]
    rest = np.stack([values - np.polyval(line, time) for values, line in zip(axes, lines, strict=True)])
    velocity = np.asarray([line[0] for line in lines])
    # Distances are those of the end of the way, in pixels: a clip with fewer frames is as sure of its velocity per frame.
    directions = softmin({name: -WAY * float(velocity @ unit) for name, unit in DIRECTIONS.items()}, 3.0)
    speeds = softmin({name: WAY * abs(float(np.linalg.norm(velocity)) - speed) for name, speed in SPEEDS.items()}, 4.0)
    rough = float(np.sqrt((rest**2).sum(axis=0).mean()))
    return {
        "direction": (directions[clip.direction], max(directions, key=directions.get) == clip.direction),
        "speed": (speeds[clip.speed], max(speeds, key=speeds.get) == clip.speed),
        "smoothness": (float(np.exp(-((rough / 3) ** 2)) * len(seen) / len(places)), rough < 2 and len(seen) == len(places)),
    }


def _mean(values: list[float], num: int) -> float:
    return float(sum(values)) / num


def _most(rows: list[dict[str, float]], num: int) -> str | None:
    """The value with the largest sum of probabilities."""
    if not rows:
        return None
    return max(rows[0], key=lambda name: sum(row[name] for row in rows))


def _extent(shape: str, size: float) -> float:
    return size * (0.92 if shape == "square" else 1.0)
