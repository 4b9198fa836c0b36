"""Errors of the changes from frame to frame: by hand, what cancels, what does not, and what is refused."""

import math

import pytest
import torch
from dqtk.metrics.frame_differences import difference_psnr
from dqtk.metrics.psnr import psnr

from dqtk.resolve import clip_scores, pair_score, scores


@pytest.fixture
def clips():
    return torch.rand((3, 5, 3, 7, 6), generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


def test_by_hand(clips):
    other = (clips + 0.1 * torch.rand(clips.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = difference_psnr(other, clips)
    assert (found.shape, found.dtype) == ((3,), torch.float64)
    for index in range(3):
        a, b = other[index].double(), clips[index].double()
        squares = [((a[f + 1] - a[f]) - (b[f + 1] - b[f])).square().mean() for f in range(4)]
        assert float(found[index]) == pytest.approx(-10 * math.log10(sum(squares) / 4))
    torch.testing.assert_close(found, difference_psnr(clips, other))


def test_what_all_frames_share_cancels_and_flicker_does_not(clips):
    """Two errors of equal power, which no score of single frames can tell apart."""
    sign = torch.tensor([1, -1, 1, -1, 1.0]).view(1, 5, 1, 1, 1)
    steady, flicker = clips + 0.1, clips + 0.1 * sign
    frames = [psnr(x.flatten(0, 1), clips.flatten(0, 1)) for x in (steady, flicker)]
    torch.testing.assert_close(*frames)
    assert bool((difference_psnr(steady, clips) > 100).all())  # but for rounding
    assert difference_psnr(flicker, clips).tolist() == pytest.approx([-20 * math.log10(0.2)] * 3, abs=1e-4)
    assert difference_psnr(clips, clips).tolist() == [math.inf] * 3
    half = clips.bfloat16()
    assert difference_psnr(half, half).tolist() == [math.inf] * 3


def test_refuses(clips):
    for wrong in (clips[0], clips[:, :1]):
        with pytest.raises(ValueError, match=r"difference_psnr: clips must be \[B, F, 3, H, W\] with at least two frames, got \["):
            difference_psnr(wrong, wrong)
    with pytest.raises(ValueError, match=r"difference_psnr: both batches must be of one shape, got \[3, 5, .*\] and \[3, 4, "):
        difference_psnr(clips, clips[:, :4])
    with pytest.raises(ValueError, match=r"difference_psnr: the first batch must be in \[0, 1\]"):
        difference_psnr(2 * clips, clips)


def test_it_is_a_score_of_clips_only():
    """Jobs and reports, which know pictures, are not offered it."""
    assert pair_score("difference_psnr") is clip_scores()["difference_psnr"]
    assert "difference_psnr" not in scores()
    with pytest.raises(
        ValueError, match=r"one of .*psnr.*, features:EXTRACTOR, got 'difference_snr'. Did you mean 'difference_psnr'"
    ):
        pair_score("difference_snr")
