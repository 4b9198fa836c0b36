"""What a distribution or alignment score asks of a network: images in as uint8, one finite float32 row per image out.

Only uint8 crosses this boundary. A float batch does not say whether it is in [0, 1], in [-1, 1] or in 0-255, and a network takes
any of them and gives features that look right: one published set of video scores was computed from 0-255 floats, and Hugging
Face's CLIP processor divides a batch in [0, 1] by 255 again. uint8 has one meaning. It is also what is on disk once an image has
been saved, so that features computed in memory and from files agree.

A feature is named by everything that moves its numbers: network, weights (SHA-256), preprocessing. ``comparable`` says whether a
score from it may stand beside published ones; random, embedded and unknown weights are not comparable, however good they are.
"""

from typing import Protocol, runtime_checkable

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
    wanted = [len(images), extractor.dim]
    if list(rows.shape) != wanted or rows.dtype != torch.float32:
        raise ValueError(
            f"{extractor.name}: features must be float32 {wanted}, one row per image, got {rows.dtype} {list(rows.shape)}. "
            "Fix encode_images or dim."
        )
    finite = rows.isfinite().all(dim=1)
    if not finite.all():
        first = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"{extractor.name}: features must be finite, got NaN or infinity in {int((~finite).sum())} of {len(rows)} rows, first "
            f"in row {first}. Check that image, and the weights."
        )
    return rows
