"""What workers say of samples, kept in OUTPUT/cache/workers under the worker's command and the sample's contents, prompt included.

A worker that fails leaves a note instead of values, and its score is "not measured" with that reason: hours of other scores are not
lost to somebody else's package. The next run asks again for what is missing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .features import Picture
from .files import key_of, write_json
from .worker import Greeting, Sample, Worker, WorkerError

_CHUNK = 8  # samples per question


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """A worker's values of some samples, and what it said of itself."""

    by: Greeting
    values: list[float]


def ask(cache: Path, name: str, command: str, samples: Sequence[Picture], rank: int) -> None:
    """Have the worker score what is not there yet; it is started only for that. A failure becomes a note of this process."""
    note = cache / "workers" / f"{name}-{rank}.failed.json"
    note.unlink(missing_ok=True)
    with Worker(name, command) as worker:
        todo = [sample for sample in samples if _read(_file(cache, worker.identity, sample)) is None]
        try:
            for start in range(0, len(todo), _CHUNK):
                part = todo[start : start + _CHUNK]
                asked = [Sample(files=_files(sample), prompt=sample.prompt) for sample in part]
                for sample, value in zip(part, worker.values(asked), strict=True):
                    write_json(_file(cache, worker.identity, sample), {"value": value, "by": asdict(worker.greeting)})
        except WorkerError as error:
            write_json(note, {"why": str(error)})


def answers(cache: Path, name: str, command: str, samples: Sequence[Picture]) -> Answers | str:
    """The worker's values of these samples; or why some are missing."""
    identity = Worker(name, command).identity
    found = [_read(_file(cache, identity, sample)) for sample in samples]
    if all(row is not None for row in found):
        return Answers(by=Greeting(**found[0]["by"]), values=[row["value"] for row in found])
    notes = sorted((cache / "workers").glob(f"{name}-*.failed.json"), key=lambda path: path.stat().st_mtime)
    missing = sum(row is None for row in found)
    return str((_json(notes[-1]) or {}).get("why")) if notes else f"worker {name}: {missing} of {len(found)} samples have no value"


def _files(sample: Picture) -> tuple[Path, ...]:
    return tuple(frame.file for frame in sample.frames) or (sample.file,)


def _file(cache: Path, identity: str, sample: Picture) -> Path:
    return cache / "workers" / f"{key_of(identity, sample.sha256, json.dumps(sample.prompt))}.json"


def _read(path: Path) -> Any:
    """What is kept of a sample; None where it is not there, or not whole."""
    data = _json(path)
    whole = isinstance(data, Mapping) and isinstance(data.get("value"), (int, float)) and math.isfinite(data["value"])
    return data if whole and isinstance(data.get("by"), Mapping) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
