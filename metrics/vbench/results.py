"""VBench's result files, read and written as its own program does.

``NAME_eval_results.json`` holds per dimension ``[score, [{"video_path": ..., "video_results": ...}, ...]]``,
``NAME_full_info.json`` the entries of the suite with their ``video_list``. What else there is to say of a run goes into
``NAME_dqtk_provenance.json``: an unknown key in the results would be taken for a dimension.

Of imaging quality the program writes 0 to 100 per video and a fraction in total; here every number is a fraction. Verdicts that
are no numbers (some versions write lists per frame) are kept as None.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .suite import DIMENSIONS, Entry, video_name

_PERCENT = ("imaging_quality",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """One dimension: its raw score, and that of each video by base name (None: no number)."""

    score: float
    videos: Mapping[str, float | None]


def read_results(path: str | Path) -> dict[str, Scored]:
    """Dimensions of an ``_eval_results.json``. Raises ``ValueError`` that names the file and what is wrong in it."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"vbench: file must exist, got {path}. It is VBench's NAME_eval_results.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"vbench: {path} must be JSON, got: {error}. Write it again.") from error
    if not isinstance(data, dict) or not data:
        raise ValueError(f"vbench: {path} must map dimensions to [score, videos], got {type(data).__name__}. See docs/video.md.")
    return {key.replace(" ", "_"): _scored(key.replace(" ", "_"), value, f"{path}: {key}") for key, value in data.items()}


def _scored(name: str, value: Any, where: str) -> Scored:
    if name not in DIMENSIONS:
        raise ValueError(f"vbench: {where} must be one of VBench's 16 dimensions, got {name!r}. VBench-2.0 and I2V have others.")
    if not (isinstance(value, list) and len(value) == 2 and _is_number(value[0]) and isinstance(value[1], list)):
        raise ValueError(f"vbench: {where} must be [score, videos], got {value!r:.60}. Write the file again.")
    videos: dict[str, float | None] = {}
    for row in value[1]:
        if not (isinstance(row, dict) and isinstance(row.get("video_path"), str) and "video_results" in row):
            raise ValueError(f"vbench: {where} must list video_path and video_results, got {row!r:.60}. Write the file again.")
        base = row["video_path"].replace("\\", "/").rpartition("/")[2]
        if base in videos:
            raise ValueError(f"vbench: {where} must have each video once, got {base!r} twice. Write the file again.")
        found = row["video_results"]
        scale = 100 if name in _PERCENT else 1
        videos[base] = float(found) / scale if _is_number(found) or isinstance(found, bool) else None
    return Scored(score=float(value[0]), videos=videos)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def combined(parts: Sequence[Mapping[str, Scored]]) -> dict[str, Scored]:
    """Dimensions of several files of one model, such as own ones and those of VBench's program. Raises ``ValueError`` for one
    twice."""
    found: dict[str, Scored] = {}
    for part in parts:
        twice = sorted(set(found) & set(part))
        if twice:
            raise ValueError(f"vbench: every dimension must come from one file, got {', '.join(twice)} twice. Leave one file out.")
        found |= part
    return found


def write_results(
    folder: str | Path,
    name: str,
    results: Mapping[str, Scored],
    entries: Sequence[Entry],
    videos: str | Path,
    num_videos: int,
    provenance: Mapping[str, Any],
) -> list[Path]:
    """The three files of one model; each appears whole. ``videos``: folder of ``PROMPT-0.mp4`` and so on, ``num_videos`` per
    prompt.

    Raises ``ValueError`` for a prompt that cannot be a file's name.
    """
    place = Path(os.path.abspath(videos))
    full = []
    for entry in entries:
        files = [str(place / video_name(entry.prompt, index)) for index in range(num_videos)]
        row: dict[str, Any] = {"prompt_en": entry.prompt, "dimension": list(entry.dimensions)}
        row |= {"auxiliary_info": dict(entry.auxiliary)} if entry.auxiliary else {}
        full.append(row | {"video_list": files})
    found = {dimension: [scored.score, _rows(dimension, scored, place)] for dimension, scored in results.items()}
    contents = {"full_info": full, "eval_results": found, "dqtk_provenance": dict(provenance)}
    return [_write(Path(folder) / f"{name}_{kind}.json", data) for kind, data in contents.items()]


def _rows(dimension: str, scored: Scored, place: Path) -> list[dict[str, Any]]:
    scale = 100 if dimension in _PERCENT else 1
    rows = []
    for base, value in scored.videos.items():
        if value is not None:
            told = bool(value) if dimension == "dynamic_degree" else value * scale
            rows.append({"video_path": str(place / base), "video_results": told})
    return rows


def _write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
