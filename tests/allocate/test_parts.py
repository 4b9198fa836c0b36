"""Parts of a run: which calls lie in which, what each loses, and mixtures of specs as candidates of the program."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dqtk
from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import Offers
from dqtk.allocate.parts import RunParts, mixtures, spec_in
from dqtk.allocate.probes import LARGEST, OutputSQNR
from dqtk.allocate.sensitivity import measure
from dqtk.allocate.weights import weighed, weights_of_parts
from dqtk.calibrate.schedule import run_times
from dqtk.checkpoint import quantized_layers
from dqtk.correct.sensitive_steps import Sensitivity as Harm
from dqtk.recipes import of_width
from dqtk.spec import ByLevel, ConstantToken, canonical, kinds_of


def spec(bits, inputs):
    return of_width(bits, inputs).main_spec()


def test_parts_in_the_order_of_the_run():
    """Times that fall (timesteps) and that rise (1 - sigma) along a run."""
    falling = RunParts(edges=(300.0, 700.0), rising=False)
    assert len(falling) == 3
    assert [falling.of(time) for time in (999, 701, 500, 299, 0)] == [0, 0, 1, 2, 2]
    rising = RunParts(edges=(0.3, 0.7), rising=True)
    assert [rising.of(time) for time in (0.0, 0.5, 1.0)] == [0, 1, 2]


def test_parts_of_a_run_hold_as_many_steps():
    pipe = dqtk.load("tiny-pixart")
    parts = RunParts.of_run(2, pipe, ["a circle"], {"num_inference_steps": 6})
    times = run_times(pipe, ["a circle"], {"num_inference_steps": 6})
    assert [parts.of(time) for time in times] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="parts must be at most the steps of a run, 2, got 3"):
        RunParts.of_run(3, pipe, ["a circle"], {"num_inference_steps": 2})


@pytest.mark.parametrize(("steps", "num"), [(4, 3), (5, 2), (20, 3), (7, 4)])
def test_parts_that_do_not_divide_the_steps(steps, num):
    """As many steps in each as can be, in order."""
    pipe, kwargs = dqtk.load("tiny-pixart"), {"num_inference_steps": steps}
    parts = RunParts.of_run(num, pipe, ["a circle"], kwargs)
    found = [parts.of(time) for time in run_times(pipe, ["a circle"], kwargs)]
    assert found == sorted(found)
    counts = [found.count(part) for part in range(num)]
    assert max(counts) - min(counts) <= 1


def test_mixtures_share_a_weight():
    """2 inputs in 3 parts: 2^3 - 2 mixtures; another weight's are its own; what is looked for does not mix."""
    narrow, wide, other = spec(4, 4), spec(4, 8), spec(8, 8)
    found = mixtures([narrow, wide, other], 3)
    assert len(set(found)) == len(found) == 6
    assert all(len(mixture.weights) == 1 for mixture in found)
    assert {tuple(spec_in(mixture, part, 3) for part in range(3)) for mixture in found} == {
        (a, b, c) for a in (narrow, wide) for b in (narrow, wide) for c in (narrow, wide) if not a == b == c
    }
    assert mixtures([replace(narrow, transforms=(ConstantToken(),)), replace(wide, transforms=(ConstantToken(),))], 2) == []


@pytest.fixture
def parted(measured, tmp_path):
    """The measured denoiser with weights of 4 bits, inputs of 3 and 8, and three parts; ``found`` in it."""
    run = RunParts(edges=(1.5, 2.5), rising=False)
    plans = [dqtk.plan(measured.pipe, of_width(4, given)) for given in (3, 8)]
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls, run)
    probes = {"content": probe, "quality": probe}
    found = measure(measured.pipe, plans, measured.stats, probes, measured.groups, folder=tmp_path / "work")
    return SimpleNamespace(**vars(measured) | {"plans": plans, "found": found, "probe": probe, "run": run})


def test_noise_of_parts_adds_up_to_the_score(parted):
    for (site, text), score in parted.found.scores.items():
        noises = parted.found.parts[site, text]
        assert len(noises) == 3
        assert 10 ** (-score / 10) == pytest.approx(sum(noises), rel=1e-9)


def test_a_mixture_scores_as_its_parts_do(parted):
    """Against what the calls of each part lose with the spec that serves them."""
    choice = next(c for c in parted.plans[0].choices if c.site.path == "last")
    narrow, wide = (next(c.spec for c in plan.choices if c.site == choice.site) for plan in parted.plans)
    mixed = ByLevel(specs=(narrow, wide), shares=(1 / 3,))
    low, high = parted.found.of(choice.site, narrow), parted.found.of(choice.site, wide)
    score = parted.found.of(choice.site, mixed)
    assert low < score < high
    first = next(noise for (site, text), noise in parted.found.parts.items() if parted.found.scores[site, text] == low)
    rest = next(noise for (site, text), noise in parted.found.parts.items() if parted.found.scores[site, text] == high)
    assert 10 ** (-score / 10) == pytest.approx(first[0] + rest[1] + rest[2], rel=1e-9)


def test_more_candidates_are_never_worse(parted):
    """At every budget between the least and the most: mixtures are added to what was there."""
    calls = {choice.site.id: [SimpleNamespace(operations=2 * choice.site.num_weights)] for choice in parted.plans[0].choices}
    num = sum(choice.site.num_weights for choice in parted.plans[0].choices)
    losses, gained = {"content": "noise", "quality": "noise"}, 0
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = Budget(amount=num * 4 * (3 + 5 * share), unit="bops")
        whole, mixed = (
            Offers.of(parted.plans, parted.found, budget, losses, parted.groups, calls=calls, parts=parts).allocated()
            for parts in (None, 3)
        )
        assert mixed.cost <= budget.amount * (1 + 1e-9)
        assert mixed.expected >= whole.expected - 1e-9
        powers = [10 ** (-value / 10) for value in mixed.in_parts()]
        assert 10 ** (-mixed.expected / 10) == pytest.approx(sum(powers) / 3, rel=1e-9)
        assert "in equal parts of a run, as they count: " in mixed.table()
        gained += mixed.expected > whole.expected + 0.1
    assert gained


def test_weights_keep_the_sum_and_follow_the_harm(parted, tmp_path, monkeypatch):
    """Parts by their error in the final latents; asked once, then read from the journal."""
    weights_module, asked = importlib.import_module("dqtk.allocate.weights"), []

    def errors(pipe, quantized, prompts, *, num_intervals, call_kwargs):
        asked.append(quantized.components["transformer"])
        rows = enumerate([0.01, 0.0, 0.3])
        return [Harm(begin=part / 3, end=(part + 1) / 3, error=error) for part, error in rows][::-1]

    monkeypatch.setattr(weights_module, "sensitive_steps", errors)
    args = (parted.pipe, parted.pipe.components, parted.plans, parted.found, parted.stats, 3, ["a"], None, tmp_path / "work")
    weights = weights_of_parts(*args)
    assert weights_of_parts(*args) == weights
    (asked,) = asked
    assert {layer.spec.input.bits for layer in quantized_layers(asked).values()} == {3}  # of the plans the one with most noise
    noises = [sum(parted.found.noises(c.site, c.spec)[part] for c in parted.plans[0].choices if c.spec) for part in range(3)]
    assert [weight * noise for weight, noise in zip(weights, noises, strict=True)] == pytest.approx(
        [share / 0.31 * sum(noises) for share in (0.01, 0.0, 0.3)]
    )
    found = weighed(parted.found, weights)
    for key, score in found.scores.items():
        assert 10 ** (-score / 10) == pytest.approx(
            weights[0] * parted.found.parts[key][0] + weights[2] * parted.found.parts[key][2]
        )


def test_from_prompts_to_a_model_that_runs(tmp_path):
    """Inputs of 4 and 8 bits in two halves of a run: stored once, quantized, saved and loaded."""
    pipe = dqtk.load("tiny-pixart")
    how = {"keep": ["*.[1-9].*", "*attn*"], "call_kwargs": {"num_inference_steps": 4}, "progress": False}
    least = dqtk.allocate(pipe, ["a circle"], [of_width(4, 4), of_width(4, 8)], "1PBOPs", folder=tmp_path / "w", parts=2, **how)
    cheapest = sum(min(c.cost for c in offered) for offered in least.offers.candidates.values())
    dearest = sum(max(c.cost for c in offered[:2]) for offered in least.offers.candidates.values())
    budget = Budget(amount=(cheapest + 3 * dearest) / 4, unit="bops")
    made = dqtk.allocate(pipe, ["a circle"], [of_width(4, 4), of_width(4, 8)], budget, folder=tmp_path / "w", parts=2, **how)
    mixed = {site: spec for site, spec in made.picked.items() if isinstance(spec, ByLevel)}
    assert mixed
    dqtk.quantize(pipe, made.plan, made.stats, prompts=["a circle"], call_kwargs=how["call_kwargs"], progress=False)
    dqtk.save(pipe, tmp_path / "out")
    layers = quantized_layers(dqtk.load(tmp_path / "out").transformer)
    for site, wanted in mixed.items():
        stored = layers[site.partition(":")[2]].spec
        assert kinds_of(stored) == kinds_of(wanted)
        assert stored.shares == wanted.shares
        assert len(stored.weights) == 1


def test_a_spec_that_overflows_mixes_to_the_worst_score(parted):
    """And is never chosen for any part."""
    choice = next(c for c in parted.plans[0].choices if c.site.path == "last")
    narrow, wide = (next(c.spec for c in plan.choices if c.site == choice.site) for plan in parted.plans)
    parted.found.parts[choice.site.id, canonical(narrow)] = (float("inf"), 1e-3, 1e-3)
    assert parted.found.of(choice.site, ByLevel(specs=(narrow, wide), shares=(1 / 3,))) == -LARGEST
    assert parted.found.of(choice.site, ByLevel(specs=(wide, narrow), shares=(1 / 3,))) > 0
    last = parted.pipe.components["transformer"].last
    with torch.no_grad():
        last.weight.fill_(float("inf"))
    score, noises = parted.probe.in_parts("transformer")
    assert score == -LARGEST
    assert noises == (float("inf"),) * 3


def test_parts_without_calls_are_refused():
    """They would seem to lose nothing, and get the narrowest inputs."""
    pipe, kwargs = dqtk.load("tiny-pixart"), {"num_inference_steps": 4}
    stats = dqtk.calibrate(pipe, ["a circle"], dqtk.plan(pipe, "w4a8"), call_kwargs={"num_inference_steps": 1}, progress=False)
    with pytest.raises(ValueError, match="stats must have calls in each of 2 parts of a run, got them in 1"):
        dqtk.allocate(pipe, ["a circle"], ["w8a8"], "9bits", stats=stats, parts=2, call_kwargs=kwargs, progress=False)
    with pytest.raises(ValueError, match="parts and weigh must come with prompts and without around"):
        dqtk.allocate(pipe, None, ["w8a8"], "9bits", stats=stats, parts=2, call_kwargs=kwargs, progress=False)


def test_parts_stand_alone():
    pipe = dqtk.load("tiny-pixart")
    with pytest.raises(ValueError, match="parts must stand without score, sweep and switch, got one"):
        dqtk.allocate(pipe, [f"{i} circles" for i in range(8)], ["w8a8"], "9bits", parts=2, switch=3)
    with pytest.raises(ValueError, match="parts must be from 2 to 4, or left out, got 5"):
        dqtk.allocate(pipe, ["a circle"], ["w8a8"], "9bits", parts=5)
