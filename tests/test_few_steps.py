"""Few steps without guidance (Turbo, LCM: what MixDQ is for): every stage works where the denoiser is called once or twice."""

import warnings

import pytest
import torch

import dqtk
from dqtk.calibrate.schedule import run_times
from dqtk.checkpoint import quantized_layers
from dqtk.policy import protecting

PROMPTS = ["a large red circle in the top left on a plain black background", "two small blue squares on a striped background"]


@pytest.fixture(params=[1, 2])
def turbo(load_tiny, request):
    """tiny-sdxl as SDXL Turbo is called: a stochastic few-step sampler, no guidance, so batches of conditional rows only."""
    from diffusers import LCMScheduler

    pipe = load_tiny("sdxl")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe, {"num_inference_steps": request.param, "guidance_scale": 0.0}


def paint(pipe, kwargs):
    draw = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, generator=draw, output_type="pt", **kwargs).images


@pytest.mark.parametrize("recipe", ["mixdq-w8a8", "w8a8-levels"])
def test_calibrated_quantized_saved_and_loaded(turbo, recipe, tmp_path):
    pipe, kwargs = turbo
    exact = paint(pipe, kwargs)
    plan = dqtk.plan(pipe, recipe)
    stats = dqtk.calibrate(pipe, PROMPTS, plan, call_kwargs=kwargs, batch_size=1, progress=False)
    assert {call.run for call in stats.calls} <= {0, 1}
    dqtk.quantize(pipe, plan, stats, progress=False)
    got = paint(pipe, kwargs)
    assert 0 < float((got - exact).square().mean()) < 0.05
    dqtk.save(pipe, tmp_path / "turbo")
    again = dqtk.load(tmp_path / "turbo", dtype=torch.float32)
    assert type(again.scheduler).__name__ == "LCMScheduler"
    assert torch.equal(paint(again, kwargs), got)


def test_a_policy_of_one_step_or_two(turbo):
    """Two steps have a first half; of one step no interval can be a part, and that is said."""
    pipe, kwargs = turbo
    plan = dqtk.plan(pipe, "w4a8-rtn", policy=protecting([(0, 0.5)], "w8a8"))
    if len(run_times(pipe, PROMPTS, kwargs)) == 1:
        with pytest.raises(ValueError, match="step_policy: a run must have at least two steps"):
            dqtk.quantize(pipe, plan, call_kwargs=kwargs, progress=False)
        return
    dqtk.quantize(pipe, plan, call_kwargs=kwargs, progress=False)
    seen = []
    layer = next(layer for layer in quantized_layers(pipe.unet).values() if len(layer.spec.specs) == 2)
    layer.register_forward_hook(lambda module, args, output: seen.append(module.steps.kind))
    paint(pipe, kwargs)
    assert sorted(seen) == ["0", "1"]


def test_allocated_and_compared(turbo, load_tiny):
    pipe, kwargs = turbo
    keep = ["*down_blocks*", "*up_blocks*", "*conv*"]
    made = dqtk.allocate(pipe, PROMPTS, ["w4a8-rtn", "w8a8"], "15.5bits", keep=keep, call_kwargs=kwargs, progress=False)
    assert made.expected > 0
    candidate = load_tiny("sdxl")
    candidate.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    dqtk.quantize(candidate, made.plan, made.stats, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = dqtk.compare(pipe, candidate, PROMPTS, call_kwargs=kwargs, scores=("psnr",), progress=False)
    psnr = next(measure for measure in found.measures if measure.name == "psnr")
    assert psnr.estimate.value > 20
