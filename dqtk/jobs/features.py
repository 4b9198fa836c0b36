"""Stage 2: what the scores look at. Features of every batch by every extractor, and pair scores of every batch.

Results are kept in OUTPUT/cache under the hash of what they were made from: the SHA-256 of each picture, and the extractor's
name, version, weights and preprocessing. So a changed picture is never served an old feature, pictures shared by two variants are
encoded once, and a run after a crash makes only what is missing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import key_of, read_json, sha256, whole, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One lossless picture of a variant: sample id, prompt (None where unknown), file and its SHA-256."""

    id: str
    prompt: str | None
    prompt_index: int
    file: Path
    sha256: str


def read_pictures(pictures: Sequence[Picture]) -> Tensor:
    """uint8 [B, 3, H, W]. Raises ``ValueError`` that names a file that is missing, damaged, changed, or of another size."""
    arrays = []
    for picture in pictures:
        try:
            data = picture.file.read_bytes()
            if sha256(data) != picture.sha256:
                raise ValueError("its contents have changed since it was written")
            with Image.open(picture.file) as image:
                arrays.append(np.asarray(image.convert("RGB")))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"job: picture {picture.file} must be readable, got: {error}. Run the job again; it paints missing pictures."
            ) from error
        if arrays[-1].shape != arrays[0].shape:
            size, first = arrays[-1].shape[1::-1], arrays[0].shape[1::-1]
            raise ValueError(
                f"job: picture {picture.file} must have the size of the others {first}, got {size}. Resize beforehand."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def identity(extractor: Any) -> str:
    """Everything that moves an extractor's numbers, as one text."""
    return "|".join((extractor.name, extractor.version, extractor.sha256, extractor.preprocess))


def feature_file(cache: Path, extractor: Any, pictures: Sequence[Picture]) -> Path:
    """Where the features of these pictures belong."""
    name = key_of(identity(extractor), *(picture.sha256 for picture in pictures))
    return cache / "features" / f"{name}.safetensors"


def encode(cache: Path, extractor: Any, pictures: Sequence[Picture], rows: Any, heads: Sequence[str] = ()) -> Path:
    """Make the feature file of a batch unless it is there: ``features`` [B, D], and the named ``heads`` of ``encode_all``.

    ``rows(extractor, images)`` encodes and checks. Raises ``ValueError`` for unreadable pictures.
    """
    file = feature_file(cache, extractor, pictures)
    if not _holds(file, {"features", *heads}):
        images = read_pictures(pictures)
        tensors = {"features": rows(extractor, images).contiguous()}
        if heads:
            given = extractor.encode_all(images)
            tensors |= {head: getattr(given, head).contiguous() for head in heads}
        with whole(file) as partial:
            save_file(tensors, partial, metadata={"extractor": identity(extractor), "ids": json.dumps([p.id for p in pictures])})
    return file


def _holds(file: Path, names: set[str]) -> bool:
    try:
        with safe_open(file, framework="pt") as stored:
            return names <= set(stored.keys())
    except (OSError, SafetensorError):
        return False


def load_features(cache: Path, extractor: Any, batches: Sequence[Sequence[Picture]], what: str = "features") -> Tensor:
    """Rows of all batches, [N, D]. Raises ``ValueError`` that names a batch whose features are missing."""
    found = []
    for pictures in batches:
        file = feature_file(cache, extractor, pictures)
        try:
            with safe_open(file, framework="pt") as stored:
                found.append(stored.get_tensor(what))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"job: {what} of {pictures[0].id} to {pictures[-1].id} by {extractor.name} must be in {file}, got: {error}. "
                "Run the job again; it makes what is missing."
            ) from error
    return torch.cat(found)


# --- pairs -----------------------------------------------------------------------------------------------------------


def pair_file(cache: Path, name: str, candidate: Sequence[Picture], reference: Sequence[Picture]) -> Path:
    """Where the pair scores of these pictures belong."""
    key = key_of(name, *(picture.sha256 for picture in (*candidate, *reference)))
    return cache / "pairs" / f"{key}.json"


def score_pairs(cache: Path, name: str, function: Any, candidate: Sequence[Picture], reference: Sequence[Picture]) -> list[float]:
    """Values of one pair score for a batch, from the cache where they are there. ``inf`` is stored as text."""
    file = pair_file(cache, name, candidate, reference)
    if file.is_file():
        return [float(value) for value in read_json(file)]
    a, b = (read_pictures(side).float() / 255 for side in (candidate, reference))
    if a.shape != b.shape:
        raise ValueError(
            f"job: pictures of a pair must have one size, got {tuple(a.shape[2:])} in {candidate[0].file} and "
            f"{tuple(b.shape[2:])} in {reference[0].file}. Compare pictures of one size."
        )
    values = function(a, b).tolist()
    write_json(file, [value if np.isfinite(value) else str(value) for value in values])
    return values


def judge_pictures(cache: Path, name: str, judge: Any, pictures: Sequence[Picture]) -> list[dict[str, float]]:
    """An oracle's verdicts of a batch, from the cache where they are there: mean in [0, 1] and all_correct as 0 or 1."""
    file = cache / "oracle" / f"{key_of(name, *(f'{p.sha256} {p.prompt}' for p in pictures))}.json"
    if file.is_file():
        return read_json(file)
    read_pictures(pictures)  # names a damaged one
    said = [judge(Image.open(picture.file).convert("RGB"), picture.prompt) for picture in pictures]
    rows = [{"mean": float(verdict.mean), "all_correct": float(verdict.all_correct)} for verdict in said]
    write_json(file, rows)
    return rows
