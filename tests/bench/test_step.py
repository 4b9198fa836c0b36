"""One step of a pipeline: recorded as the pipeline calls it, made again, and taken apart."""

import time

import pytest
import torch
from torch import nn

from dqtk.bench.step import Step, profile, record_step
from dqtk.costs import LayerShape, shape_of
from dqtk.kernels import to_matrix
from dqtk.nn import QuantConv2d, QuantLinear
from dqtk.recipes import recipe_named

CPU = torch.device("cpu")


def test_the_step_is_the_pipelines_own_first(load_tiny):
    """Replayed on the same module it gives what the pipeline's first call of the denoiser gave."""
    pipe = load_tiny("pixart")
    step = record_step(pipe, batch=2)
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    from dqtk.bench.step import PROMPT
    from dqtk.resolve import call_kwargs_for

    with torch.no_grad():
        pipe([PROMPT] * 2, generator=generators, output_type="latent", num_inference_steps=20, **call_kwargs_for(pipe))
    hook.remove()
    assert (step.component, step.batch, len(step.calls)) == ("transformer", 2, 1)
    assert step.calls[0]["hidden_states"].shape[0] == 4  # both halves of guidance
    torch.testing.assert_close(step.runner(step.module)()[0][0], seen[0], rtol=1e-4, atol=1e-4)


def test_a_step_is_recorded_without_painting(load_tiny):
    """One call of the denoiser and no decoding, however many steps the pipeline would take."""
    pipe, calls = load_tiny("sdxl"), []
    pipe.unet.register_forward_hook(lambda module, args, output: calls.append("unet"))
    pipe.vae.decode = lambda *args, **kwargs: calls.append("vae")
    assert record_step(pipe).component == "unet"
    assert calls == ["unet"]


def test_sizes_reach_the_denoiser(load_tiny):
    pipe = load_tiny("pixart")
    usual, wide = record_step(pipe), record_step(pipe, height=32, width=128)
    assert usual.asked == {}
    assert wide.asked == {"height": 32, "width": 128}
    scale = pipe.vae_scale_factor
    assert wide.calls[0]["hidden_states"].shape[-2:] == (32 // scale, 128 // scale)


def test_sizes_that_a_pipeline_does_not_take(load_tiny):
    with pytest.raises(ValueError, match="num_frames must be left out for PixArtSigmaPipeline, got 8"):
        record_step(load_tiny("pixart"), num_frames=8)


class Guided:
    """A pipeline that calls its denoiser twice per step, once for each half of guidance; or never."""

    def __init__(self, calls):
        self.components = {"transformer": Denoiser()}
        self.calls = calls

    def __call__(self, prompt, generator=None, output_type="latent"):
        for time_ in (900, 600, 300):
            for _ in range(self.calls):
                self.components["transformer"](torch.zeros(len(prompt), 4), timestep=torch.tensor([time_]))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.linear(sample)


def test_both_calls_of_separate_guidance_are_one_step():
    step = record_step(Guided(2))
    assert [int(call["timestep"]) for call in step.calls] == [900, 900]
    assert len(step.runner(step.module)()) == 2


def test_a_denoiser_that_is_never_called():
    with pytest.raises(ValueError, match=r"Guided must call one of \['transformer'\], got no call"):
        record_step(Guided(0))


def test_arguments_follow_the_dtype_of_the_variant():
    seen = {}

    def call(**given):
        seen.update({name: value.dtype for name, value in given.items()})

    arguments = {"x": torch.zeros(2, dtype=torch.bfloat16), "t": torch.tensor([5]), "w": torch.zeros(1)}
    step = Step(component="m", module=nn.Linear(2, 2, dtype=torch.bfloat16), calls=(arguments,), batch=1, asked={})
    step.runner(call, torch.float32)()
    assert seen == {"x": torch.float32, "t": torch.int64, "w": torch.float32}
    step.runner(call)()
    assert seen["x"] == torch.bfloat16


class Sleeper(nn.Linear):
    def forward(self, x):
        time.sleep(0.02)
        return super().forward(x)


def test_a_profile_takes_a_step_apart():
    """Two calls of one watched layer and a pause outside it. (Sleeping is never shorter than asked.)"""
    model = nn.ModuleDict({"a": Sleeper(4, 6), "b": nn.Linear(6, 4)})

    def run():
        time.sleep(0.04)
        model["b"](model["a"](torch.zeros(3, 5, 4)))
        model["a"](torch.zeros(7, 4))

    found = profile(model, run, ["a"], CPU)
    assert [shape.input for _, shape in found.layers["a"]] == [(15, 4), (7, 4)]
    assert all(seconds >= 0.02 for seconds, _ in found.layers["a"])
    assert found.inside >= 0.04
    assert found.seconds >= found.inside + 0.04
    assert found.outside == pytest.approx(1 - found.inside / found.seconds)
    assert not model["a"]._forward_hooks
    assert not model["a"]._forward_pre_hooks


def test_a_quantized_layer_has_the_shape_of_the_layer_that_it_was():
    linear, conv = nn.Linear(64, 32, bias=False), nn.Conv2d(64, 8, (3, 1), stride=(2, 1), padding=(1, 0))
    spec, x = recipe_named("w8a8").main_spec(), torch.zeros(2, 3, 64)
    wide = shape_of(linear, x)
    assert wide == LayerShape(weight=(32, 64), input=(6, 64), bias=False)
    assert shape_of(QuantLinear.like(linear, spec), x) == wide
    image = torch.zeros(2, 64, 9, 5)
    square = shape_of(conv, image)
    assert square.rows == conv(image).numel() // 8
    assert shape_of(QuantConv2d.like(conv, spec), image) == square
    assert shape_of(conv, image[0]).input == (1, 64, 9, 5)
    assert square.k == to_matrix(conv.weight).shape[1]
