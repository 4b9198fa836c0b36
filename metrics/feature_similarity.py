"""Closeness of two pictures as a network sees them: the cosine of their features.

With CLIP's image tower this is "CLIP-I", the usual measure of whether two pictures show the same things; with DINO's, whether they
look the same in detail (Ruiz et al. 2023, DreamBooth, arXiv 2208.12242, section 4.1). Which network is part of the score.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .clip_score import clip_cosine
from .images import as_pair
from .score import PairScore


def feature_cosine(candidate: Tensor, reference: Tensor, *, extractor: Any) -> Tensor:
    """Cosine of the features of two batches of pictures [B, 3, H, W] in [0, 1], float64 [B] in [-1, 1].

    extractor: of ``metrics/extractors``. It is given 8-bit pictures, so changes below half a level are not seen. Raises
    ``ValueError`` for batches that do not match, and features of length zero.
    """
    pair = as_pair("feature_cosine", candidate, reference)
    mine, theirs = (extractor.encode_images((images * 255).round().to(torch.uint8).cpu()) for images in pair)
    return clip_cosine(mine, theirs)


def feature_score(extractor: Any) -> PairScore:
    """The score with this network, named after it."""
    return PairScore(
        name=f"features[{extractor.name}]",
        label=f"feature cosine, {extractor.name}",
        higher_is_better=True,
        load=lambda **options: partial(feature_cosine, extractor=extractor),
    )
