"""What a distribution or alignment score asks of a network: images in as uint8, one finite float32 row per image out.

Only uint8 crosses this boundary. A float batch does not say whether it is in [0, 1], in [-1, 1] or in 0-255, and a network takes
any of them and gives features that look right: one published set of video scores was computed from 0-255 floats, and Hugging
Face's CLIP processor divides a batch in [0, 1] by 255 again. uint8 has one meaning. It is also what is on disk once an image has
been saved, so that features computed in memory and from files agree.

A feature is named by everything that moves its numbers (``identity``): network, weights and configuration (SHA-256),
preprocessing, versions of what computes, kind of device. ``comparable`` says whether a
score from it may stand beside published ones; random, embedded and unknown weights are not comparable, however good they are.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import PIL
import torch
from torch import Tensor


@runtime_checkable
class Extractor(Protocol):
    """Images to feature rows. All attributes are fixed once the extractor is built; reports and caches use them as its identity."""

    @property
    def name(self) -> str:
        """Network and variant, such as "inception2015" or "open_clip[ViT-B-32]"."""

    @property
    def version(self) -> str:
        """Version of the code that computes the features; another one may give other numbers from the same weights."""

    @property
    def source(self) -> str:
        """The path or hub id that the weights were loaded from."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights file, hex; of several files: see ``weights.sha256_of``."""

    @property
    def config_sha256(self) -> str:
        """SHA-256 of what configures the network beside its weights (config.json, tokenizer); "" where nothing does."""

    @property
    def comparable(self) -> bool:
        """Whether scores with these features may be compared with published numbers."""

    @property
    def preprocess(self) -> str:
        """Resize and normalization, as an identifier: part of a metric's name, since each gives another number."""

    @property
    def dim(self) -> int:
        """Length of a feature row, D."""

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D] on the CPU, as the network gives them (not normalized)."""


@runtime_checkable
class ImageTextEncoder(Extractor, Protocol):
    """An extractor whose texts live in the space of its images."""

    @property
    def max_tokens(self) -> int:
        """Tokens the text encoder reads, special ones included; the rest of a prompt is ignored."""

    @property
    def logit_scale(self) -> float:
        """What the network multiplies cosines with before its softmax (about 100 for trained CLIP models)."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> float32 [B, D] on the CPU, not normalized."""

    def truncated(self, texts: list[str]) -> list[bool]:
        """For each text, whether some of its tokens do not fit in ``max_tokens``: the score is then blind to the prompt's end."""


@runtime_checkable
class ClipEncoder(Protocol):
    """Clips to feature rows: the same attributes as ``Extractor`` beside ``encode_clips``; with ``encode_texts`` and ``max_tokens``
    it reads prompts too."""

    @property
    def name(self) -> str:
        """Network and variant."""

    @property
    def dim(self) -> int:
        """Length of a feature row, D."""

    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, 3, H, W] -> float32 [B, D] on the CPU, a row per clip."""


def identity(extractor: Any) -> str:
    """Everything that moves an extractor's numbers, as one text: what cached features are filed under."""
    device = torch.device(getattr(extractor, "device", "cpu")).type
    own = (extractor.name, extractor.version, extractor.sha256, extractor.config_sha256, extractor.preprocess)
    return "|".join((*own, f"torch {torch.__version__}", f"Pillow {PIL.__version__}", device))


def as_images(where: str, images: Tensor) -> Tensor:
    """The batch itself if it is uint8 [B, 3, H, W] and not empty; else ``ValueError``."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{where}: images must be a torch tensor, got {type(images).__name__}. Use torch.from_numpy.")
    if images.dtype != torch.uint8:
        remedy = "Convert it to uint8."
        if images.is_floating_point():
            remedy = (
                "Floats do not say whether they are in [0, 1], [-1, 1] or 0-255, and each would give another score: "
                "convert once, for [0, 1] with (x * 255).round().clamp(0, 255).to(torch.uint8)."
            )
        raise ValueError(f"{where}: images must be uint8, got {images.dtype}. {remedy}")
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise ValueError(
            f"{where}: images must be [B, 3, H, W] and not empty, got {list(images.shape)}. Add a batch axis, put channels second."
        )
    return images


def as_clip(where: str, frames: Tensor, least: int = 1) -> Tensor:
    """The frames of one clip, if they are uint8 [F, 3, H, W] and at least ``least``; else ``ValueError``."""
    frames = as_images(where, frames)
    if len(frames) < least:
        raise ValueError(f"{where}: a clip must have at least {least} frames, got {len(frames)}. Generate longer clips.")
    return frames


def checked_clips(encoder: Any, clips: Tensor) -> Tensor:
    """``encoder.encode_clips(clips)`` of uint8 [B, F, 3, H, W], float32 [B, D], checked as ``checked_rows`` checks."""
    if not isinstance(clips, Tensor) or clips.ndim != 5:
        got = list(clips.shape) if isinstance(clips, Tensor) else type(clips).__name__
        raise ValueError(f"{encoder.name}: clips must be [B, F, 3, H, W], got {got}. Add a batch axis.")
    as_images(encoder.name, clips.flatten(0, 1))
    rows = encoder.encode_clips(clips)
    _check_rows(encoder.name, rows, [len(clips), encoder.dim])
    return rows


def as_texts(where: str, texts: list[str]) -> list[str]:
    """The texts as a list; ``ValueError`` for one bare string, which would be read as a list of letters, and for no text."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: texts must be a list of strings and not empty, got {texts!r:.60}. Wrap one text in a list.")
    return list(texts)


def checked_rows(extractor: Extractor, images: Tensor) -> Tensor:
    """``extractor.encode_images(images)``, float32 [B, D], with the contract checked.

    Raises ``ValueError`` for images outside the contract and for an extractor that breaks it: another number of rows than of
    images (means and covariances divide by the number of images), another width, another dtype, NaN or infinity.
    """
    images = as_images(extractor.name, images)
    rows = extractor.encode_images(images)
    _check_rows(extractor.name, rows, [len(images), extractor.dim])
    return rows


def checked_heads(extractor: Any, images: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
    """ "features" (the extractor's own) and the named ``heads`` of its ``encode_all``, checked as ``checked_rows`` does.

    One pass where ``encode_all`` gives the extractor's own feature too (its ``head`` says under which name), else two.
    """
    if not heads:
        return {"features": checked_rows(extractor, images)}
    given = extractor.encode_all(as_images(extractor.name, images))
    own = getattr(given, getattr(extractor, "head", ""), None)
    found = {"features": checked_rows(extractor, images) if own is None else own}
    found |= {head: getattr(given, head) for head in heads}
    for head, rows in found.items():
        dim = extractor.dim if head == "features" else rows.shape[-1]
        _check_rows(extractor.name if head == "features" else f"{extractor.name}, {head}", rows, [len(images), dim])
    return found


def _check_rows(where: str, rows: Tensor, wanted: list[int]) -> None:
    if list(rows.shape) != wanted or rows.dtype != torch.float32:
        raise ValueError(
            f"{where}: features must be float32 {wanted}, one row per image, got {rows.dtype} {list(rows.shape)}. "
            "Fix encode_images or dim."
        )
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        first = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"{where}: features must be finite, got NaN or infinity in {int((~finite).sum())} of {len(rows)} rows, first "
            f"in row {first}. Check that image, and the weights."
        )
