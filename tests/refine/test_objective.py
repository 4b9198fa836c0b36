"""What distillation minimizes: the error of the guided output, of calls drawn as often as they count in the final latents."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_distill import BRIEF, W3A4, case
from torch import nn

import dqtk
from dqtk.calibrate import Stats
from dqtk.refine import distill as distill_module
from dqtk.refine.descent import drawn_at
from dqtk.refine.distill import distill, error_of
from dqtk.refine.influence import influence_of
from dqtk.refine.learning import learn
from dqtk.spec import Distill


def test_the_guided_error_is_that_of_what_the_scheduler_sees():
    draw = torch.Generator().manual_seed(0)
    got, exact = (torch.randn(6, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))

    def guided(y):
        uncond, cond = y.chunk(2)
        return uncond + 4.5 * (cond - uncond)

    wanted = (guided(got) - guided(exact)).square().mean()
    assert float(error_of(got.float(), exact.float(), 4.5)) == pytest.approx(float(wanted), rel=1e-5)
    turned = [torch.cat(y.float().chunk(2)[::-1]) for y in (got, exact)]
    assert float(error_of(*turned, 4.5, ("cond", "uncond"))) == pytest.approx(float(wanted), rel=1e-5)
    assert float(error_of(exact.float() + 0.5, exact.float(), 4.5)) == pytest.approx(0.25, rel=1e-4)  # alike in both: not amplified
    assert float(error_of(got.float(), exact.float())) == pytest.approx(float((got - exact).square().mean()), rel=1e-5)


def test_calls_are_drawn_as_often_as_they_count():
    weights = [0.0, 1.0, 3.0, 0.5]
    drawn = [drawn_at(iteration, weights, seed=1) for iteration in range(3000)]
    shares = [drawn.count(index) / 3000 for index in range(4)]
    assert shares == pytest.approx([weight / 4.5 for weight in weights], abs=0.03)
    assert drawn[:50] == [drawn_at(iteration, weights, seed=1) for iteration in range(50)]
    assert drawn[:50] != [drawn_at(iteration, weights, seed=2) for iteration in range(50)]


def test_the_calls_of_an_iteration_come_from_all_levels():
    """Four levels of five calls, the first counting as much as the others together: half of every batch is of it."""
    weights = [0.6] * 5 + [0.2] * 15
    for iteration in range(50):
        levels = [drawn_at(iteration * 6 + place, weights, seed=2, batch=6) // 5 for place in range(6)]
        assert levels == sorted(levels)
        assert [levels.count(level) for level in range(4)] == [3, 1, 1, 1]
    drawn = [drawn_at(turn, weights, seed=2, batch=6) for turn in range(6000)]
    assert [drawn.count(index) / 6000 for index in (0, 4, 5, 19)] == pytest.approx([0.1, 0.1, 1 / 30, 1 / 30], abs=0.02)
    assert {drawn_at(turn, [0.0, 1.0, 0.0], seed=0, batch=3) for turn in range(30)} == {1}


def test_only_calls_that_count_are_learned_from_and_judged():
    module, given, exact, _ = case(runs=12)
    quiet = [torch.full_like(y, torch.nan) if call.level == 0.9 else y for call, y in zip(given, exact, strict=True)]
    found = distill(module, given, quiet, Distill(iterations=20, influence=(1.0, 0.0)), progress=False)  # NaN would be an error
    assert found.before == found.before
    with pytest.raises(
        ValueError, match="refine: influence must count some calls of unet, of those learned from and of those held"
    ):
        distill(module, given, exact, Distill(influence=(0.0,) * 19 + (1.0,)), name="unet", progress=False)


def test_guidance_lowers_the_guided_error_and_needs_both_halves():
    module, given, exact, _ = case(runs=12)
    both = [replace(call, branches=("uncond", "cond")) for call in given]
    found = distill(module, both, exact, Distill(iterations=60, guidance=4.5), progress=False)
    assert found.after < found.before
    refused = [
        (given, "got a batch of 8 that may be either at noise level 0.200. Calibrate again with this version"),
        ([replace(call, branches=("all",)) for call in given], "got a batch of 8 in which no halves can be told"),
        ([replace(call, branches=("cond",)) for call in given], "got a batch of 8 of one half alone"),
        ([*halved(both[:1], exact)[0][:1], *both], "got a batch of 4 of one half alone"),
    ]
    for wrong, said in refused:
        with pytest.raises(ValueError, match=f"refine: guidance must be None for calls of unet that do not hold both .* {said}"):
            distill(module, wrong, exact, Distill(iterations=2, guidance=2.0), name="unet", progress=False)


def halved(given, exact):
    """Calls with both halves as two calls each, the conditional one first, and their answers."""
    calls, answers = [], []
    for call, y in zip(given, exact, strict=False):
        for index in (1, 0):
            kwargs = call.kwargs | {"sample": call.kwargs["sample"].chunk(2)[index]}
            calls.append(replace(call, kwargs=kwargs, branches=(("uncond", "cond")[index],)))
            answers.append(y.chunk(2)[index])
    return calls, answers


@pytest.mark.parametrize("influence", [(), (1.0, 2.0)])
def test_two_calls_of_a_step_are_learned_from_as_one_with_both_halves(influence):
    """The same errors, the same order, the same numbers; two prompts in every call, which make an even batch of each half."""
    choice = Distill(iterations=12, guidance=4.5, influence=influence)
    found, states = [], []
    for separate in (False, True):
        module, given, exact, _ = case(runs=4)
        both = [replace(call, branches=("uncond", "cond")) for call in given]
        calls, answers = halved(both, exact) if separate else (both, exact)
        found.append(distill(module, calls, answers, choice, progress=False))
        states.append(module.state_dict())
    assert found[1].before == pytest.approx(found[0].before, rel=1e-5)
    assert found[1].after == pytest.approx(found[0].after, rel=1e-4)
    assert found[0].kept
    for name, tensor in states[0].items():
        differ = (tensor.double() - states[1][name].double()).abs()
        assert int((differ > 1e-4).sum()) <= 0.01 * differ.numel(), name  # a code that lay between two


def test_an_iteration_of_several_calls_steps_with_their_mean():
    """A batch of calls that are all one call is that call."""
    states = []
    for num in (1, 3):
        module, given, exact, _ = case(runs=2)
        once = [replace(given[0], run=run) for run in range(3)]
        assert distill(module, once, exact[:1] * 3, replace(BRIEF, batch=num), progress=False).kept
        states.append(module.state_dict())
    same = [torch.equal(tensor, states[1][name]) for name, tensor in states[0].items() if name.endswith("qweight")]
    assert all(torch.allclose(t, states[1][name], atol=1e-5) for name, t in states[0].items() if t.is_floating_point())
    assert all(same)


CLIPS = [
    "a small red circle moving left slowly",
    "a medium blue cross moving up quickly",
    "a large green square moving right",
    "a small white digit 7 moving down",
]


def test_wan_learns_from_both_calls_of_a_step(load_wan, small_clip, tmp_path, monkeypatch):
    """Two prompts in a batch, an even number of samples in calls of one half each: what is lowered is the guided error."""
    pipe, original = load_wan(), load_wan()
    rule = dqtk.Rule(pattern="*.attn2.*", spec=W3A4, why="test")
    plan = dqtk.plan(pipe, dqtk.Recipe(name="w3a4", rules=(rule,)))
    stats = dqtk.calibrate(pipe, CLIPS, plan, batch_size=2, call_kwargs=small_clip, keep_calls=True, progress=False)
    stats.save(tmp_path / "stats")
    found = []
    monkeypatch.setattr(distill_module, "learn", lambda *args: found.append(learn(*args)) or found[-1])
    choice = Distill(iterations=4, weight_rate=0.1, scale_rate=0.01, guidance=5.0)
    dqtk.quantize(pipe, plan, Stats.load(tmp_path / "stats"), refine=choice, progress=False)
    assert found[0].kept
    held_out = [call for call in stats.calls if call.run == 1]
    with torch.no_grad():
        errors = [pipe.transformer(**c.kwargs)[0] - original.transformer(**c.kwargs)[0] for c in held_out]
    cond, uncond = torch.stack(errors[::2]), torch.stack(errors[1::2])
    wanted = float((uncond + 5.0 * (cond - uncond)).square().mean())
    assert found[0].after == pytest.approx(wanted, rel=0.01)  # stored as it learned, up to the rounding of inputs
    first, second = torch.stack(errors).unbind(1)  # as if the two prompts were the halves
    assert found[0].after != pytest.approx(float((first + 5.0 * (second - first)).square().mean()), rel=0.03)


def test_wan_learns_from_steps_after_the_end_of_its_guidance(load_wan, small_clip, monkeypatch):
    """A callback ends guidance after the first of three steps: the others count as they are, which is what the scheduler sees."""
    pipe, original = load_wan(), load_wan()

    def end_guidance(pipeline, step, time, tensors):
        pipeline._guidance_scale = 1.0
        return tensors

    rule = dqtk.Rule(pattern="*.attn2.*", spec=W3A4, why="test")
    plan = dqtk.plan(pipe, dqtk.Recipe(name="w3a4", rules=(rule,)))
    how = small_clip | {"callback_on_step_end": end_guidance}
    stats = dqtk.calibrate(pipe, CLIPS, plan, batch_size=2, call_kwargs=how, keep_calls=True, progress=False)
    assert [call.branches for call in stats.calls] == [("cond",), ("uncond",), ("all",), ("all",)] * 2
    found = []
    monkeypatch.setattr(distill_module, "learn", lambda *args: found.append(learn(*args)) or found[-1])
    choice = Distill(iterations=4, weight_rate=0.1, scale_rate=0.01, guidance=5.0)
    dqtk.quantize(pipe, plan, stats, refine=choice, progress=False)
    assert found[0].kept
    with torch.no_grad():
        errors = [pipe.transformer(**c.kwargs)[0] - original.transformer(**c.kwargs)[0] for c in stats.calls if c.run == 1]
    cond, uncond, *plain = errors
    wanted = [float(error.square().mean()) for error in (uncond + 5.0 * (cond - uncond), *plain)]
    assert found[0].after == pytest.approx(sum(wanted) / 3, rel=0.01)
    assert wanted[0] > 1.5 * max(wanted[1:])  # so that guiding all of them, or none, is seen


def test_wan_without_guidance_has_no_guided_error(load_wan, small_clip):
    pipe, plain = load_wan(), small_clip | {"guidance_scale": 1.0}
    plan = dqtk.plan(pipe, "w4a8-rtn")
    stats = dqtk.calibrate(pipe, CLIPS, plan, batch_size=2, call_kwargs=plain, keep_calls=True, progress=False)
    with pytest.raises(ValueError, match=r"guidance must be None for calls of transformer .* got a batch of 2 in which no halves"):
        dqtk.quantize(pipe, plan, stats, refine=Distill(iterations=2, guidance=5.0), progress=False)


# --- influence -------------------------------------------------------------------------------------------------------


class Sampler:
    """Final latents: the sum of the denoiser's outputs, each by a gain of its step. Flow matching: the level is t / 1000."""

    times, gains = (950.0, 600.0, 550.0, 20.0), (0.5, 2.0, 4.0, 0.25)

    def __init__(self):
        self.components = {"unet": Speaker()}
        self.scheduler = SimpleNamespace(config={"num_train_timesteps": 1000}, timesteps=torch.tensor(self.times))

    def __call__(self, prompt, generator, output_type, return_dict):
        x = torch.zeros(len(prompt), 4, 8, 8)
        for time, gain in zip(self.times, self.gains, strict=True):
            x = x + gain * self.components["unet"](torch.ones(len(prompt), 4, 8, 8), torch.tensor(time))[0]
        return (x,)


class Speaker(nn.Module):
    def forward(self, sample, timestep):
        return (sample * timestep / 100,)


def test_influence_is_what_the_final_latents_make_of_an_error():
    found = influence_of(Sampler(), ["a", "b"], num_intervals=3)
    mean = sum(gain**2 for gain in Sampler.gains) / 4
    expected = (0.25**2 / mean, (2**2 + 4**2) / 2 / mean, 0.5**2 / mean)  # angles 0.02; 0.58 and 0.64; 1.25 of 1.57
    assert found == pytest.approx(expected, rel=0.2)
    fine = influence_of(Sampler(), ["a"], num_intervals=12)
    assert fine[-1] == fine[-2] == pytest.approx(0.5**2 / mean, rel=0.2)  # no step in the last: as the nearest


@pytest.mark.parametrize(
    ("prompts", "how", "said"),
    [
        ([], {}, r"prompts must hold at least one prompt, got none\. Two show most of it"),
        ("a cat", {}, r"prompts must be a list of texts, got one text 'a cat'\. Put it in a list"),
        (["a"], {"size": 0}, r"size must be a positive share of the output, got 0\."),
        (["a"], {"size": float("nan")}, "size must be a positive share of the output, got nan"),
        (["a"], {"num_intervals": 0}, "num_intervals must be a positive integer, got 0"),
        (["a"], {"call_kwargs": {"output_typ": "pil"}}, r"call_kwargs must be arguments of Sampler .* got 'output_typ'"),
    ],
)
def test_influence_refuses(prompts, how, said):
    pipe = Sampler()
    with pytest.raises(ValueError, match=f"influence_of: {said}"):
        influence_of(pipe, prompts, **how)
    assert not pipe.components["unet"]._forward_hooks
