"""Step policies of pipelines: planned, made part of layers, saved, loaded by diffusers, streamed, at other numbers of steps."""

import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, HeunDiscreteScheduler

import dqtk
from dqtk.calibrate.schedule import run_times, time_at
from dqtk.checkpoint import config_of, quantized_layers
from dqtk.nn.steps import step_states
from dqtk.plan import Plan
from dqtk.policy import Interval, StepPolicy, combined, fixed, has_policy, protecting
from dqtk.spec import ByLevel, ConstantToken, LayerSpec, describe, without
from dqtk.streaming import quantize_folder

ENDS = protecting([(0, 0.2), (0.8, 1)])
FIVE = {"num_inference_steps": 5}


def quantized(load_tiny, recipe, policy, name="pixart", **kwargs):
    pipe = load_tiny(name, torch.bfloat16)
    return dqtk.quantize(pipe, dqtk.plan(pipe, recipe, policy=policy), call_kwargs=FIVE, progress=False, **kwargs)


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_holds_its_policy(load_tiny):
    pipe = load_tiny("pixart")
    plain, plan = dqtk.plan(pipe, "nvfp4"), dqtk.plan(pipe, "nvfp4", policy=ENDS)
    assert has_policy(plan)
    assert not has_policy(plain)
    assert plan.hash != plain.hash
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    changed = [choice for choice in plan.choices if isinstance(choice.spec, ByLevel)]
    assert len(plan.diff(plain)) == len(changed) == 60
    assert {choice.spec.shares for choice in changed} == {(0.2, 0.8)}
    assert all(choice.why.endswith("; step policy") for choice in changed)
    assert plan.sizes("transformer") == plain.sizes("transformer")  # one weight for both
    assert "A16 to 20 % / AFP4 E2M1 group 16 E4M3 to 80 % / A16" in plan.explain()


def test_another_weight_is_counted(load_tiny):
    pipe = load_tiny("pixart")
    four, eight = dqtk.plan(pipe, "w4a4-rot"), dqtk.plan(pipe, "w8a8")
    plan = dqtk.plan(pipe, "w4a4-rot", policy=protecting([(0, 0.1)], "w8a8"))
    assert plan.recipe == "w4a4-rot, w8a8 in 0 to 10 % of a run"
    for a, b, both in zip(four.choices, eight.choices, plan.choices, strict=True):
        alone = a if a.spec is None else replace(a, spec=without(a.spec, ConstantToken))
        assert both.bytes_after == (alone.bytes_after + b.bytes_after if a.spec != b.spec else a.bytes_after)
    assert "61 at 4 and 8 bit, 6 at 16 bit" in plan.explain(sites=False)


def test_what_one_interval_keeps_is_kept_throughout(load_tiny):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w8a8", policy=protecting([(0, 0.5)], "viditq-w4a8"), overrides={"*ff.net.2": None})
    whys = {choice.site.role: choice.why for choice in plan.choices}
    assert whys["modulation"] == "kept: 16 bits in a part of the run"
    assert whys["ff.down"] == "kept by request"
    alone = dqtk.plan(pipe, "w8a16", policy=protecting([(0, 0.5)]))  # inputs are in 16 bits already
    assert not has_policy(alone)
    whole = dqtk.plan(pipe, "w8a8", policy=protecting([(0, 1)], "w8a16"))
    assert [choice.spec for choice in whole.choices] == [choice.spec for choice in alone.choices]


def test_recipes_may_hold_policies_and_text_encoders_get_one_spec(load_tiny):
    recipe = dqtk.Recipe(
        name="mine",
        rules=(dqtk.Rule(spec=ByLevel(specs=(LayerSpec(weight=W8), LayerSpec(weight=W8, input=A8)), shares=(0.25,)), why="mine"),),
    )
    plan = dqtk.plan(load_tiny("pixart"), recipe, text_encoders=recipe)
    assert all(isinstance(choice.spec, ByLevel) for choice in plan.of("transformer").choices if choice.spec)
    encoder = [choice for choice in plan.of("text_encoder").choices if choice.spec]
    assert {describe(choice.spec) for choice in encoder} == {"W8 per channel, A8 per token"}
    assert {choice.why for choice in encoder} == {"mine; one spec: runs once, before there is noise"}
    with pytest.raises(
        ValueError,
        match=r"policy: transformer:.* of mine, 16-bit inputs in 0 to 20 % of a run, .*: specs must be one .*, got a policy",
    ):
        dqtk.plan(load_tiny("pixart"), recipe, policy=ENDS)


def test_layers_of_several_specs_look_for_no_constant_token(load_tiny):
    pipe = load_tiny("sdxl")
    mine = dqtk.plan(pipe, "w4a8", policy=ENDS).of("unet").choices
    plain = dqtk.plan(pipe, "w4a8").of("unet").choices
    text = [(choice, before) for choice, before in zip(mine, plain, strict=True) if choice.site.role.startswith("cross_attn.")]
    assert text
    for choice, before in text:
        had = ConstantToken() in before.spec.transforms
        assert had == (choice.site.role in ("cross_attn.k", "cross_attn.v"))
        assert choice.spec.specs[1] == without(before.spec, ConstantToken)
        assert choice.why == before.why + ("; step policy, so no constant token" if had else "; step policy")
    whole = dqtk.plan(pipe, "w4a8", policy=protecting([(0, 1)], "w4a8"))  # one spec at all levels: nothing is lost
    assert [choice.spec for choice in whole.choices] == [choice.spec for choice in dqtk.plan(pipe, "w4a8").choices]


def test_what_a_policy_cannot_do_names_the_site_and_the_policy(load_tiny):
    said = (
        r"policy: unet:\S+ of mixdq-w8a8, w8a8 in 0 to 10 % of a run: ByLevel: specs must have no ConstantToken and no "
        "ShortcutSplit, got W8 per channel, A8 per tensor asym, split"
    )
    with pytest.raises(ValueError, match=said):
        dqtk.plan(load_tiny("sdxl"), "mixdq-w8a8", policy=protecting([(0, 0.1)], "w8a8"))


W8 = dqtk.recipes.recipe_named("w8a8").main_spec().weight
A8 = dqtk.recipes.recipe_named("w8a8").main_spec().input


def test_policies_that_make_no_sense(load_tiny):
    with pytest.raises(ValueError, match=r"Interval: begin and end must be shares of a run, .*, got 0.5 and 0.5"):
        Interval(begin=0.5, end=0.5)
    with pytest.raises(ValueError, match="StepPolicy: intervals must be at least one, got none"):
        StepPolicy(intervals=())
    with pytest.raises(ValueError, match=r"StepPolicy: intervals must follow each other, got 0-0.5, 0.4-1"):
        StepPolicy(intervals=(Interval(begin=0, end=0.5), Interval(begin=0.4, end=1)))
    with pytest.raises(ValueError, match=r"protecting: intervals must be pairs \(begin, end\), got \(0, 0.1\). One is"):
        protecting((0, 0.1))
    with pytest.raises(ValueError, match=r"plan: policy must be a StepPolicy, got \[\(0, 0.1\)\]. For example dqtk.policy"):
        dqtk.plan(load_tiny("pixart"), "w8a8", policy=[(0, 0.1)])
    assert protecting([(0.5, 0.6), (0, 0.1), (0.1, 0.2)]).intervals == (
        Interval(begin=0, end=0.2),
        Interval(begin=0.5, end=0.6),
    )
    plans = [dqtk.plan(load_tiny(name), "w8a8") for name in ("pixart", "sdxl")]
    with pytest.raises(ValueError, match=r"policy: plans of intervals must have the sites of the main plan, got others"):
        combined(plans[0], [(Interval(begin=0, end=0.5), plans[1])])


# --- times of a run --------------------------------------------------------------------------------------------------


def test_times_are_those_that_the_denoiser_is_given(load_tiny, draw):
    pipe = load_tiny("pixart")
    seen = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    for scheduler in (type(pipe.scheduler), EulerDiscreteScheduler, HeunDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        seen.clear()
        draw(pipe, num_inference_steps=3)
        drawn = list(seen)
        assert run_times(pipe, call_kwargs={"num_inference_steps": 3}) == pytest.approx(drawn)


def given_time(pipe, unit):
    """The pipeline, its denoiser given time in another unit."""
    kind = type(pipe.transformer)

    def call(self, *args, timestep, **kwargs):
        return kind.__call__(self, *args, timestep=unit(timestep), **kwargs)

    pipe.transformer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return pipe


@pytest.mark.parametrize("unit", [lambda t: t / 1000, lambda t: 1 - t / 1000])
def test_other_units(load_tiny, unit):
    """As Flux and Lumina are given time."""
    pipe = load_tiny("pixart")
    expected = [unit(t) for t in run_times(pipe, call_kwargs=FIVE)]
    assert run_times(given_time(pipe, unit), call_kwargs=FIVE) == pytest.approx(expected)


def test_times_that_cannot_be_found(load_tiny):
    pipe = load_tiny("pixart")
    with pytest.raises(
        ValueError, match=r"step_policy: shares of a run must be found with a pipeline, got PixArtTransformer2DModel"
    ):
        run_times(pipe.transformer)
    with pytest.raises(
        ValueError, match=r"step_policy: the denoiser's time must be the scheduler's timestep t, .*, got 998001 for t = 999"
    ):
        run_times(given_time(pipe, lambda t: t**2))


@pytest.mark.parametrize(("steps", "num_empty"), [(2, 2), (3, 2), (5, 1), (10, 0)])
def test_the_counts_written_for_others_are_the_steps_that_run_so(load_tiny, draw, steps, num_empty):
    """Also where an end of the run is too short to hold a step: warned of, and no step is protected."""
    pipe = load_tiny("sdxl")
    kwargs = {"num_inference_steps": steps}
    plan = dqtk.plan(pipe, "w8a8", policy=protecting([(0, 0.1), (0.9, 1)]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dqtk.quantize(pipe, plan, call_kwargs=kwargs, progress=False)
    empty = [str(w.message) for w in said if "no step of" in str(w.message)]
    assert len(empty) == num_empty
    assert all(
        re.match(rf"step_policy: no step of {steps} lies in (0 to 10|90 to 100) % of a run: step i, .* / {steps}\.", text)
        for text in empty
    )
    written = config_of(pipe.unet, "")["runtime"]["diffusion_step_policy"]
    first, last = written["first_steps"]["count"], written["last_steps"]["count"]
    assert [kind == "0" for kind in kinds_seen(pipe, draw, steps)] == [i < first or i >= steps - last for i in range(steps)]


def test_time_is_linear_between_the_middles_of_steps():
    times = [900.0, 700.0, 500.0, 100.0]
    assert [time_at(times, share) for share in (0, 0.125, 0.25, 0.375, 0.5, 0.75, 1)] == [1000, 900, 800, 700, 600, 300, -100]
    assert time_at([5.0], 0.3) == 5.0


# --- pipelines -------------------------------------------------------------------------------------------------------


def kinds_seen(pipe, draw, steps):
    """Which kind served each denoiser call."""
    seen = []
    handle = pipe.components[next(n for n in ("transformer", "unet") if n in pipe.components)].register_forward_hook(
        lambda module, args, output: seen.append(step_states(module)[0].kind)
    )
    draw(pipe, num_inference_steps=steps)
    handle.remove()
    return "".join(seen)


@pytest.mark.parametrize(("recipe", "inside", "name"), [("w8a8", None, "pixart"), ("w8a8", "w4a16", "sdxl")])
def test_saved_and_loaded_it_paints_the_same(load_tiny, draw, tmp_path, recipe, inside, name):
    pipe = quantized(load_tiny, recipe, protecting([(0, 0.2), (0.8, 1)], inside), name)
    assert kinds_seen(pipe, draw, 5) == "01110"
    assert name == "sdxl" or kinds_seen(pipe, draw, 10) == "0011111100"
    pipe.save_pretrained(tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    denoiser = "unet" if name == "sdxl" else "transformer"
    mine, theirs = (getattr(p, denoiser).state_dict() for p in (pipe, loaded))
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert torch.equal(draw(loaded, num_inference_steps=3), draw(pipe, num_inference_steps=3))
    config = json.loads((tmp_path / "p" / denoiser / "config.json").read_text())["quantization_config"]
    assert ("runtime" in config) == (inside is None)
    if inside is None:
        assert config["runtime"]["diffusion_step_policy"] == {
            "schema_version": 1,
            "type": "first_last_n",
            "index_space": "denoising_loop_iteration",
            "scope": ["transformer"],
            "default_mode": "native",
            "first_steps": {"count": 1, "mode": "a16"},
            "last_steps": {"count": 1, "mode": "a16"},
            "overlap": "a16",
        }
    getattr(loaded, denoiser).dequantize()
    assert step_states(getattr(loaded, denoiser)) == []


def test_outside_and_inside_are_those_of_the_recipes(load_tiny, draw):
    """A run of one step lies at the beginning."""
    own = {name: draw(quantized(load_tiny, name, None), num_inference_steps=1) for name in ("w8a8", "w8a16")}
    first = quantized(load_tiny, "w8a8", protecting([(0, 0.2)], "w8a16"))  # one step is at the run's beginning
    assert torch.equal(draw(first, num_inference_steps=1), own["w8a16"])
    last = quantized(load_tiny, "w8a8", protecting([(0.8, 1)], "w8a16"))
    assert torch.equal(draw(last, num_inference_steps=1), own["w8a8"])


def test_learned_weights_are_those_of_the_recipe_alone(load_tiny):
    pipe, alone = load_tiny("pixart"), load_tiny("pixart")
    rest = {"transformer_blocks.[1-9]*": None}
    plan = dqtk.plan(pipe, "w4a4-rot", policy=ENDS, overrides=rest)
    stats = dqtk.calibrate(pipe, ["a circle"], plan, call_kwargs={"num_inference_steps": 2}, progress=False)
    dqtk.quantize(pipe, plan, stats, call_kwargs=FIVE, progress=False)
    dqtk.quantize(alone, dqtk.plan(alone, "w4a4-rot", overrides=rest), stats, progress=False)
    mine, theirs = pipe.transformer.state_dict(), alone.transformer.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_ranges_per_level_within_a_policy(load_tiny, draw):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w8a8-levels", policy=protecting([(0, 0.5)]))
    stats = dqtk.calibrate(pipe, ["a circle"], plan, call_kwargs={"num_inference_steps": 4}, progress=False)
    dqtk.quantize(pipe, plan, stats, progress=False)
    assert torch.isfinite(draw(pipe, num_inference_steps=3)).all()
    assert all(layer.spec.edges for layer in quantized_layers(pipe.transformer).values() if isinstance(layer.spec, ByLevel))


def test_streamed_when_its_times_are_known(load_tiny, tiny_folders, tmp_path):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w8a8", policy=protecting([(0, 0.2)], "w4a16"))
    with pytest.raises(
        ValueError, match=r"a streamed plan must know the noise levels of its step policy, got shares .* dqtk.policy.fixed"
    ):
        quantize_folder(tiny_folders["pixart"], tmp_path / "q", plan, progress=False)
    known = fixed(plan, pipe, call_kwargs=FIVE)
    assert fixed(known, pipe.transformer) == known
    quantize_folder(tiny_folders["pixart"], tmp_path / "q", known, progress=False)
    dqtk.quantize(pipe, known, progress=False)
    loaded = dqtk.load(tmp_path / "q")
    mine, theirs = pipe.transformer.state_dict(), loaded.transformer.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert config_of(loaded.transformer, "")["hash"] == config_of(pipe.transformer, "")["hash"]


def test_a_bare_denoiser_needs_edges(load_tiny):
    module = load_tiny("pixart").transformer
    plan = dqtk.plan(module, "w8a8", policy=ENDS)
    with pytest.raises(ValueError, match=r"step_policy: shares of a run must be found with a pipeline.*Give edges"):
        dqtk.quantize(module, plan, progress=False)
    assert not quantized_layers(module)
    given = replace(
        plan,
        choices=tuple(
            replace(choice, spec=replace(choice.spec, edges=(800.0, 200.0))) if isinstance(choice.spec, ByLevel) else choice
            for choice in plan.choices
        ),
    )
    dqtk.quantize(module, given, progress=False)
    assert step_states(module)[0].edges == (200.0, 800.0)
    assert "runtime" not in config_of(module, "")  # counts of steps are not known
