"""Scores of image and text embeddings of one CLIP-like model; which model is the caller's to name, and part of the score.

One cosine goes under several names: papers print the cosine (0.25 to 0.33), 100 times it (torchmetrics), or 2.5 times it
(Hessel et al. 2021, "CLIPScore", eq. 1). All three are here under names of their own, and all clamp at 0 *per image*, as the
paper does; torchmetrics clamps the mean, so its value differs where single images are worse than orthogonal.

The spread over images (standard deviation about 0.04 of cosine) is ten times what quantization changes (0.001 to 0.005), so a
mean is only telling as a paired difference: take these per image, and ``paired_bootstrap`` of the differences.
"""

import torch
from torch import Tensor

from .moments import check_features
from .score import TextScore

_BLOCK = 1024  # images compared with all texts at a time


def clip_cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Cosine of each image's embedding with its text's, float64 [N] in [-1, 1].

    Both are floating [N, D], row i of one image and its prompt, of any length but 0. Raises ``ValueError`` for other shapes, NaN
    and zero rows.
    """
    images, texts = _units("clip_cosine", images, texts)
    return (images * texts).sum(dim=1).clamp(-1, 1)


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """``100 max(cos, 0)`` per image, float64 [N]: the number most papers call CLIP score. Inputs as ``clip_cosine``."""
    return 100 * clip_cosine(images, texts).clamp_min(0)


def hessel_score(images: Tensor, texts: Tensor) -> Tensor:
    """``2.5 max(cos, 0)`` per image, float64 [N]: CLIPScore of Hessel et al. 2021, eq. 1. Inputs as ``clip_cosine``."""
    return 2.5 * clip_cosine(images, texts).clamp_min(0)


def retrieval_at_1(images: Tensor, texts: Tensor) -> Tensor:
    """Whether each image is nearer to its own text than to any other text of the set, bool [N].

    Inputs as ``clip_cosine``. Several images of one prompt carry equal text rows, and each of those counts as its own; so equal
    prompts must have equal embeddings (encode a prompt once). The chance level is one in the number of different texts, so the
    value belongs to its prompt set. Raises ``ValueError`` as ``clip_cosine``, and for fewer than two different texts.
    """
    images, texts = _units("retrieval_at_1", images, texts)
    different, own = torch.unique(texts, dim=0, return_inverse=True)
    if len(different) < 2:
        raise ValueError(
            f"retrieval_at_1: texts must be at least 2 different ones, got {len(different)}. Score several prompts at once."
        )
    best = torch.cat([(rows @ different.T).argmax(dim=1) for rows in images.split(_BLOCK)])
    return best == own


def unit_rows(where: str, name: str, x: Tensor) -> Tensor:
    """Float64 [N, D] rows of length 1. Raises ``ValueError`` for a zero row: it has no direction, hence no cosine."""
    x = x.detach().double()
    norm = x.norm(dim=1, keepdim=True)
    zeros = int((norm == 0).sum())
    if zeros:
        raise ValueError(f"{where}: the {name} set must be rows other than zero, got {zeros} zero rows. Look at those images.")
    return x / norm


def _units(where: str, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    check_features(where, images, texts)
    if len(images) != len(texts):
        raise ValueError(
            f"{where}: texts must be one per image ({len(images)}), got {len(texts)}. Repeat the prompt for each of its images."
        )
    return unit_rows(where, "first", images), unit_rows(where, "second", texts.to(images.device))


SCORES = (
    TextScore(name="clip_score", label="CLIP score", higher_is_better=True, function=clip_score),
    TextScore(
        name="retrieval",
        label="Retrieval at 1",
        higher_is_better=True,
        digits=3,
        least=2,
        published=(),  # among the prompts at hand: another list, another number
        function=lambda images, texts: retrieval_at_1(images, texts).double(),
    ),
)
