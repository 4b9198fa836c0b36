"""Structural similarity of image pairs, one scale (Wang et al. 2004) and several (Wang et al. 2003).

The computation is torchmetrics'; what is decided here is the rest, because "SSIM" alone names a family: Gaussian window of 11
pixels with sigma 1.5, reflection padding, K1 = 0.01, K2 = 0.03, and ``data_range=1`` always. (torchmetrics' default takes the
range from the data, so the score of a pair would depend on the other pairs in its batch.) Colour channels are averaged.

MS-SSIM's five scales need 176 pixels. Smaller images use as many of the first scales as leave the window inside the coarsest
one, and the published exponents of those scales divided by their sum:

    side     >= 176   99-175   44-98   22-43   11-21
    scales      5        4        3       2       1

The value for 3 scales is therefore not comparable with one for 5; ``num_scales(side)`` belongs beside it in a report.
"""

from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from .images import as_pair
from .score import PairScore

BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, table of the cross-scale calibration
WINDOW = 11  # pixels
MIN_SIDE = {5: 176, 4: 99, 3: 44, 2: 22, 1: 11}  # pixels by number of scales


def num_scales(side: int) -> int:
    """How many scales MS-SSIM uses for images whose shorter side is ``side`` pixels. Raises ``ValueError`` below 11 pixels."""
    for scales, least in MIN_SIDE.items():
        if side >= least:
            return scales
    raise ValueError(f"ms_ssim: the shorter side must be at least {WINDOW} pixels, got {side}. Compare larger images.")


def ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """SSIM per image, [B], at most 1 (equal images). Float [B, 3, H, W] in [0, 1], sides at least 11; else ``ValueError``."""
    a, b = as_pair("ssim", candidate, reference)
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"ssim: the shorter side must be at least {WINDOW} pixels, got {min(a.shape[2:])}. Compare larger images.")
    values = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return values.reshape(-1)


def ms_ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """MS-SSIM per image, [B], in [0, 1], with the scales of the table above. Same inputs and errors as ``ssim``.

    Negative contrast terms count as 0 (the fractional exponents leave no other choice).
    """
    a, b = as_pair("ms_ssim", candidate, reference)
    betas = BETAS[: num_scales(min(a.shape[2:]))]
    betas = tuple(beta / sum(betas) for beta in betas)
    values = multiscale_structural_similarity_index_measure(a, b, data_range=1.0, betas=betas, normalize="relu", reduction="none")
    return values.reshape(-1)


SCORES = (
    PairScore(name="ssim", label="SSIM", higher_is_better=True, load=lambda **options: ssim),
    PairScore(name="ms_ssim", label="MS-SSIM", higher_is_better=True, load=lambda **options: ms_ssim),
)
