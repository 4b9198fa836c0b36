"""The scores of clips against their formulas written out again, and at their extremes: still, noise, even motion, a cut."""

import math

import numpy as np
import pytest
import torch
from dqtk.metrics.clip_style import style_cosine
from dqtk.metrics.dynamic_degree import dynamic_degree, is_dynamic, is_still, largest_motion, sampled
from dqtk.metrics.extractors.immerkaer import Immerkaer
from dqtk.metrics.extractors.interpolation import WarpInterpolator, checked_middle
from dqtk.metrics.extractors.lucas_kanade import LucasKanade
from dqtk.metrics.frame_consistency import consistency
from dqtk.metrics.frame_quality import aesthetic_quality, imaging_quality
from dqtk.metrics.motion_smoothness import motion_smoothness
from dqtk.metrics.temporal_flickering import steadiness, temporal_flickering
from dqtk.pipelines.tiny.motion import parse_caption, render


class Given:
    """A flow that says what it is told: of each pair the same displacement in a share of the pixels."""

    name, version, sha256, config_sha256, preprocess, source, comparable = "given", "1", "", "", "", "", False

    def __init__(self, motions, share=1.0):
        self.motions, self.share, self.seen = motions, share, 0

    def flow(self, first, second):
        found = torch.zeros(len(first), 2, *first.shape[2:])
        num = round(self.share * first[0, 0].numel())
        for row in found:
            row[0].view(-1)[:num] = self.motions[self.seen % len(self.motions)]
            self.seen += 1
        return found


@pytest.fixture(scope="module")
def moving():
    """A red cross that moves two pixels per frame, uint8 [17, 3, 64, 64]."""
    return as_clip("a small red cross moving right quickly on a gradient background")


def as_clip(caption):
    return torch.from_numpy(render(parse_caption(caption), 1, 0)).permute(0, 3, 1, 2)


def noise(num=9, side=40, seed=0):
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- consistency ---------------------------------------------------------------------------------------------------------


def test_consistency_is_the_formula():
    rows = np.random.default_rng(0).normal(0.2, 1, (7, 5))
    total = 0.0
    for i in range(1, 7):
        for other in (rows[i - 1], rows[0]):
            total += max(0.0, float(rows[i] @ other / np.linalg.norm(rows[i]) / np.linalg.norm(other))) / 2
    assert consistency(torch.tensor(rows)) == pytest.approx(total / 6, abs=1e-12)
    assert consistency(torch.tensor(rows, dtype=torch.bfloat16)) == pytest.approx(total / 6, abs=0.02)


def test_consistency_of_extremes():
    still = torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).expand(5, -1)
    assert consistency(still) == pytest.approx(1)
    assert consistency(torch.eye(6)) == 0
    assert consistency(torch.tensor([[1.0, 0], [-1.0, 0]])) == 0  # opposite counts as nothing in common
    cut = torch.tensor([[1.0, 0]] * 5 + [[0, 1.0]] * 5)
    assert consistency(cut) == pytest.approx((4 * 1 + 0 + 4 * 0.5) / 9)
    assert consistency(torch.tensor([[1.0, 0], [0, 1.0]] * 5)) < consistency(cut)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (torch.ones(1, 4), "at least 2 rows, got 1"),
        (torch.zeros(3, 4), "rows other than zero, got 3"),
        (torch.full((3, 4), torch.nan), "finite"),
    ],
)
def test_consistency_refuses(rows, said):
    with pytest.raises(ValueError, match=said):
        consistency(rows)


# --- dynamic degree ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "fps", "taken"), [(17, 8, 17), (17, 16, 9), (81, 16, 41), (17, 24, 6), (17, 5, 17), (10, 12, 5), (10, 11.9, 10)]
)
def test_about_eight_frames_a_second_are_looked_at(num, fps, taken):
    """Python rounds 12 / 8 to the even 2, as the published program does."""
    assert len(sampled(torch.zeros(num, 3, 2, 2), fps)) == taken


def test_the_thresholds_of_dynamic_degree():
    """64 pixels: 1.5 count as motion. 17 frames: round(4.25) = 4 pairs have to."""
    clip = torch.zeros(17, 3, 64, 64, dtype=torch.uint8)
    assert is_dynamic(clip, 8, Given([1.6] * 4 + [0.0] * 12))
    assert not is_dynamic(clip, 8, Given([1.6] * 3 + [0.0] * 13))
    assert not is_dynamic(clip, 8, Given([1.49]))
    assert is_dynamic(clip, 8, Given([1.6], share=0.05))  # the largest 5 % are enough
    assert not is_dynamic(clip, 8, Given([1.6], share=0.04))
    assert not is_dynamic(clip, 4, Given([2.9]))  # frames twice as far apart
    assert is_dynamic(clip, 4, Given([3.1]))
    wide = torch.zeros(17, 3, 64, 128, dtype=torch.uint8)
    assert is_dynamic(wide, 8, Given([1.6]))  # the shorter side counts
    assert dynamic_degree(clip, 8, Given([0.0])) == 0.0


def test_very_short_clips_are_not_dynamic_by_themselves():
    clip = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert not is_dynamic(clip, 8, Given([0.0]))
    assert is_dynamic(clip, 8, Given([2.0]))
    assert not is_dynamic(clip, 30, Given([9.0]))  # of which one frame is looked at


def test_largest_motion_is_the_mean_of_the_largest():
    clip, flow = noise(6, 20), Given([1.0, 2.0, 3.0, 4.0, 5.0], share=0.1)
    assert largest_motion(clip, flow, 0.05).tolist() == [1, 2, 3, 4, 5]
    assert largest_motion(clip, Given([1.0], share=0.1), 0.2).tolist() == pytest.approx([0.5] * 5)
    many = torch.zeros(40, 3, 4, 4, dtype=torch.uint8)
    assert largest_motion(many, Given([float(i) for i in range(39)]), 1.0).tolist() == list(range(39))


def test_real_motion_and_stillness(moving):
    flow = LucasKanade()
    assert is_dynamic(moving, 8, flow)
    still = moving[:1].expand(17, -1, -1, -1)
    assert not is_dynamic(still, 8, flow)
    assert is_still(still, 8, flow)
    assert not is_still(moving, 8, flow)


# --- flickering ----------------------------------------------------------------------------------------------------------


def test_steadiness_is_the_formula_and_knows_extremes(moving):
    frames = moving.numpy().astype(np.float64)
    wanted = (255 - np.mean([np.abs(frames[i] - frames[i + 1]).mean() for i in range(16)])) / 255
    assert steadiness(moving) == pytest.approx(wanted, abs=1e-12)
    flicker = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    assert steadiness(flicker) == 1
    flicker[1::2] = 255
    assert steadiness(flicker) == 0  # uint8 differences must not wrap around
    assert steadiness(noise()) == pytest.approx(1 - 1 / 3, abs=0.01)  # two uniform numbers are a third apart
    with pytest.raises(ValueError, match="must have at least 2 frames, got 1"):
        steadiness(flicker[:1])


def test_the_filter_of_still_clips():
    """64 pixels: 0.75 count as motion, of 16 frames c = 2 pairs may; from end to end 3 pixels may be travelled."""
    clip = torch.zeros(16, 3, 64, 64, dtype=torch.uint8)
    ends = [0.0, 0.0]
    assert is_still(clip, 8, Given([0.8] * 2 + [0.0] * 13 + ends))
    assert not is_still(clip, 8, Given([0.8] * 3 + [0.0] * 12 + ends))
    assert is_still(clip, 8, Given([50.0] * 2 + [0.0] * 13 + ends))  # a cut and back
    assert is_still(clip, 8, Given([0.7] * 15 + [2.9, 2.9]))
    assert not is_still(clip, 8, Given([0.7] * 15 + [2.9, 3.1]))
    assert not is_still(clip, 8, Given([0.7] * 15 + [3.1, 2.9]))
    assert is_still(clip, 8, Given([9.0] * 15 + ends, share=0.0))
    assert temporal_flickering(clip, 8, Given([0.0])) == 1
    assert temporal_flickering(clip, 8, Given([9.0])) is None


# --- smoothness ----------------------------------------------------------------------------------------------------------


class Blend:
    """The mean of both frames."""

    name = "blend"

    def interpolate(self, first, second):
        return ((first.int() + second.int()) // 2).to(torch.uint8)


@pytest.mark.parametrize("num", [3, 4, 9, 40])
def test_smoothness_is_the_formula(num):
    frames = noise(num, 12)
    x = frames.numpy().astype(np.int64)
    errors = [np.abs((x[i - 1] + x[i + 1]) // 2 - x[i]).mean() for i in range(1, num - 1, 2)]
    assert motion_smoothness(frames, None, Blend()) == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-9)


def test_smoothness_orders_still_even_jumping_and_noise(moving):
    warp = WarpInterpolator(LucasKanade())
    jumping = moving.clone()
    jumping[1::2] = moving[torch.arange(1, 17, 2) - 1]  # every second frame stays behind
    scores = [motion_smoothness(clip, None, warp) for clip in (moving[:1].expand(9, -1, -1, -1), moving, jumping, noise(9, 64))]
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert scores == sorted(scores, reverse=True)
    assert scores[1] > 0.99
    assert 1 - scores[1] < 0.5 * (1 - scores[2])
    assert scores[1] > motion_smoothness(moving, None, Blend())  # a flow beats a double exposure
    with pytest.raises(ValueError, match="must have at least 3 frames, got 2"):
        motion_smoothness(moving[:2], None, warp)


def test_an_interpolator_must_keep_its_contract():
    class Half(Blend):
        def interpolate(self, first, second):
            return first[:, :, ::2]

    with pytest.raises(ValueError, match=r"blend: the middle must be uint8 \[1, 3, 8, 8\], got torch.uint8 \[1, 3, 4, 8\]"):
        checked_middle(Half(), noise(1, 8), noise(1, 8))
    assert WarpInterpolator(LucasKanade()).name == "warp[lucas-kanade]"


# --- quality and style ---------------------------------------------------------------------------------------------------


def test_quality_is_the_mean_of_verdicts():
    rows = torch.tensor([[4.0], [5.5], [7.0]])
    assert aesthetic_quality(rows) == pytest.approx(0.55)
    assert imaging_quality(10 * rows) == pytest.approx(0.55)
    with pytest.raises(ValueError, match=r"must be one number per frame \[F, 1\], got \[3, 2\]"):
        imaging_quality(torch.zeros(3, 2))


@pytest.mark.parametrize("sigma", [0, 5, 20])
def test_immerkaer_finds_the_deviation_of_noise(sigma):
    """On a ramp, which a difference of neighbours would take for noise."""
    ramp = torch.linspace(60, 190, 160).expand(160, 160).double() + torch.linspace(-20, 20, 160)[:, None]
    white = torch.randn(1, 1, 160, 160, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    image = (ramp + sigma * white).round().clamp(0, 255).to(torch.uint8).expand(1, 3, -1, -1)
    found = float(Immerkaer().noise(image))
    assert found == pytest.approx(math.hypot(sigma, math.sqrt(1 / 12)), rel=0.05, abs=0.2)  # rounding is noise too
    assert float(Immerkaer().encode_images(image)) == pytest.approx(100 / (1 + found / 10), rel=1e-5)


def test_immerkaer_refuses_specks():
    with pytest.raises(ValueError, match=r"must be at least 3 x 3 pixels, got \[2, 9\]"):
        Immerkaer().encode_images(torch.zeros(1, 3, 2, 9, dtype=torch.uint8))


def test_style_is_the_mean_cosine_with_one_text():
    frames = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 0]])
    assert style_cosine(frames, torch.tensor([[5.0, 0]])) == pytest.approx(0)
    assert style_cosine(frames[:2], torch.tensor([[1.0, 1.0]])) == pytest.approx(math.sqrt(0.5))
    with pytest.raises(ValueError, match="text must be the embedding of the style"):
        style_cosine(frames, None)
