"""What of an unfinished piece of work is done already: one line of JSON per layer, on the disk before the next layer begins.

Every process writes a file of its own; together they are the journal. A last line that was cut off by a crash does not count, and
its layer is done again. ``task.json`` beside them says what the work is, so that it is never continued by another command.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from .sources import read_json

TASK = "task.json"


def claim(folder: Path, task: Mapping[str, Any], verb: str = "quantize") -> bool:
    """Make the folder of this work of a verb, or find it again; returns whether it was there.

    Raises:
        ValueError: the folder is that of other work.
    """
    if not (folder / TASK).exists() and not (folder.exists() and any(folder.iterdir())):
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(folder / TASK, json.dumps(task, indent=1))
        return False
    found = read_json(folder / TASK, verb) if (folder / TASK).is_file() else {}
    wanted = json.loads(json.dumps(task))
    if found != wanted:
        given = found if isinstance(found, dict) else {}
        different = ", ".join(sorted(field for field in {*wanted, *given} if given.get(field) != wanted.get(field)))
        raise ValueError(
            f"{verb}: {folder} must be the unfinished work of this command, got another's (different: {different}). "
            "Run that command again to finish it, remove the folder, or choose another output."
        )
    return True


def _write_whole(path: Path, text: str) -> None:
    partial = path.parent.with_name(f"{path.parent.name}.partial")  # beside the folder, which stays empty until the file is whole
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def done(folder: Path, verb: str = "quantize") -> dict[str, dict[str, Any]]:
    """Layer -> what was recorded of it, by all processes of all runs. Raises ``ValueError`` for a damaged line inside a file."""
    found = {}
    for file in sorted(folder.glob("done-*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):  # what follows the last line end was cut off
            try:
                row = json.loads(line)
                found[row.pop("layer")] = row
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{verb}: {file}, line {number}, must be a record of a finished layer, got: {error}. "
                    f"Remove {folder} to begin again."
                ) from error
    return found


class Journal:
    """The file of one process; a context manager."""

    def __init__(self, folder: Path, rank: int):
        self.path = folder / f"done-{rank}.jsonl"
        self.stream: IO[bytes] = self.path.open("ab")
        text = self.path.read_bytes()
        self.stream.truncate(text.rfind(b"\n") + 1)  # a line that was cut off would spoil the next

    def record(self, layer: str, fields: Mapping[str, Any]) -> None:
        """Say that a layer is done; it is on the disk when this returns."""
        self.stream.write(json.dumps({"layer": layer, **fields}, separators=(",", ":")).encode() + b"\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()
