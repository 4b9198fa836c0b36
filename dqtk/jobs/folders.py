"""Folders of pictures that no job of this process painted: which belong together, and what they show."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .features import Picture
from .files import read_json, read_json_lines, sha256

IMAGE_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
CHUNK = 32  # pictures per feature file of folders, whose batches no job has cut


def folder_pictures(folder: str | Path) -> list[Picture]:
    """Pictures of a folder by name. Prompts come from beside them: from ``prompts.jsonl`` (``dqtk generate`` writes it) or
    the manifests of a job (``batch-0000.json``).

    Raises:
        ValueError: no folder, no picture in it, two of one name, or unreadable notes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"pictures: folder must exist, got {folder}. Check the path.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))
    if not files:
        raise ValueError(f"pictures: {folder} must hold pictures ({', '.join(IMAGE_SUFFIXES)}), got none. Check the path.")
    by_name: dict[str, Path] = {}
    for file in files:
        if (other := by_name.setdefault(file.stem, file)) != file:
            raise ValueError(f"pictures: names in {folder} must differ, got {other.name} and {file.name}. Remove one.")
    known = _prompts_beside(folder)
    return [
        Picture(id=file.stem, prompt=known.get(file.stem), prompt_index=index, file=file, sha256=sha256(file))
        for index, file in enumerate(files)
    ]


def _prompts_beside(folder: Path) -> dict[str, str]:
    file = folder / "prompts.jsonl"
    rows = read_json_lines(file) if file.is_file() else []
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("prompt"), str)):
            raise ValueError(f'pictures: {file}:{number} must be {{"id": ..., "prompt": ...}}, got {row!r:.60}. Mend the line.')
    found = {row["id"]: row["prompt"] for row in rows}
    for manifest in sorted(folder.glob("batch-*.json")):
        data: Any = read_json(manifest)
        try:
            found |= {row["id"]: row["prompt"] for row in data["samples"]}
        except (TypeError, KeyError) as error:
            raise ValueError(f"pictures: {manifest} must be a job's manifest, got one without {error}. Remove it.") from error
    return found


def folder_batches(folder: str | Path) -> list[list[Picture]]:
    """The pictures of a folder in chunks."""
    return chunks(folder_pictures(folder))


def chunks(pictures: Sequence[Picture]) -> list[list[Picture]]:
    """In groups that one feature file holds."""
    return [list(pictures[start : start + CHUNK]) for start in range(0, len(pictures), CHUNK)]
