"""The contract of paired image scores: what is refused, and with which words."""

import pytest
import torch
from dqtk.metrics.images import as_pair
from dqtk.metrics.psnr import psnr
from dqtk.metrics.ssim import ms_ssim, ssim

GOOD = torch.full((2, 3, 16, 16), 0.5)


@pytest.mark.parametrize("score", [psnr, ssim, ms_ssim])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (GOOD[0], r"first batch must be \[B, 3, H, W\] and not empty, got \[3, 16, 16\]\. Add a batch axis\."),
        (GOOD[:, :1], r"first batch must be \[B, 3, H, W\]"),
        (GOOD[:0], r"and not empty, got \[0, 3, 16, 16\]"),
        ((GOOD * 255).byte(), r"must be floating point in \[0, 1\], got torch\.uint8\. Divide uint8 by 255\."),
        (GOOD * 255, r"must be in \[0, 1\], got \[127\.5, 127\.5\]\. Rescale it\."),
        (GOOD * 2 - 2, r"must be in \[0, 1\], got \[-1, -1\]"),
        (GOOD * torch.nan, r"must be in \[0, 1\], got \[nan, nan\]"),
    ],
)
def test_scores_refuse_what_is_not_an_image_batch(score, bad, words):
    with pytest.raises(ValueError, match=rf"^{score.__name__}: the {words}" if words.startswith("first") else words):
        score(bad, GOOD)


def test_the_second_batch_is_checked_too():
    with pytest.raises(ValueError, match=r"^psnr: the second batch must be in \[0, 1\]"):
        psnr(GOOD, GOOD + 1)
    with pytest.raises(ValueError, match=r"both batches must be of one shape, got \[2, 3, 16, 16\] and \[1, 3, 16, 16\]"):
        psnr(GOOD, GOOD[:1])


def test_half_precision_is_widened_and_float64_kept():
    assert as_pair("x", GOOD.bfloat16(), GOOD.half())[0].dtype == torch.float32
    assert as_pair("x", GOOD, GOOD.double())[0].dtype == torch.float64
