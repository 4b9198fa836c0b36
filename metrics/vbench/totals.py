"""VBench's quality, semantic and total score from the raw scores of its 16 dimensions.

As the published program adds up (and its leaderboard shows): a raw score is stretched from a range of its dimension to 0..1;
quality is the weighted mean of seven dimensions (dynamic degree counts half), semantic the mean of nine, and the total (4 quality
+ semantic) / 5.

One departure: the published program takes a missing dimension for a raw score of 0, which is far below the range of some (temporal
flickering becomes -1.7), and prints a total all the same. Eight dimensions of a good model so have a "total" of 0.34. Here a group
with a missing dimension has no score.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .suite import DIMENSIONS, QUALITY, SEMANTIC

RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}  # of the others: 0 to 1
WEIGHTS = {"dynamic_degree": 0.5}  # of the others: 1
_QUALITY_SHARE, _SEMANTIC_SHARE = 4, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Quality, semantic and total score, each None where one of its dimensions is ``missing``.

    ``mean_of_reported``: the plain mean of the *raw* scores that there are, ``reported``. It is none of VBench's numbers, depends
    on which dimensions were measured, and may stand only beside a mean of the same ones.
    """

    quality: float | None
    semantic: float | None
    total: float | None
    missing: tuple[str, ...]
    reported: tuple[str, ...]
    mean_of_reported: float | None


def normalized(dimension: str, raw: float) -> float:
    """A raw score on its dimension's range. Not clamped: a score outside is outside, as in the published program."""
    low, high = RANGES.get(dimension, (0.0, 1.0))
    return (raw - low) / (high - low)


def totals(raw: Mapping[str, float]) -> Totals:
    """From raw scores by dimension, each a fraction (imaging quality too, which VBench prints per video as 0 to 100).

    Raises ``ValueError`` for an unknown dimension, NaN, and a number above 1, which is a percentage.
    """
    for name, value in raw.items():
        if name not in DIMENSIONS:
            raise ValueError(f"vbench: dimension must be one of {', '.join(DIMENSIONS)}, got {name!r}. Check the spelling.")
        if not math.isfinite(value) or value > 1:
            raise ValueError(f"vbench: {name} must be a fraction of at most 1, got {value}. Divide percentages by 100.")
    quality, semantic = (_group(raw, group) for group in (QUALITY, SEMANTIC))
    total = None
    if quality is not None and semantic is not None:
        total = (_QUALITY_SHARE * quality + _SEMANTIC_SHARE * semantic) / (_QUALITY_SHARE + _SEMANTIC_SHARE)
    reported = tuple(name for name in DIMENSIONS if name in raw)
    return Totals(
        quality=quality,
        semantic=semantic,
        total=total,
        missing=tuple(name for name in DIMENSIONS if name not in raw),
        reported=reported,
        mean_of_reported=sum(raw[name] for name in reported) / len(reported) if reported else None,
    )


def _group(raw: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    if any(name not in raw for name in names):
        return None
    weights = {name: WEIGHTS.get(name, 1.0) for name in names}
    return sum(weights[name] * normalized(name, raw[name]) for name in names) / sum(weights.values())
