"""Another scheduler or number of steps than those of calibration: every call, of both halves too, has the interval of its noise.

What is expected comes from the scheduler's own sigmas, not from the times that the denoiser is given.
"""

import math

import diffusers
import pytest
import torch

import dqtk
from dqtk.checkpoint import quantized_layers
from dqtk.correct.modulation import cache_pipeline
from dqtk.nn.correction import correction_of
from dqtk.nn.noise import noise_states
from dqtk.nn.steps import step_states
from dqtk.policy import protecting

PROMPTS = ["a large red circle on a plain blue background", "two small green squares on a striped background"]
CLIPS = ["a small red circle moving left slowly", "a medium blue cross moving up quickly"]
SMALL = {"height": 32, "width": 32}
ENDS = protecting([(0, 0.2), (0.8, 1)])
# Step numbers at which no time lies on an edge, midway between two times of calibration.
DIFFUSION = {
    "as calibrated": ({}, 6),
    "more steps": ({}, 10),
    "DDIM": ({"name": "DDIMScheduler"}, 5),
    "Euler, leading": ({"name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, 4),
    "Euler, Karras": ({"name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, 5),
    "DPM-Solver++": ({"name": "DPMSolverMultistepScheduler"}, 5),
    "DPM-Solver++, Karras": ({"name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, 5),
}
FLOW = {
    "as calibrated": ({}, 4),
    "more steps": ({}, 7),
    "Euler": ({"name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 5),
    "Euler, another shift": ({"name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}, 4),
    "DPM-Solver++": ({"name": "DPMSolverMultistepScheduler"}, 5),
}


def replace_scheduler(pipe, name=None, **options):
    kind = type(pipe.scheduler) if name is None else getattr(diffusers, name)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)


def levels_of(pipe, flow):
    """Share of noise at every step, from what the scheduler mixes pictures and noise by."""
    if flow:
        return [float(sigma) for sigma in pipe.scheduler.sigmas[: len(pipe.scheduler.timesteps)]]
    if hasattr(pipe.scheduler, "sigmas"):
        return [float(s / torch.sqrt(1 + s**2)) for s in pipe.scheduler.sigmas[: len(pipe.scheduler.timesteps)]]
    return [level_at(pipe, t, flow) for t in pipe.scheduler.timesteps]


def level_at(pipe, time, flow):
    """Share of noise at a time of training, between whole ones too; beyond both ends it goes on."""
    if flow:
        return float(time) / 1000
    table = torch.sqrt(1 - pipe.scheduler.alphas_cumprod.double())
    low = min(max(math.floor(time), 0), len(table) - 2)
    return float(table[low] + (table[low + 1] - table[low]) * (float(time) - low))


def seen_in(pipe, run):
    """What served every call of the denoiser: intervals of all layers with ranges per level, and kinds of all with a policy."""
    denoiser = pipe.components["transformer" if "transformer" in pipe.components else "unet"]
    layers = quantized_layers(denoiser).values()
    ranged = [layer for layer in layers if getattr(layer, "noise", None) is not None]
    stepped = [layer for layer in layers if getattr(layer, "steps", None) is not None]
    found = []

    def hook(module, args, output):
        intervals = {int(layer.noise.index(torch.device("cpu"))) for layer in ranged}
        kinds = {layer.spec.kinds.index(layer.way().spec) for layer in stepped}
        found.append((intervals, kinds))

    handle = denoiser.register_forward_hook(hook)
    run()
    handle.remove()
    return found


def expected(edges, level, pipe, flow):
    """The interval of a level among edges in time."""
    return sum(level >= level_at(pipe, edge, flow) for edge in edges)


def check_intervals(pipe, run, flow, per_step=1):
    denoiser = pipe.components["transformer" if "transformer" in pipe.components else "unet"]
    found, levels = seen_in(pipe, run), levels_of(pipe, flow)
    assert len(found) == per_step * len(levels)
    for state in noise_states(denoiser):
        wanted = [expected(state.edges, level, pipe, flow) for level in levels for _ in range(per_step)]
        assert [intervals for intervals, _ in found] == [{index} for index in wanted]
        assert len(set(wanted)) > 1
    for state in step_states(denoiser):
        wanted = [state.kinds[expected(state.edges, level, pipe, flow)] for level in levels for _ in range(per_step)]
        assert [kinds for _, kinds in found] == [{kind} for kind in wanted]
        assert len(set(wanted)) > 1
    assert noise_states(denoiser) or step_states(denoiser)


def quantized(pipe, prompts, recipe, policy, kept, **how):
    plan = dqtk.plan(pipe, recipe, policy=policy, overrides=kept)
    stats = dqtk.calibrate(pipe, prompts, plan, call_kwargs=how, progress=False) if plan.needs_stats else None
    return dqtk.quantize(pipe, plan, stats, call_kwargs=how, progress=False)


@pytest.fixture(scope="module", params=["ranges", "policy"])
def sdxl(load_tiny, request):
    recipe, policy = {"ranges": ("w8a8-levels", None), "policy": ("w8a8", ENDS)}[request.param]
    few = {"down_blocks*": None, "up_blocks*": None}
    return quantized(load_tiny("sdxl"), PROMPTS[:1], recipe, policy, few, num_inference_steps=6, **SMALL)


@pytest.mark.parametrize("case", DIFFUSION)
def test_diffusion(sdxl, draw, case):
    options, steps = DIFFUSION[case]
    before = sdxl.scheduler
    replace_scheduler(sdxl, **options)
    check_intervals(sdxl, lambda: draw(sdxl, num_inference_steps=steps, **SMALL), flow=False)
    sdxl.scheduler = before


@pytest.fixture(scope="module", params=["ranges", "policy"])
def wan(load_wan, small_clip, request):
    recipe, policy = {"ranges": ("w8a8-levels", None), "policy": ("w8a8", ENDS)}[request.param]
    few = {"blocks.[2-9]*": None}
    return quantized(load_wan(), CLIPS, recipe, policy, few, **small_clip | {"num_inference_steps": 4})


def paint(pipe, small_clip, steps, prompts=CLIPS[:1]):
    how = small_clip | {"num_inference_steps": steps, "output_type": "latent"}
    return pipe(prompts, generator=torch.Generator().manual_seed(0), **how).frames


@pytest.mark.parametrize("case", FLOW)
def test_flow_matching_with_a_call_per_half(wan, small_clip, case):
    """Two prompts: a batch that is as long as both halves of one."""
    options, steps = FLOW[case]
    before = wan.scheduler
    replace_scheduler(wan, **options)
    check_intervals(wan, lambda: paint(wan, small_clip, steps, CLIPS), flow=True, per_step=2)
    wan.scheduler = before


@pytest.mark.parametrize("recipe", [None, "w8a8-levels"])
def test_tables_serve_both_halves(load_wan, small_clip, recipe):
    """What depends on the noise level only, as tables: the same bits, with layers quantized per level or not."""
    pipe = load_wan()
    if recipe is not None:
        pipe = quantized(pipe, CLIPS, recipe, None, {"blocks.[2-9]*": None}, **small_clip)
    expected = paint(pipe, small_clip, 3)
    plain = paint(pipe, small_clip | {"guidance_scale": 1.0}, 3)
    made = cache_pipeline(pipe, CLIPS, call_kwargs=small_clip)["transformer"]
    assert "condition_embedder.time_proj" in made.paths
    assert torch.equal(paint(pipe, small_clip, 3), expected)
    assert not torch.equal(expected, plain)  # guidance does something
    with pytest.raises(ValueError, match="modulation: time must be one of the 3 that the tables were made for"):
        paint(pipe, small_clip, 4)


@pytest.fixture(scope="module")
def mended(load_wan, small_clip):
    """A Wan of one block with ranges per level whose output is corrected."""
    pipe = load_wan()
    pipe.transformer.blocks = pipe.transformer.blocks[:1]
    plan = dqtk.plan(pipe, "w8a8-levels")
    how = small_clip | {"num_inference_steps": 4}
    stats = dqtk.calibrate(pipe, CLIPS, plan, batch_size=1, call_kwargs=how, keep_calls=True, progress=False)
    return dqtk.quantize(pipe, plan, stats, correct=True, progress=False)


def test_the_correction_of_a_step_is_that_of_both_halves(mended, small_clip):
    made = correction_of(mended.transformer)
    assert made is not None
    seen = []
    handle = mended.transformer.register_forward_hook(
        lambda module, args, output: seen.append(int(made.noise.index(torch.device("cpu"))))
    )
    paint(mended, small_clip, 6)
    handle.remove()
    levels = levels_of(mended, flow=True)
    assert seen == [expected(made.edges, level, mended, True) for level in levels for _ in range(2)]
    assert len(set(seen)) == len(made.edges) + 1


def test_compiled_once_for_all_levels_steps_and_halves(mended, small_clip):
    """No break within the denoiser; its hooks (interval, correction) may be graphs of their own. Only the first call makes any."""
    eager = [paint(mended, small_clip, steps) for steps in (3, 5)]
    graphs, counts, plain = [], [], mended.transformer

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    whole = torch.compile(plain, backend=backend, fullgraph=True)
    whole.register_forward_hook(lambda module, args, output: counts.append(len(graphs)))
    mended.transformer = whole
    try:
        for steps, wanted in zip((3, 5), eager, strict=True):
            torch.testing.assert_close(paint(mended, small_clip, steps), wanted, rtol=1e-4, atol=1e-4)
    finally:
        mended.transformer = plain
    assert len(counts) == 2 * (3 + 5)
    assert set(counts) == {len(graphs)}
    assert len(graphs) <= 3
