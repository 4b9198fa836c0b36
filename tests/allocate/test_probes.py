"""SQNR of the output by hand, its ends, and its floor."""

import math

import pytest
import torch

from dqtk.allocate.probes import LARGEST, OutputSQNR
from dqtk.calibrate.replay import Call


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
