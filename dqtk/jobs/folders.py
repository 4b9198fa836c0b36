"""Folders of pictures that no job of this process painted: which belong together, and what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .features import Picture, clip_of
from .files import read_json, read_json_lines, sha256

IMAGE_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")
CHUNK = 32  # pictures per feature file of folders, whose batches no job has cut


def folder_pictures(folder: str | Path) -> list[Picture]:
    """Pictures of a folder by name. Prompts come from beside them: from ``prompts.jsonl`` (``dqtk generate`` writes it) or
    the manifests of a job (``batch-0000.json``). Where those say of which clips the pictures are frames: clips by name.

    Raises:
        ValueError: no folder, no picture in it, video files, two of one name, or unreadable notes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"pictures: folder must exist, got {folder}. Check the path.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
    videos = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
    if videos:
        raise ValueError(
            f"pictures: {folder} must hold the frames of clips as pictures, got {len(videos)} video files, such as {videos[0]}. "
            "Their codec would be scored as error, and hides some: keep frames as PNG, as dqtk generate does."
        )
    if not files:
        raise ValueError(f"pictures: {folder} must hold pictures ({', '.join(IMAGE_SUFFIXES)}), got none. Check the path.")
    by_name: dict[str, Path] = {}
    for file in files:
        if (other := by_name.setdefault(file.stem, file)) != file:
            raise ValueError(f"pictures: names in {folder} must differ, got {other.name} and {file.name}. Remove one.")
    known, clips = _notes_beside(folder)
    pictures = [
        Picture(id=file.stem, prompt=known.get(file.stem), prompt_index=index, file=file, sha256=sha256(file))
        for index, file in enumerate(files)
    ]
    return _as_clips(folder, pictures, clips) if clips else pictures


def _as_clips(folder: Path, pictures: Sequence[Picture], clips: Mapping[str, Sequence[str]]) -> list[Picture]:
    """``clips``: name -> names of its frames in order. Raises ``ValueError`` where frames are missing and for other pictures."""
    by_name = {picture.id: picture for picture in pictures}
    missing = [frame for frames in clips.values() for frame in frames if frame not in by_name]
    if missing:
        raise ValueError(
            f"pictures: {folder} must hold every frame that is noted beside them, got {len(missing)} missing, first {missing[0]}. "
            "Copy the folder again."
        )
    extra = sorted(set(by_name) - {frame for frames in clips.values() for frame in frames})
    if extra:
        raise ValueError(
            f"pictures: {folder} must hold clips only, got {len(extra)} other pictures, first {extra[0]}. Remove them."
        )
    samples = [clip_of([by_name[frame] for frame in frames], name) for name, frames in sorted(clips.items())]
    return [replace(sample, prompt_index=index) for index, sample in enumerate(samples)]


def _notes_beside(folder: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Prompts by picture, and the frames of each clip in order; both empty where nothing is noted."""
    file = folder / "prompts.jsonl"
    rows = read_json_lines(file) if file.is_file() else []
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("prompt"), str)):
            raise ValueError(f'pictures: {file}:{number} must be {{"id": ..., "prompt": ...}}, got {row!r:.60}. Mend the line.')
    found = {row["id"]: row["prompt"] for row in rows}
    clips: dict[str, list[str]] = {}
    for row in rows:
        if isinstance(row.get("clip"), str):
            clips.setdefault(row["clip"], []).append(row["id"])
    for manifest in sorted(folder.glob("batch-*.json")):
        data: Any = read_json(manifest)
        try:
            for row in data["samples"]:
                names = [Path(frame["file"]).stem for frame in row.get("frames", ())]
                clips |= {row["id"]: names} if names else {}
                found |= dict.fromkeys(names or [row["id"]], row["prompt"])
        except (TypeError, KeyError) as error:
            raise ValueError(f"pictures: {manifest} must be a job's manifest, got one without {error}. Remove it.") from error
    return found, clips


def folder_batches(folder: str | Path) -> list[list[Picture]]:
    """The pictures of a folder in chunks."""
    return chunks(folder_pictures(folder))


def chunks(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """In groups that one feature file holds."""
    return [list(pictures[start : start + CHUNK]) for start in range(0, len(pictures), CHUNK)]
