"""Files that exist whole or not at all, and know their contents."""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` that becomes it at the end, or vanishes on any failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole."""
    with whole(path) as partial:
        partial.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole; NaN is an error."""
    write_bytes(path, (json.dumps(data, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """JSON of a file that a job wrote. Raises ``ValueError`` that names a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}. Remove it and run again.") from error


def cached_json(path: Path, make: Callable[[], Any], fits: Callable[[Any], bool]) -> Any:
    """The JSON of a cache file if it is there, whole and ``fits``; else what ``make`` returns, written there."""
    if path.is_file():
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            data = None
        if fits(data):
            return data
    data = make()
    write_json(path, data)
    return data


def read_json_lines(path: Path) -> list[Any]:
    """Every line of a JSON-lines file. Raises ``ValueError`` that names file and line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: line must be JSON, got: {error}. Mend or remove the file.") from error
    return found


def sha256(data: bytes | Path) -> str:
    """64 hex digits of bytes or of a file's."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with data.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(*parts: str) -> str:
    """16 hex digits that name what was made from these parts."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def remove_partials(folder: Path, mine: Callable[[Path], bool] = lambda path: True) -> None:
    """Remove what a killed process left half-written (``whole``'s temporary names)."""
    for path in folder.rglob(".*.partial"):
        if path.is_file() and mine(path):
            path.unlink(missing_ok=True)
