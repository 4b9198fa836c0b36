"""Structural similarity of image pairs, one scale (Wang et al. 2004) and several (Wang et al. 2003).

"SSIM" alone names a family, so: Gaussian window of 11 pixels with sigma 1.5, reflection padding, K1 = 0.01, K2 = 0.03, and the
range is 1 always, not that of the data. Colour channels are averaged. Values equal torchmetrics' with ``data_range=1``; MS-SSIM
leaves the padded border out of its contrast terms only, as there.

All in float64: variances are differences of squares, and in float32 the rounding of a bright flat picture (mean 0.97, variance 0)
is large beside the constants, so that a picture differed from itself (0.9987 in place of 1). The window is applied by rows and by
columns, one picture at a time: torch's float64 convolution takes 35 s for a pair of 1024 x 1024, this 0.8 s (one thread of a busy
2-core EPYC).

MS-SSIM's five scales need 176 pixels. Smaller images use as many of the first scales as leave the window inside the coarsest
one, and the published exponents of those scales divided by their sum:

    side     >= 176   99-175   44-98   22-43   11-21
    scales      5        4        3       2       1

The value for 3 scales is therefore not comparable with one for 5; ``num_scales(side)`` belongs beside it in a report.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import as_pair
from .score import PairScore

BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, table of the cross-scale calibration
WINDOW = 11  # pixels
SIGMA = 1.5  # pixels
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2, (K2 L)^2 with L = 1
MIN_SIDE = {5: 176, 4: 99, 3: 44, 2: 22, 1: 11}  # pixels by number of scales


def num_scales(side: int) -> int:
    """How many scales MS-SSIM uses for images whose shorter side is ``side`` pixels. Raises ``ValueError`` below 11 pixels."""
    for scales, least in MIN_SIDE.items():
        if side >= least:
            return scales
    raise ValueError(f"ms_ssim: the shorter side must be at least {WINDOW} pixels, got {side}. Compare larger images.")


def ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """SSIM per image, float64 [B], 1 for equal images. Float [B, 3, H, W] in [0, 1], sides at least 11; else ``ValueError``."""
    a, b = as_pair("ssim", candidate, reference, dtype=torch.float64)
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"ssim: the shorter side must be at least {WINDOW} pixels, got {min(a.shape[2:])}. Compare larger images.")
    return torch.stack([_ssim_and_contrast(x, y)[0] for x, y in zip(a.split(1), b.split(1), strict=True)])


def ms_ssim(candidate: Tensor, reference: Tensor) -> Tensor:
    """MS-SSIM per image, float64 [B], in [0, 1], with the scales of the table above. Same inputs and errors as ``ssim``.

    Negative contrast terms count as 0 (the fractional exponents leave no other choice).
    """
    a, b = as_pair("ms_ssim", candidate, reference, dtype=torch.float64)
    betas = BETAS[: num_scales(min(a.shape[2:]))]
    return torch.stack([_over_scales(x, y, betas) for x, y in zip(a.split(1), b.split(1), strict=True)])


def _over_scales(x: Tensor, y: Tensor, betas: Sequence[float]) -> Tensor:
    """The product over scales for one pair: contrast terms, and at the coarsest scale all of SSIM (Wang et al. 2003, eq. 7)."""
    total = torch.ones((), dtype=x.dtype, device=x.device)
    for scale, beta in enumerate(betas, start=1):
        both, contrast = _ssim_and_contrast(x, y)
        term = both if scale == len(betas) else contrast
        total = total * term.clamp_min(0) ** (beta / sum(betas))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total


def _ssim_and_contrast(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means of SSIM and of its contrast and structure term (Wang et al. 2004, eq. 13) for one pair [1, 3, H, W]."""
    mean_x, mean_y = _windowed(x), _windowed(y)
    variances = _windowed(x * x) + _windowed(y * y) - mean_x.square() - mean_y.square()
    contrast = (2 * (_windowed(x * y) - mean_x * mean_y) + C2) / (variances + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    border = slice(WINDOW // 2, -(WINDOW // 2))
    return (luminance * contrast).mean(), contrast[..., border, border].mean()


def _windowed(x: Tensor) -> Tensor:
    """The Gaussian mean about each pixel, the picture reflected at its border."""
    half = WINDOW // 2
    offsets = torch.arange(-half, half + 1, dtype=x.dtype)
    weights = torch.exp(-offsets.square() / (2 * SIGMA**2))
    padded = F.pad(x, (half,) * 4, mode="reflect")
    for axis in (2, 3):
        size = padded.shape[axis] - 2 * half
        total = torch.zeros_like(padded.narrow(axis, 0, size))
        for start, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(padded.narrow(axis, start, size), alpha=weight)
        padded = total
    return padded


SCORES = (
    PairScore(name="ssim", label="SSIM", higher_is_better=True, version="2", load=lambda **options: ssim),
    PairScore(name="ms_ssim", label="MS-SSIM", higher_is_better=True, version="2", load=lambda **options: ms_ssim),
)
