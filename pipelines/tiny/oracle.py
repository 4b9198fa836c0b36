"""Reads a picture of the small world back from its pixels and says whether it shows what the caption asked for.

An analysis by synthesis: objects are the connected saturated regions; each attribute is decided by comparison with what the world
could have drawn (templates of the shapes, the palette, the background tones). Every attribute gets a probability for every value
(a softmax over a distance in pixels, hue or intersection-over-union), so the score is graded: the caption's value earns its
probability, and "all correct" asks that it be the most probable one for every attribute. Clean renders score about 1; noise scores
near chance. The oracle sees pixels only, never a file name or metadata.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    Relation,
    Scene,
    Several,
    Single,
    background_tone,
    coverage,
    parse_caption,
)

MIN_CHROMA = 0.16  # of max - min over RGB in [0, 1]; JPEG at quality 50 leaves at most 0.1 on grey stripes
MIN_AREA = 24  # pixels; the smallest object (a small cross) covers about 110
TEMPLATE = 24  # side of the normalized shape templates, pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One object read from a picture: centre in pixels (x, y), longer side in pixels, probabilities of shape and colour."""

    centre: tuple[float, float]
    extent: float
    shape: dict[str, float]
    colour: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the oracle saw: objects from left to right, and the probabilities of each background."""

    objects: tuple[Found, ...]
    background: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Score of one picture against one caption. ``attributes`` maps attribute -> probability in [0, 1] of the asked value."""

    attributes: dict[str, float]
    correct: dict[str, bool]

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.attributes.values())))

    @property
    def all_correct(self) -> bool:
        return all(self.correct.values())


def softmin(distances: dict[str, float], temperature: float) -> dict[str, float]:
    """Probabilities that fall with the distance: its softmax with the sign turned."""
    values = -np.asarray(list(distances.values()), dtype=np.float64) / temperature
    weights = np.exp(values - values.max())
    return dict(zip(distances, (weights / weights.sum()).tolist(), strict=True))


@lru_cache(maxsize=1)
def _templates() -> dict[str, np.ndarray]:
    templates = {}
    for shape in SHAPES + DIGITS:
        alpha = coverage(shape, (48, 48), 72.0, canvas=96)
        templates[shape] = _normalize(alpha, alpha > 0.5)
    return templates


def _normalize(alpha: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Crop to the region's bounding box, pad to a square, resize to TEMPLATE x TEMPLATE (box filter)."""
    rows, cols = np.nonzero(region.any(1))[0], np.nonzero(region.any(0))[0]
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    side = max(y1 - y0, x1 - x0)
    square = np.zeros((side, side), dtype=np.float32)
    top, left = (side - (y1 - y0)) // 2, (side - (x1 - x0)) // 2
    square[top : top + y1 - y0, left : left + x1 - x0] = (alpha * region)[y0:y1, x0:x1]
    resized = Image.fromarray(square).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    return np.asarray(resized).clip(0, 1)


def _read_object(rgb: np.ndarray, chroma: np.ndarray, region: np.ndarray, tone: np.ndarray) -> Found:
    solid = region & (chroma >= np.quantile(chroma[region], 0.6))
    mean = rgb[solid].mean(axis=0)
    colour = softmin({name: float(np.linalg.norm(mean - np.asarray(value) / 255)) for name, value in COLOURS.items()}, 0.06)
    # Coverage by projection on the line background -> colour: unlike chroma, luma survives JPEG's subsampling.
    toward = mean - tone[..., None]
    alpha = np.clip(((rgb - tone[..., None]) * toward).sum(axis=2) / (toward**2).sum(axis=2), 0, 1)
    near = ndimage.binary_dilation(region, iterations=1)
    body = near & (alpha >= 0.5) if (near & (alpha >= 0.5)).any() else region
    crop = _normalize(alpha, body)
    overlap = {
        name: 1 - float(np.minimum(crop, template).sum() / max(np.maximum(crop, template).sum(), 1e-6))
        for name, template in _templates().items()
    }
    weight = alpha * near
    extent = max(float(weight.max(axis=1).sum()), float(weight.max(axis=0).sum()))
    y, x = np.nonzero(body)
    centre = (float(x.min() + x.max() + 1) / 2, float(y.min() + y.max() + 1) / 2)
    return Found(centre=centre, extent=extent, shape=softmin(overlap, 0.025), colour=colour)


def read(image: Image.Image | np.ndarray) -> Reading:
    """Read a 64x64 RGB picture (PIL image or uint8 array [64, 64, 3]). Raises ``ValueError`` for any other shape."""
    rgb8 = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if rgb8.shape != (SIZE, SIZE, 3) or rgb8.dtype != np.uint8:
        raise ValueError(f"oracle.read: image must be uint8 RGB 64x64, got {rgb8.dtype} of shape {rgb8.shape}. Resize it first.")
    rgb = rgb8.astype(np.float32) / 255
    chroma = rgb.max(axis=2) - rgb.min(axis=2)
    labels, num = ndimage.label(chroma >= MIN_CHROMA, structure=np.ones((3, 3)))
    regions = [labels == i for i in range(1, num + 1)]
    regions = [region for region in regions if region.sum() >= MIN_AREA]
    grey = ~ndimage.binary_dilation(chroma >= MIN_CHROMA, iterations=2)
    if grey.sum() < MIN_AREA:
        grey = np.ones_like(grey)
    luma = rgb.mean(axis=2) * 255
    error = {name: float(np.abs(luma - background_tone(name))[grey].mean()) for name in BACKGROUNDS}
    tone = background_tone(min(error, key=error.get)) / 255
    objects = tuple(sorted((_read_object(rgb, chroma, region, tone) for region in regions), key=lambda o: o.centre))
    return Reading(objects=objects, background=softmin(error, 8.0))


def _spread(values: dict, wanted) -> tuple[float, bool]:
    return values[wanted], max(values, key=values.get) == wanted


def _best(objects: tuple[Found, ...], shape: str, colour: str) -> Found | None:
    return max(objects, key=lambda o: o.shape[shape] + o.colour[colour], default=None)


def judge(image: Image.Image | np.ndarray, caption: str | Scene) -> Verdict:
    """Score a picture against a caption of the grammar (or its scene)."""
    scene = parse_caption(caption) if isinstance(caption, str) else caption
    reading = read(image)
    graded: dict[str, tuple[float, bool]] = {"background": _spread(reading.background, scene.background)}
    wanted_count = scene.count if isinstance(scene, Several) else 2 if isinstance(scene, Relation) else 1
    wrong_by = abs(len(reading.objects) - wanted_count)
    graded["count"] = (float(0.25**wrong_by) if wrong_by else 1.0, wrong_by == 0)
    if isinstance(scene, Single):
        found = _best(reading.objects, scene.shape, scene.colour)
        if found is None:
            graded |= dict.fromkeys(("shape", "colour", "size", "position"), (0.0, False))
        else:
            sizes = {name: abs(found.extent - _drawn_extent(scene.shape, value)) for name, value in SIZES.items()}
            places = {name: float(np.hypot(found.centre[0] - x, found.centre[1] - y)) for name, (x, y) in POSITIONS.items()}
            graded["shape"] = _spread(found.shape, scene.shape)
            graded["colour"] = _spread(found.colour, scene.colour)
            graded["size"] = _spread(softmin(sizes, 1.5), scene.size)
            graded["position"] = _spread(softmin(places, 3.0), scene.position)
    elif isinstance(scene, Several):
        for name, wanted in (("shape", scene.shape), ("colour", scene.colour)):
            each = [_spread(getattr(found, name), wanted) for found in reading.objects] or [(0.0, False)]
            graded[name] = (float(np.mean([p for p, _ in each])), all(ok for _, ok in each))
    else:
        graded |= _judge_relation(reading.objects, scene)
    return Verdict(attributes={k: p for k, (p, _) in graded.items()}, correct={k: ok for k, (_, ok) in graded.items()})


def _drawn_extent(shape: str, size: float) -> float:
    return size * (0.92 if shape == "square" else 1.0)


def _judge_relation(objects: tuple[Found, ...], scene: Relation) -> dict[str, tuple[float, bool]]:
    names = ("shape", "colour", "other shape", "other colour", "relation")
    if len(objects) < 2:
        first = _best(objects, scene.shape, scene.colour)
        if first is None:
            return dict.fromkeys(names, (0.0, False))
        seen = {"shape": _spread(first.shape, scene.shape), "colour": _spread(first.colour, scene.colour)}
        return dict.fromkeys(names, (0.0, False)) | seen

    def fit(a: Found, b: Found) -> float:
        return a.shape[scene.shape] + a.colour[scene.colour] + b.shape[scene.other_shape] + b.colour[scene.other_colour]

    a, b = max(((a, b) for a in objects for b in objects if a is not b), key=lambda pair: fit(*pair))
    dx, dy = a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]
    along = {name: -(dx * rx + dy * ry) for name, (rx, ry) in RELATIONS.items()}
    return {
        "shape": _spread(a.shape, scene.shape),
        "colour": _spread(a.colour, scene.colour),
        "other shape": _spread(b.shape, scene.other_shape),
        "other colour": _spread(b.colour, scene.other_colour),
        "relation": _spread(softmin(along, 5.0), scene.relation),
    }
