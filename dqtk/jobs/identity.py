"""What made a picture, as hashes: a path or a hub id is only where a model lies today.

A pipeline's identity is over the contents of every file that it is loaded from. That is cheap where others have hashed already: a
safetensors file that dqtk wrote carries digests of all its tensors in its header, and a file of the hub's cache is named by its
SHA-256. Anything else is read once per process.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dqtk.checkpoint import DIGESTS
from dqtk.report import environment

from .files import key_of, sha256

_HASH = re.compile(r"[0-9a-f]{64}")
_IGNORED = (".md", ".png", ".jpg", ".gif", ".mp4")  # cards and samples, which no pipeline reads
_DECIDING = ("dqtk", "torch", "diffusers", "transformers")  # packages whose version may move a pixel


def model_identity(folder: Path) -> str:
    """16 hex digits over names and contents of a saved pipeline's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in _IGNORED)
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return key_of(*(f"{path.relative_to(folder)} {_contents(path)}" for path in files))


def _contents(path: Path) -> str:
    real = path.resolve()
    if _HASH.fullmatch(real.name) and real.parent.name == "blobs":
        return real.name
    state = real.stat()
    return _hashed(real, state.st_size, state.st_mtime_ns)


@cache
def _hashed(path: Path, size: int, modified: int) -> str:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                digests = (file.metadata() or {}).get(DIGESTS)
        except (OSError, SafetensorError):
            digests = None  # loading says what is wrong with it
        if digests is not None:
            return f"{size} {hashlib.sha256(digests.encode()).hexdigest()}"
    return sha256(path)


def texts_identity(texts: Sequence[str]) -> str:
    """16 hex digits of prompts, in order."""
    return key_of(json.dumps(list(texts)))


def deciding_versions() -> dict[str, str]:
    """Versions of what paints."""
    return {name: version for name, version in environment.versions().items() if name in _DECIDING}


def painted_by(folder: Path, dtype: str, rounding: str | None) -> dict[str, Any]:
    """What has to be the same for a picture to be the same, beside its prompt, seed and the job's own hash."""
    return {"model": model_identity(folder), "dtype": dtype, "rounding": rounding, "versions": deciding_versions()}
