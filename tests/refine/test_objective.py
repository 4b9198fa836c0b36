"""What distillation minimizes: the error of the guided output, of calls drawn as often as they count in the final latents."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_distill import BRIEF, case
from torch import nn

from dqtk.refine.descent import drawn_at
from dqtk.refine.distill import distill, error_of
from dqtk.refine.influence import influence_of
from dqtk.spec import Distill


def test_the_guided_error_is_that_of_what_the_scheduler_sees():
    draw = torch.Generator().manual_seed(0)
    got, exact = (torch.randn(6, 4, 5, generator=draw, dtype=torch.float64) for _ in range(2))

    def guided(y):
        uncond, cond = y.chunk(2)
        return uncond + 4.5 * (cond - uncond)

    wanted = (guided(got) - guided(exact)).square().mean()
    assert float(error_of(got.float(), exact.float(), 4.5)) == pytest.approx(float(wanted), rel=1e-5)
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
    found = distill(module, given, exact, Distill(iterations=60, guidance=4.5), progress=False)
    assert found.after < found.before
    odd = [y[:3] for y in exact]
    with pytest.raises(
        ValueError, match=r"refine: guidance must be None for calls of unet that do not hold both .* got a batch of 3"
    ):
        distill(module, given, odd, Distill(iterations=2, guidance=2.0), name="unet", progress=False)


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
