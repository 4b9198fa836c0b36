"""SQNR of the output by hand, its ends, and its floor; scores of pictures."""

import math
from types import SimpleNamespace

import pytest
import torch
from dqtk.metrics.score import PairScore

from dqtk.allocate.probes import LARGEST, OutputSQNR, PictureScore
from dqtk.calibrate.replay import Call
from dqtk.resolve import scores


@pytest.fixture
def probe(measured):
    return OutputSQNR(measured.pipe.components, measured.stats.calls)


def test_it_is_the_mean_of_relative_noise_over_calls(measured, probe):
    """Calls of loud and quiet signals count alike: one of thousandfold power does not drown the others."""
    calls = list(measured.stats.calls)
    calls[0] = Call("transformer", (), calls[0].kwargs | {"hidden_states": 30 * calls[0].kwargs["hidden_states"]}, calls[0].level)
    probe, module = OutputSQNR(measured.pipe.components, calls), measured.pipe.components["transformer"]
    before = [module(**call.kwargs)[0] for call in calls]
    module.last.bias.data += 0.1
    after = [module(**call.kwargs)[0] for call in calls]
    ratios = [float((b - a).square().sum() / a.square().sum()) for a, b in zip(before, after, strict=True)]
    assert ratios[0] < ratios[1] / 100
    assert probe("transformer") == pytest.approx(-10 * math.log10(sum(ratios) / 3), abs=1e-4)


def test_its_ends(measured, probe):
    assert probe("transformer") == LARGEST
    module = measured.pipe.components["transformer"]
    module.last.bias.data[0] = math.inf
    assert probe("transformer") == -LARGEST
    with pytest.raises(ValueError, match=r"allocate: outputs of transformer must be finite and not zero, got others"):
        OutputSQNR(measured.pipe.components, measured.stats.calls)


def test_the_floor_is_that_of_bfloat16(measured, probe):
    """bf16 keeps 8 bits of a number: some 50 dB. The component itself stays as it is."""
    assert 35 < probe.floor("transformer") < 60
    assert next(measured.pipe.components["transformer"].parameters()).dtype == torch.float32
    assert probe("transformer") == LARGEST
    half = {"transformer": measured.pipe.components["transformer"].bfloat16()}
    calls = [
        Call(c.component, (), c.kwargs | {"hidden_states": c.kwargs["hidden_states"].bfloat16()}, c.level)
        for c in measured.stats.calls
    ]
    assert 35 < OutputSQNR(half, calls).floor("transformer") < 60


def test_without_calls(measured):
    with pytest.raises(ValueError, match=r"allocate: calls of transformer must have been kept, got none\. Calibrate this pipeline"):
        OutputSQNR(measured.pipe.components, [])


class Painter:
    """A pipeline of one number: every picture is noise of its generator plus ``shift``."""

    def __init__(self):
        self.shift, self.sizes = 0.0, []

    def __call__(self, prompt, generator, output_type, num_inference_steps):
        assert (output_type, num_inference_steps) == ("pt", 3)
        self.sizes.append(len(prompt))
        images = [0.25 + 0.5 * torch.rand(3, 16, 16, generator=one) + self.shift for one in generator]
        return SimpleNamespace(images=torch.stack(images))


def painted(score, num=5):
    pipe = Painter()
    return pipe, PictureScore(pipe, ["a"] * num, score, seed=3, batch_size=2, call_kwargs={"num_inference_steps": 3})


def test_pictures_are_paired_by_prompt_and_seed():
    pipe, probe = painted(PairScore(name="mad", label="", higher_is_better=False, load=lambda: _distance))
    assert (probe.name, probe.loss, probe.floor("transformer")) == ("mad of 5 pictures", "score", None)
    assert probe("transformer") == 0.0
    assert pipe.sizes == [2, 2, 1] * 2
    pipe.shift = 0.125
    assert probe("transformer") == pytest.approx(-0.125)  # a distance: less is better, so its sign is turned
    assert len(probe.references) == 3
    pipe.components = {"transformer": "its own"}
    assert probe("transformer", "its own") == pytest.approx(-0.125)
    with pytest.raises(ValueError, match="pictures must be those of the pipeline's own modules, got another"):
        probe("transformer", "another")
    assert not torch.equal(probe.references[0][0], probe.references[0][1])  # a seed for each


def test_scores_of_the_house():
    for name, best in (("ssim", 1.0), ("psnr", None)):
        pipe, probe = painted(scores()[name], num=2)
        same = probe("transformer")
        assert same == (scores()[name].cap if best is None else pytest.approx(best))  # PSNR of equal pictures is capped
        pipe.shift = 0.1
        assert probe("transformer") < same


def test_a_score_that_is_not_finite():
    _, probe = painted(PairScore(name="odd", label="", higher_is_better=True, load=lambda: lambda a, b: a.sum((1, 2, 3)) / 0))
    with pytest.raises(ValueError, match=r"allocate: odd of 5 pictures must be finite, got \[inf"):
        probe("transformer")


def _distance(candidate, reference):
    return (candidate - reference).abs().mean(dim=(1, 2, 3))
