"""Scores of single clips: from their frames (``ClipScore``, kept in OUTPUT/cache/clips), or from rows per frame (``FrameScore``).

A value is None where a clip is not among those that its score is of: a suite measures a dimension on its own prompts only, and a
score may refuse a clip (flickering is of still scenes).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dqtk.report import environment
from dqtk.report.scores import identity, one_number

from .features import Picture, read_pictures
from .files import cached_json, key_of


def score_clip(cache: Path, score: Any, tool: Any, clip: Picture, fps: float | None) -> float | None:
    """A ``ClipScore`` of one clip by ``tool`` (None: it needs none), from the cache where it is there and whole."""
    if score.name in clip.left_out:
        return None
    by = identity(tool) if tool is not None else f"torch {environment.versions()['torch']}"
    rate = f"{fps:g}" if score.needs_fps and fps is not None else ""
    key = key_of(score.name, score.version, by, rate, *(frame.sha256 for frame in clip.frames))

    def make() -> float | None:
        return _number(score, clip, score.function(read_pictures(clip.frames), fps, tool))

    def fits(data: Any) -> bool:
        value = data.get("value", "") if isinstance(data, dict) else ""
        return value is None or (isinstance(value, (int, float)) and math.isfinite(value))

    return cached_json(cache / "clips" / f"{key}.json", lambda: {"value": make()}, fits)["value"]


def score_frames(
    score: Any, clips: Sequence[Picture], rows: Sequence[Tensor], text_of: Callable[[str], Tensor]
) -> list[float | None]:
    """A ``FrameScore`` of every clip, from its rows [F, D]; ``text_of`` gives a text's embedding [D]."""
    found: list[float | None] = []
    for clip, mine in zip(clips, rows, strict=True):
        if score.name in clip.left_out:
            found.append(None)
            continue
        text = text_for(score, clip)
        found.append(_number(score, clip, score.function(mine, None if text is None else text_of(text)[None])))
    return found


def text_for(score: Any, clip: Picture) -> str | None:
    """The text that a score compares a clip with, if it wants one."""
    wanted = getattr(score, "text", None)
    return None if wanted is None or score.name in clip.left_out else getattr(clip, wanted)


def unfit_clips(score: Any, pictures: Sequence[Picture], fps: float | None) -> str | None:
    """Why a score of clips cannot be taken of these samples, if it cannot."""
    if not pictures[0].frames:
        return f"{score.label} needs clips, got pictures"
    mine = [clip for clip in pictures if score.name not in clip.left_out]
    if not mine:
        return f"{score.label} needs prompts of the suite that have it among their dimensions, got none"
    if getattr(score, "needs_fps", False) and fps is None:
        return f"{score.label} needs the frame rate that the clips are made for, got none; set fps, --fps"
    short = min(len(clip.frames) for clip in mine)
    if short < score.least:
        return f"{score.label} needs at least {score.least} frames, got {short}"
    wanted = getattr(score, "text", None)
    without = [clip.id for clip in mine if wanted is not None and not getattr(clip, wanted)]
    return f"{score.label} needs the {wanted} of every clip, got none for {len(without)}, such as {without[0]}" if without else None


def _number(score: Any, clip: Picture, value: Any) -> float | None:
    if value is None:
        return None
    found = one_number(score.name, score.function, value)
    if not math.isfinite(found):
        raise ValueError(f"{score.name} of {clip.id} must be a finite number, got {found}. Look at that clip.")
    return found
