"""Weights files of the scores' networks: where they are looked for, what they must hash to, how they are read.

An explicit path wins; then ``$DQTK_WEIGHTS/FILE``; then torch hub's checkpoints folder, where torchvision, pytorch-fid and
torch-fidelity put the same files. Nothing is downloaded: a score that fetches 100 MB or more in the middle of a run surprises
people, fails on machines without a network, and takes what is at the URL today. ``MissingWeights`` names URL, file and folders
instead, and a report turns it into "not measured: why".

The SHA-256 that is checked is the one whose first eight digits torch hub puts in its file names. It is also part of a feature's
identity: a truncated or retrained file of the right shape would otherwise give a plausible number.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

# Everything torch.load, safetensors and the model libraries raise on files that are cut short or are something else.
_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError, SafetensorError)


class MissingWeights(FileNotFoundError):
    """A score's pretrained weights are not on this machine; the text says where they are looked for and where to get them."""


def weights_folder() -> Path | None:
    """``$DQTK_WEIGHTS``, or ``None`` where it is unset or empty."""
    folder = os.environ.get("DQTK_WEIGHTS")
    return Path(folder) if folder else None


def find_weights(where: str, what: str, files: Sequence[str], url: str, weights: str | Path | None = None) -> Path:
    """The first file there is: ``weights`` if given, else each name of ``files`` in ``$DQTK_WEIGHTS``, then in torch hub's cache.

    Raises ``MissingWeights``, which names ``url``.
    """
    if weights is not None:
        candidates = [Path(weights)]
    else:
        folders = [folder for folder in (weights_folder(), Path(torch.hub.get_dir()) / "checkpoints") if folder is not None]
        candidates = [folder / file for folder in folders for file in files]
    for path in candidates:
        if path.is_file():
            return path
    raise MissingWeights(
        f"{where}: {what} must be a file, got {' or '.join(map(str, candidates))} (not there). Download {url} to it, or into "
        "$DQTK_WEIGHTS, or pass the path of the file."
    )


def sha256_of(*paths: Path) -> str:
    """SHA-256 of a file, hex. Of several (a sharded checkpoint): of their digests in the order given, one a line."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


@contextmanager
def readable(where: str, path: Path, what: str = "readable weights") -> Iterator[None]:
    """Whatever the libraries say about a damaged or unsuitable file, as one ``ValueError`` that names it."""
    try:
        yield
    except MissingWeights:
        raise
    except _UNREADABLE as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where}: {path} must be {what}, got: {said:.300}. Download or write it again.") from error


def load_state(where: str, path: Path, sha256_prefix: str | None = None, *, url: str = "it") -> tuple[dict[str, Tensor], str]:
    """A state dict on the CPU and the SHA-256 of its file.

    Reads safetensors by suffix, anything else by ``torch.load(weights_only=True)``, which runs no code from the file. Raises
    ``ValueError`` for another hash than ``sha256_prefix`` (checked before reading), for a damaged file and for one that holds
    anything but named tensors.
    """
    digest = sha256_of(path)
    if sha256_prefix is not None and not digest.startswith(sha256_prefix):
        got = digest[: max(8, len(sha256_prefix))]
        raise ValueError(f"{where}: SHA-256 of {path} must begin with {sha256_prefix}, got {got}. Download {url} again.")
    with readable(where, path):
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dict with keys {list(state)[:3]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{where}: {path} must hold a state dict (names to tensors), got {found}. Save model.state_dict().")
    return dict(state), digest


def check_names(where: str, path: Path, wanted: set[str], found: set[str]) -> None:
    """``ValueError`` unless a state dict has the names that a network wants and no others; says what differs."""
    if wanted != found:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        raise ValueError(
            f"{where}: {path} must hold the network's {len(wanted)} tensors, got {len(missing)} missing {missing[:3]} and "
            f"{len(extra)} unknown {extra[:3]}. It is the file of another network."
        )
