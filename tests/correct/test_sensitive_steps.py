"""Intervals of a run by what quantizing each alone does to the final latents."""

import pytest
import torch

import dqtk
from dqtk.calls import final_latents
from dqtk.correct.sensitive_steps import geometric_error, sensitive_steps
from dqtk.policy import protecting

TWO = {"num_inference_steps": 2}
PROMPTS = ["a large red circle on a plain blue background"]


def quantized(load_tiny, policy=None):
    pipe = load_tiny("pixart")
    return dqtk.quantize(pipe, dqtk.plan(pipe, "w8a16", policy=policy), call_kwargs=TWO, progress=False)


def error(got, exact):
    return float((got - exact).square().sum() / exact.square().sum())


def test_each_interval_alone(load_tiny):
    pipe = load_tiny("pixart")
    found = sensitive_steps(pipe, quantized(load_tiny), PROMPTS, num_intervals=2, call_kwargs=TWO)
    assert sorted((part.begin, part.end) for part in found) == [(0, 0.5), (0.5, 1)]
    assert found[0].error >= found[1].error > 0
    assert "forward" not in vars(pipe.transformer)
    exact = final_latents(pipe, PROMPTS, 0, TWO, "test")
    whole = sensitive_steps(pipe, quantized(load_tiny), PROMPTS, num_intervals=1, call_kwargs=TWO)
    everything = error(final_latents(quantized(load_tiny), PROMPTS, 0, TWO, "test"), exact)
    assert whole[0].error == pytest.approx(everything, rel=0.05)


def test_no_prompt_decides_alone():
    """One of four turns over: by their mean this part would be the worse one."""
    exact = torch.full((4, 2, 3), 2.0)
    turned, even = exact + 0.1, exact + 0.2
    turned[3] = -2.0
    assert geometric_error(even, exact) == pytest.approx(0.01, rel=1e-4)
    assert geometric_error(turned, exact) == pytest.approx((0.0025**3 * 4) ** 0.25, rel=1e-4)
    assert error(turned, exact) > error(even, exact)
    assert geometric_error(exact, exact) == pytest.approx(1e-12, rel=1e-4)
    with pytest.raises(ValueError, match="sensitive_steps: final latents must be numbers"):
        geometric_error(exact * torch.nan, exact)


def test_what_cannot_be_ranked(load_tiny):
    with pytest.raises(ValueError, match=r"sensitive_steps: prompts must hold at least one prompt, got none"):
        sensitive_steps(load_tiny("pixart"), load_tiny("pixart"), [])
    with pytest.raises(ValueError, match=r"prompts must be a list of texts, got one text 'a circle'"):
        sensitive_steps(load_tiny("pixart"), load_tiny("pixart"), "a circle")
    with pytest.raises(ValueError, match=r"num_intervals must be at least 1, got 0"):
        sensitive_steps(load_tiny("pixart"), load_tiny("pixart"), PROMPTS, num_intervals=0)
    with pytest.raises(ValueError, match=r"must have the denoisers \['transformer'\], got \['unet'\]"):
        sensitive_steps(load_tiny("pixart"), load_tiny("sdxl"), PROMPTS)


def test_the_ranking_makes_a_policy(load_tiny):
    found = sensitive_steps(load_tiny("pixart"), quantized(load_tiny), PROMPTS, num_intervals=2, call_kwargs=TWO)
    policy = protecting([(part.begin, part.end) for part in found[:1]], "w8a8")
    assert torch.isfinite(final_latents(quantized(load_tiny, policy), PROMPTS, 0, TWO, "test")).all()
