"""A pipeline with ranges per noise level: calibrated, saved, loaded by diffusers, stepped through at another number of steps."""

import pytest
import torch

import dqtk
from dqtk.checkpoint import quantized_layers
from dqtk.installed import installed_plan
from dqtk.nn.noise import noise_states
from dqtk.resolve import call_kwargs_for
from dqtk.spec import PerLevel, PerTensor

PROMPTS = ["a large red circle on a plain blue background", "two small green squares on a striped background"]


@pytest.fixture(scope="module")
def levels(load_tiny):
    pipe = load_tiny("pixart", torch.bfloat16)
    plan = dqtk.plan(pipe, "w8a8-levels", text_encoders="w8a8-levels")
    stats = dqtk.calibrate(
        pipe, PROMPTS, plan, call_kwargs=call_kwargs_for(pipe) | {"num_inference_steps": 6}, batch_size=2, progress=False
    )
    return dqtk.quantize(pipe, plan, stats, progress=False)


def edges(pipe):
    return {layer.edges for layer in quantized_layers(pipe.transformer).values() if layer.edges}


def test_layers_share_one_state_and_text_encoders_have_one_range(levels):
    assert len(edges(levels)) == len(noise_states(levels.transformer)) == 1
    layers = quantized_layers(levels.transformer).values()
    inputs = [layer.spec.input.granularity for layer in layers if layer.spec.input]
    assert {type(granularity) for granularity in inputs} <= {PerLevel, PerTensor}
    encoder = quantized_layers(levels.text_encoder).values()
    assert {layer.spec.input.granularity for layer in encoder if layer.spec.input} == {PerTensor()}


def test_saved_and_loaded_it_paints_the_same(levels, draw, tmp_path):
    from diffusers import DiffusionPipeline

    dqtk.save(levels, tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    assert edges(loaded) == edges(levels)
    assert torch.equal(draw(loaded, num_inference_steps=4), draw(levels, num_inference_steps=4))
    assert torch.equal(draw(loaded, num_inference_steps=9), draw(levels, num_inference_steps=9))


def test_explain_says_how_many_intervals_were_found(levels):
    (found,) = edges(levels)
    text = installed_plan(levels).explain(sites=False)
    assert f"W8 per channel, A8 per noise level ({len(found) + 1} intervals) asym" in text
    assert "A8 per noise level asym" not in text


def test_dequantized_it_forgets(levels, tmp_path):
    dqtk.save(levels, tmp_path / "p")
    pipe = dqtk.load(tmp_path / "p")
    pipe.transformer.dequantize()
    assert noise_states(pipe.transformer) == []
