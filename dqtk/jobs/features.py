"""Stage 2: what the scores look at. Features of every batch by every extractor, of prompts by those that read texts, pair scores.

The frames of a clip are pictures: an extractor gets those of one clip at a time, as it gets a batch of pictures.

Results are kept in OUTPUT/cache under the hash of what they were made from: the SHA-256 of each picture, and the identity of the
extractor or the score (name, version, weights, configuration, preprocessing, versions of what computes). So a changed picture is
never served an old feature, pictures shared by two variants are encoded once, and a run after a crash makes only what is missing
or damaged.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dqtk.report import environment
from dqtk.report.scores import checked_clip, checked_heads, identity, mean_over_frames, one_per_picture, values_of_frames

from .files import cached_json, key_of, sha256, whole

TEXT_CHUNK = 64  # prompts that the text tower reads at once
_PLAIN = ("RGB", "L", "1", "P")  # modes that become 8-bit RGB without losing anything
_ALPHA = ("RGBA", "LA", "PA")


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture or clip of a variant: sample id, prompt (None where unknown), file and its SHA-256; whether a job ``painted`` it,
    and from which ``seed``.

    Of a clip: its ``frames``, pictures in order; ``file`` is the first's, and ``sha256`` that of theirs, one a line. ``style``: the
    text of it that a suite of prompts names; ``left_out``: scores that the suite has no use for it in.
    """

    id: str
    prompt: str | None
    prompt_index: int
    file: Path
    sha256: str
    painted: bool = False
    seed: int | None = None
    frames: tuple["Picture", ...] = ()
    style: str | None = None
    left_out: frozenset[str] = frozenset()

    @property
    def remedy(self) -> str:
        return "Run the job again; it paints missing pictures." if self.painted else "Replace the file."


def clip_of(frames: Sequence[Picture], name: str) -> Picture:
    """Frames of one sample as its clip."""
    whole_sha256 = sha256("\n".join(frame.sha256 for frame in frames).encode())
    return replace(frames[0], id=name, sha256=whole_sha256, frames=tuple(frames))


def looked_at(batches: Sequence[Sequence[Picture]]) -> list[list[Picture]]:
    """What an extractor gets at a time: a batch of pictures, or the frames of one clip."""
    return [group for batch in batches for group in (_frames(batch) if batch[0].frames else [list(batch)])]


def _frames(batch: Sequence[Picture]) -> list[list[Picture]]:
    return [list(clip.frames) for clip in batch]


def read_pictures(pictures: Sequence[Picture]) -> Tensor:
    """uint8 [B, 3, H, W].

    Raises ``ValueError`` that names a file that is missing, damaged, changed, of another size, of more than 8 bits or transparent:
    a conversion would clip the one and invent a background for the other.
    """
    arrays = []
    for picture in pictures:
        try:
            data = picture.file.read_bytes()
            if sha256(data) != picture.sha256:
                raise ValueError("other contents than when it was listed")
            with Image.open(picture.file) as image:
                arrays.append(np.asarray(_rgb(image)))
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ValueError(f"picture {picture.file} must be readable, got: {error}. {picture.remedy}") from error
        if arrays[-1].shape != arrays[0].shape:
            size, first = arrays[-1].shape[1::-1], arrays[0].shape[1::-1]
            raise ValueError(_another_size(picture, size, first))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of the same colours. Raises ``ValueError`` where there is none."""
    wide = ";16" in str(getattr(image, "tile", "")) or image.mode.startswith("I")  # Pillow opens 16-bit RGB as 8-bit, quietly
    if wide or image.mode not in (*_PLAIN, *_ALPHA):
        depth = "16 bits per channel" if wide else f"mode {image.mode}"
        raise ValueError(f"{depth}, where scores are of 8-bit RGB; convert it beforehand")
    if image.mode in _ALPHA or "transparency" in image.info:
        clear = np.asarray(image.convert("RGBA"))[..., 3] < 255
        if clear.any():
            raise ValueError(f"{int(clear.sum())} transparent pixels, which have no colour; paste it on a background beforehand")
    return image.convert("RGB")


def check_sizes(pictures: Sequence[Picture]) -> tuple[int, int]:
    """(width, height) of all of them, from their headers. Raises ``ValueError`` that names the first of another size."""
    first = None
    for picture in (frame for sample in pictures for frame in sample.frames or (sample,)):
        try:
            with Image.open(picture.file) as image:
                size = image.size
        except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
            raise ValueError(f"picture {picture.file} must be readable, got: {error}. {picture.remedy}") from error
        first = first or size
        if size != first:
            raise ValueError(_another_size(picture, size, first))
    assert first is not None
    return first


def _another_size(picture: Picture, size: tuple[int, ...], first: tuple[int, ...]) -> str:
    return f"picture {picture.file} must have the size of the others {first}, got {size}. Resize beforehand."


def feature_file(cache: Path, extractor: Any, pictures: Sequence[Picture]) -> Path:
    """Where the features of these pictures belong."""
    name = key_of(identity(extractor), *(picture.sha256 for picture in pictures))
    return cache / "features" / f"{name}.safetensors"


def encode(cache: Path, extractor: Any, pictures: Sequence[Picture], heads: Sequence[str] = ()) -> Path:
    """Make the feature file of a batch unless it is there: ``features`` [B, D], and the named ``heads`` of ``encode_all``. An
    extractor of clips is given the frames of one: [1, D].

    Raises ``ValueError`` for unreadable pictures and features outside the contract.
    """
    file = feature_file(cache, extractor, pictures)
    if not _holds(file, {"features", *heads}):
        images = read_pictures(pictures)
        clips = hasattr(extractor, "encode_clips")
        found = {"features": checked_clip(extractor, images)} if clips else checked_heads(extractor, images, heads)
        tensors = {name: rows.contiguous() for name, rows in found.items()}
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
    return torch.cat(
        [
            _stored(feature_file(cache, extractor, pictures), what, f"{pictures[0].id} to {pictures[-1].id} by {extractor.name}")
            for pictures in batches
        ]
    )


def _stored(file: Path, what: str, whose: str) -> Tensor:
    try:
        with safe_open(file, framework="pt") as stored:
            return stored.get_tensor(what)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what} of {whose} must be in {file}, got: {error}. Run again; what is missing is made.") from error


# --- prompts ---------------------------------------------------------------------------------------------------------


def text_chunks(prompts: Sequence[str]) -> list[list[str]]:
    """Different prompts in the chunks that they are encoded in, cut by the prompts alone."""
    different = sorted(set(prompts))
    return [different[start : start + TEXT_CHUNK] for start in range(0, len(different), TEXT_CHUNK)]


def text_file(cache: Path, extractor: Any, texts: Sequence[str]) -> Path:
    """Where the embeddings of these prompts belong."""
    return cache / "texts" / f"{key_of(identity(extractor), json.dumps(list(texts)))}.safetensors"


def encode_texts(cache: Path, extractor: Any, texts: Sequence[str]) -> Path:
    """Make the file of a chunk of prompts unless it is there: ``texts`` [B, D]."""
    file = text_file(cache, extractor, texts)
    if not _holds(file, {"texts"}):
        rows = extractor.encode_texts(list(texts)).contiguous()
        with whole(file) as partial:
            save_file({"texts": rows}, partial, metadata={"extractor": identity(extractor)})
    return file


def load_texts(cache: Path, extractor: Any, chunks: Sequence[Sequence[str]], prompts: Sequence[str]) -> Tensor:
    """A row per prompt, [N, D], from the chunks' files; equal prompts have equal rows."""
    rows = torch.cat([_stored(text_file(cache, extractor, chunk), "texts", f"prompts by {extractor.name}") for chunk in chunks])
    place = {text: i for i, text in enumerate(text for chunk in chunks for text in chunk)}
    return rows[[place[prompt] for prompt in prompts]]


# --- pairs -----------------------------------------------------------------------------------------------------------


def pair_identity(score: Any, function: Any) -> str:
    """Everything that moves a pair score's numbers: its own version, the files it read, versions of what computes."""
    found = environment.versions()
    computes = [f"{name} {found[name]}" for name in ("torch", "torchmetrics") if name in found]
    return "|".join((score.name, score.version, str(getattr(function, "identity", "")), *computes))


def score_pairs(
    cache: Path, name: str, function: Any, candidate: Sequence[Picture], reference: Sequence[Picture], *, whole: bool = False
) -> list[float]:
    """Values of one pair score (``name``: its ``pair_identity``) for a batch, from the cache where they are there and whole.

    Of clips: of the frames of two, or (``whole``: the score is of clips) one value of both. ``inf`` is stored as text. Raises
    ``ValueError`` for pictures of two sizes, clips of two lengths and NaN.
    """
    if len(candidate) != len(reference):
        raise ValueError(
            f"clips of a pair must have one number of frames, got {len(candidate)} in {candidate[0].file.stem} and "
            f"{len(reference)} in {reference[0].file.stem}. Compare clips of one length."
        )
    key = key_of(name, *(picture.sha256 for picture in (*candidate, *reference)))
    num = 1 if whole else len(candidate)

    def pair_of(part: slice) -> tuple[Tensor, Tensor]:
        a, b = (read_pictures(side[part]).float() / 255 for side in (candidate, reference))
        if a.shape != b.shape:
            raise ValueError(
                f"pictures of a pair must have one size, got {tuple(a.shape[2:])} in {candidate[0].file} and "
                f"{tuple(b.shape[2:])} in {reference[0].file}. Compare pictures of one size."
            )
        return a, b

    def make() -> list[float | str]:
        short = name.split("|")[0]
        if whole:
            a, b = pair_of(slice(None))
            values = one_per_picture(short, function, function(a[None], b[None]), 1).tolist()
        else:
            values = values_of_frames(short, function, num, pair_of)
        if any(math.isnan(value) for value in values):
            raise ValueError(f"{name.split('|')[0]} of {candidate[0].file} and the next must be a number, got NaN. Look at it.")
        return [value if math.isfinite(value) else str(value) for value in values]

    def fits(data: Any) -> bool:
        return isinstance(data, list) and len(data) == num and all(_is_number(value) for value in data)

    return [float(value) for value in cached_json(cache / "pairs" / f"{key}.json", make, fits)]


def score_clip_pair(cache: Path, name: str, function: Any, score: Any, candidate: Picture, reference: Picture) -> float:
    """One pair score of two clips: ``mean_over_frames``, or the one value of a score of whole clips."""
    values = score_pairs(cache, name, function, candidate.frames, reference.frames, whole=score.clips)
    return mean_over_frames(values, score.cap)


def _is_number(value: Any) -> bool:
    return value in ("inf", "-inf") or (isinstance(value, (int, float)) and math.isfinite(value))


def judge_identity(judge: Callable) -> str:
    """An oracle's code, and what it computes with: it has no weights, and no version but its source."""
    module = sys.modules[judge.__module__]
    sources = sorted(Path(str(module.__file__)).parent.glob("*.py"))
    return key_of(judge.__module__, *(sha256(path) for path in sources), f"numpy {np.__version__}")


def judge_pictures(cache: Path, name: str, judge: Any, pictures: Sequence[Picture]) -> list[dict[str, float]]:
    """An oracle's verdicts of a batch (``name``: its identity), from the cache where they are there and whole: mean in [0, 1] and
    all_correct as 0 or 1. It is asked about a PIL image and its prompt, or about uint8 frames [F, H, W, 3] and theirs."""
    key = key_of("oracle", name, *(f"{p.sha256} {p.prompt}" for p in pictures))

    def make() -> list[dict[str, float]]:
        shown: list[Any]
        if pictures[0].frames:
            shown = [read_pictures(clip.frames).permute(0, 2, 3, 1).contiguous().numpy() for clip in pictures]
        else:
            shown = [Image.fromarray(image) for image in read_pictures(pictures).permute(0, 2, 3, 1).contiguous().numpy()]
        said = [judge(one, picture.prompt) for one, picture in zip(shown, pictures, strict=True)]
        return [{"mean": float(verdict.mean), "all_correct": float(verdict.all_correct)} for verdict in said]

    def fits(data: Any) -> bool:
        rows = data if isinstance(data, list) else []
        good = [
            isinstance(row, dict) and set(row) == {"mean", "all_correct"} and all(map(_is_number, row.values())) for row in rows
        ]
        return len(good) == len(pictures) and all(good)

    return cached_json(cache / "oracle" / f"{key}.json", make, fits)
