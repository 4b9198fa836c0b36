"""CLIP scores of frames, flow score, warp error and JEDi, against direct computation and known extremes."""

import math

import pytest
import torch
from dqtk.metrics.clip_frames import clip_temp, clipsim
from dqtk.metrics.extractors.lucas_kanade import LucasKanade
from dqtk.metrics.mmd import jedi
from dqtk.metrics.warp_error import flow_score, warp_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipsim_and_temp_are_means_of_cosines(dtype):
    generator = torch.Generator().manual_seed(0)
    frames, text = torch.randn(5, 7, generator=generator).to(dtype), torch.randn(1, 7, generator=generator).to(dtype)
    a, b = frames.double(), text.double()[0]

    def cosine(x, y):
        return float(x @ y / (x.norm() * y.norm()))

    assert clipsim(frames, text) == pytest.approx(sum(cosine(x, b) for x in a) / 5)
    assert clip_temp(frames) == pytest.approx(sum(cosine(x, y) for x, y in zip(a[1:], a[:-1], strict=True)) / 4)
    assert clip_temp(frames[:1].expand(4, -1)) == pytest.approx(1)
    assert clipsim(3 * frames, -text) == pytest.approx(-clipsim(frames, text), abs=1e-3 if dtype is torch.bfloat16 else 1e-7)


def test_what_frames_cannot_be():
    rows = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"clipsim: text must be one embedding \[1, D\], got \[2, 4\]\."):
        clipsim(rows, torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"clip_temp: the first set must be at least 2 rows, got 1\."):
        clip_temp(rows[:1])
    with pytest.raises(ValueError, match="clipsim: the first set must be rows other than zero"):
        clipsim(torch.zeros(2, 4), torch.ones(1, 4))


class Constant:
    """A flow of this many pixels to the right everywhere, and back as many where ``back``."""

    name = "constant"

    def __init__(self, right, back=True):
        self.right, self.back, self.calls = right, back, 0

    def flow(self, first, second):
        self.calls += 1
        sign = 1 if self.calls % 2 or not self.back else -1
        flow = torch.zeros(len(first), 2, *first.shape[2:])
        flow[:, 0] = sign * self.right
        return flow


def rolling(step, num=4, height=9, width=24):
    """A texture that moves ``step`` pixels to the right per frame and is never seen to end."""
    texture = torch.randint(0, 256, (3, height, width + step * num), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.stack([texture[..., (num - 1 - i) * step : (num - 1 - i) * step + width] for i in range(num)])


def test_a_flow_score_is_the_mean_length():
    assert flow_score(Constant(3.0, back=False), rolling(1)) == pytest.approx(3)
    assert flow_score(LucasKanade(), rolling(1)[:1].expand(4, -1, -1, -1)) == pytest.approx(0, abs=1e-4)


def test_a_warp_error_is_zero_where_motion_explains_all():
    clip = rolling(2)
    assert warp_error(Constant(2.0), clip) == pytest.approx(0, abs=1e-12)
    still = clip[:1].expand(4, -1, -1, -1)
    assert warp_error(Constant(0.0), still) == pytest.approx(0, abs=1e-12)  # float32 places
    flicker = still.clone()
    flicker[1::2] = 255 - flicker[1::2]
    wanted = float(((255 - 2 * still[0].double()) / 255).square().mean())
    assert warp_error(Constant(0.0), flicker) == pytest.approx(wanted)


def test_what_is_hidden_does_not_count():
    """The flow leads 2 pixels to the right and does not come back on the left half: only the right half counts."""

    class Half(Constant):
        def flow(self, first, second):
            flow = super().flow(first, second)
            if self.calls % 2 == 0:
                flow[..., :12] = 0
            return flow

    clip = rolling(2)
    broken = clip.clone()
    broken[1::2, :, :, :10] = 0  # what moves there is hidden
    assert warp_error(Half(2.0), broken) == pytest.approx(0, abs=1e-12)
    nothing = Constant(30.0)
    assert warp_error(nothing, clip) > 0  # all outside: all pixels count
    with pytest.raises(ValueError, match="warp_error: a clip must have at least 2 frames, got 1"):
        warp_error(Constant(0.0), clip[:1])


def test_jedi_is_the_distance_of_second_moments():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(11, 6, generator=generator), 0.3 + torch.randn(8, 6, generator=generator)
    a, b = x.double(), y.double()
    kernel = [[sum((u @ v / 6) ** 2 for u in p for v in q) / (len(p) * len(q)) for q in (a, b)] for p in (a, b)]
    assert jedi(x, y) == pytest.approx(100 * float(kernel[0][0] + kernel[1][1] - 2 * kernel[0][1]))
    moments = (a.T @ a / 11 - b.T @ b / 8) / 6
    assert jedi(x, y) == pytest.approx(100 * float(moments.square().sum()))
    assert jedi(x, x) == pytest.approx(0, abs=1e-9)
    assert jedi(x, -x) == pytest.approx(0, abs=1e-9)  # as its docstring warns
    assert math.isfinite(jedi(x.to(torch.bfloat16), y.to(torch.bfloat16)))
