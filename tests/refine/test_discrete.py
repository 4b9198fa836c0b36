"""Words of vectors change in steps while books learn: few at a time, where it helps, to the same packed form."""

import copy
import math
import threading
from dataclasses import replace

import pytest
import torch
from test_together import Threads, same
from torch import nn

import dqtk
from dqtk.calibrate.answers import exact_outputs, outputs
from dqtk.calibrate.replay import Call
from dqtk.calibrate.stats import Stats
from dqtk.checkpoint import load_module, quantized_layers, save_module
from dqtk.methods.solve import solve
from dqtk.numerics.packing import unpack
from dqtk.quantize import runtime_layer
from dqtk.refine import discrete as discrete_module
from dqtk.refine import distill as distill_module
from dqtk.refine.descent import call_at
from dqtk.refine.discrete import FEWER, TRIES, Steps, falls_by_more_than_chance
from dqtk.refine.distill import distill
from dqtk.refine.team import ALONE
from dqtk.refine.trained import training
from dqtk.spec import (
    DiscreteSteps,
    Distill,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerTensor,
    ShortcutSplit,
    TensorSpec,
    Trellis,
    VectorCodebook,
)

ONE, TWO = VectorCodebook(words=16, length=2), VectorCodebook(words=16, length=4, books=2)
BRIEF = Distill(iterations=40, discrete=DiscreteSteps(share=0.05, every=4, calls=3))


def words(form, granularity=None, transforms=()):
    return LayerSpec(weight=TensorSpec(format=form, granularity=granularity or PerChannel()), transforms=transforms)


class Denoiser(nn.Module):
    """[B, T, 32]."""

    def __init__(self):
        super().__init__()
        self.norm, self.dtype = nn.LayerNorm(32), torch.float32
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False))

    def forward(self, sample, timestep):
        return (sample + self.layers(self.norm(sample) * (1 + timestep)),)


def calls(runs=12, seed=0):
    draw, mix = torch.Generator().manual_seed(seed), torch.randn(32, 32, generator=torch.Generator().manual_seed(5)) / 4
    return [
        Call("model", (), {"sample": torch.randn(4, 6, 32, generator=draw) @ mix, "timestep": torch.tensor(time)}, time, run)
        for run in range(runs)
        for time in (0.2, 0.9)
    ]


def case(spec):
    """A student, its calls, the original's answers, the original."""
    torch.manual_seed(0)
    original = Denoiser().requires_grad_(False)
    module, given = copy.deepcopy(original), calls()
    plan = dqtk.plan(module, dqtk.Recipe(name="words", rules=(dqtk.Rule(spec=spec, why="test"),)))
    dqtk.quantize(module, plan, progress=False)
    return module, given, exact_outputs({"model": original}, Stats(calls=given))["model"], original


def error(module, original, given):
    pairs = zip(outputs(module, given), outputs(original, given), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs) / len(given)


def codes_of(layer):
    """uint8 [N, K / length, books]."""
    form = layer.spec.weight.format
    return unpack(layer.qweight, form.code_bits, layer.k // form.length * form.books).unflatten(1, (-1, form.books))


# --- one step --------------------------------------------------------------------------------------------------------

LAYERS = {
    "one book": words(ONE),
    "two books": words(TWO),
    "one scale": words(ONE, PerTensor()),
    "rotated": words(TWO, transforms=(Hadamard(),)),
    "in parts": words(ONE, transforms=(ShortcutSplit(at=(8,)),)),
}


DRAWS = 3


def quantized(spec):
    """A layer of 12 x 32, with a row of zeros."""
    torch.manual_seed(0)
    linear = nn.Linear(32, 12).requires_grad_(False)
    linear.weight[3] = 0
    (solution,) = solve([linear.weight], spec)
    return runtime_layer(linear, solution)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_a_step_changes_at_most_the_share_of_each_layers_vectors(name, share):
    layer = quantized(LAYERS[name])
    errors = iter([1.0, 1.0, 0.5, 0.5])  # before, after
    with training({"layer": layer}, None, torch.Generator()) as learning:
        choice = DiscreteSteps(share=share, every=DRAWS, calls=2)
        steps = Steps(learning, choice, lambda _: torch.tensor(next(errors)), 1, ALONE, 9)
        before = {path: mine.codes.clone() for path, mine in learning.items()}
        for done in range(1, DRAWS + 1):
            layer(torch.randn(9, 32)).square().sum().backward()
            steps.after(done)
            assert done == DRAWS or all(torch.equal(before[path], mine.codes) for path, mine in learning.items())
        for path, mine in learning.items():
            changed = (before[path] != mine.codes).sum(dim=2)
            num = changed.numel()
            assert 0 < int(changed.sum()) == int(share * num)
            assert int(changed.max()) == 1  # one book's word of a vector
            row_of_zeros = mine.start_scale.expand(len(changed), 1)[3] == 0
            assert not (row_of_zeros and changed[3].any())
        learned = layer(torch.ones(1, 32)).detach()
        for mine in learning.values():
            mine.store()
    torch.testing.assert_close(layer(torch.ones(1, 32)), learned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-12])
@pytest.mark.parametrize("form", [ONE, TWO], ids=str)
def test_the_shortest_steps_to_other_words_are_taken(form, size):
    layer = quantized(words(form))
    gradients = []
    with training({"layer": layer}, None, torch.Generator()) as learning:
        mine = learning["layer"]
        steps = Steps(learning, DiscreteSteps(share=0.1, every=99), lambda _: torch.zeros(()), 1, ALONE, 9)
        add = mine.watch

        def watch(gradient):
            gradients.append(gradient.double() / size)
            add(gradient)

        mine.watch = watch
        for _ in range(DRAWS):
            (size * layer(torch.randn(9, 32)).square().sum()).backward()
        (found,) = [each.moves(10) for each in steps.gathered]
        books, scale = mine.codebook().detach().double(), mine.scale().detach().double()
        g = torch.stack(gradients)
        rows = g.square().sum(dim=(0, 2))
        rows = rows + rows.mean()
        wanted = []
        for n in range(12):
            for j in range(32 // form.length):
                here = g[:, :, j * form.length : (j + 1) * form.length]
                block = sum(each.T @ each for each in here)
                for m in range(form.books):
                    now = books[m, int(mine.codes[n, j, m])]
                    for w in range(form.words):
                        move = scale[n] * (books[m, w] - now)
                        bent = rows[n] * move @ block @ move
                        if bent > 0:
                            wanted.append((float(-2 * here[:, n].sum(0) @ move / bent), n * 32 // form.length + j, m, w))
        best = {}
        for strength, vector, book, word in sorted(wanted):
            best[vector] = (strength, book, word)
        order = sorted(best, key=lambda vector: -best[vector][0])[:10]
        assert found.vector.tolist() == order
        assert [(int(b), int(w)) for b, w in zip(found.book, found.word, strict=True)] == [best[v][1:] for v in order]


@pytest.mark.parametrize("form", [ONE, TWO], ids=str)
@pytest.mark.parametrize("numbers", [1, 5 * 16, 13 * 16], ids=lambda n: f"{n} numbers")
def test_tables_of_promises_are_bounded_whatever_the_words(form, numbers, monkeypatch):
    """A row of one vector at least; some rows of one; all rows of some: the same steps."""
    layer, tables = quantized(words(form)), []
    best_words = discrete_module._best_words

    def watched(g_NCD, *others):
        tables.append(g_NCD.shape[0] * g_NCD.shape[1] * form.words)
        return best_words(g_NCD, *others)

    with training({"layer": layer}, None, torch.Generator()) as learning:
        steps = Steps(learning, DiscreteSteps(share=0.1, every=99), lambda _: torch.zeros(()), 1, ALONE, 9)
        layer(torch.randn(9, 32)).square().sum().backward()
        (whole,) = [each.moves(10) for each in steps.gathered]
        monkeypatch.setattr(discrete_module, "_best_words", watched)
        monkeypatch.setattr(discrete_module, "NUMBERS", numbers)
        (found,) = [each.moves(10) for each in steps.gathered]
    assert max(tables) <= max(numbers, form.words)
    assert all(torch.equal(getattr(found, name), getattr(whole, name)) for name in ("vector", "book", "word"))


def test_outputs_that_hardly_matter_are_not_changed_first():
    layer, matters = quantized(words(ONE)), torch.ones(12)
    matters[6:] = 1e-3
    with training({"layer": layer}, None, torch.Generator()) as learning:
        steps = Steps(learning, DiscreteSteps(share=0.1, every=99), lambda _: torch.zeros(()), 1, ALONE, 9)
        for _ in range(DRAWS):
            (layer(torch.randn(9, 32)) * matters).square().sum().backward()
        (found,) = [each.moves(10) for each in steps.gathered]
    vectors = 32 // ONE.length
    assert len(found.vector) == 10
    assert int((found.vector < 6 * vectors).sum()) >= 9


def test_fewer_are_tried_where_the_error_does_not_fall_and_none_is_kept():
    layer = quantized(words(ONE))
    with training({"layer": layer}, None, torch.Generator()) as learning:
        mine, seen = learning["layer"], []

        def judge(call):
            seen.append((call, int((mine.codes != before).sum())))
            return torch.tensor(1.0)

        before = mine.codes.clone()
        steps = Steps(learning, DiscreteSteps(share=0.5, every=1, calls=4), judge, 3, ALONE, 2)
        layer(torch.randn(9, 32)).square().sum().backward()
        steps.after(1)
        assert torch.equal(mine.codes, before)
        assert [call for call, _ in seen] == [3, 4] * (TRIES + 1)  # the calls that the next iteration begins with
        sizes = [size for _, size in seen][::2]
        assert sizes[0] == 0
        assert sizes[1] > 60
        assert sizes[2:] == [math.ceil(sizes[1] * FEWER), math.ceil(sizes[1] * FEWER**2)]
        assert float(steps.part) == FEWER**TRIES
        layer(torch.randn(9, 32)).square().sum().backward()
        errors = iter([1.0, 1.0, 0.5, 0.5])
        steps.error = lambda call: torch.tensor(next(errors))
        steps.after(2)
        assert 0 < int((mine.codes != before).sum()) < 5
        assert float(steps.part) == FEWER ** (TRIES - 1)


@pytest.mark.parametrize(
    ("change", "falls"),
    [([-1.0], False), ([0.0], False), ([-1.0, -0.9, -1.1], True), ([-4.0, 1.0, 1.0, 1.0], False), ([1.0, 1.0], False)],
)
def test_one_call_that_gains_much_does_not_outweigh_those_that_lose(change, falls):
    assert falls_by_more_than_chance(torch.tensor(change)) is falls


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "factor"), [(ONE, 0.9), (TWO, 0.97)], ids=str)
def test_the_error_falls_further_than_by_continuous_steps_alone(form, factor, tmp_path):
    new, errors = calls(seed=1), {}
    for choice in (replace(BRIEF, discrete=None), BRIEF):
        module, given, exact, original = case(words(form))
        before, codes = error(module, original, new), {p: codes_of(layer) for p, layer in quantized_layers(module).items()}
        found = distill(module, given, exact, choice, progress=False)
        errors[choice.discrete] = error(module, original, new)
        changed = [float((codes_of(layer) != codes[path]).float().mean()) for path, layer in quantized_layers(module).items()]
        assert all(0 < share <= 10 * 0.05 for share in changed) if choice.discrete else not any(changed)
        held_out = [call for call in given if call.run in (3, 11)]
        assert error(module, original, held_out) == pytest.approx(found.after, rel=1e-4)  # stored as it learned
    assert errors[BRIEF.discrete] < factor * errors[None] < factor * before
    save_module(module, tmp_path / "saved")
    loaded = load_module(Denoiser(), tmp_path / "saved")
    assert same(module.state_dict(), loaded.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(loaded, new), outputs(module, new), strict=True))


def test_words_change_where_nothing_else_learns():
    module, given, exact, _ = case(words(ONE))
    before = copy.deepcopy(module.state_dict())
    found = distill(module, given, exact, replace(BRIEF, weight_rate=0, scale_rate=0), progress=False)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {"layers.0.qweight", "layers.2.qweight"} <= changed
    assert not any(name.endswith((".codebook", ".scale")) for name in changed)
    assert found.after < found.before


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, given, exact, _ = case(words(TWO))
    distill(whole, given, exact, BRIEF, progress=False)
    module, file, asked = case(words(TWO))[0], tmp_path / "state.safetensors", []
    before = copy.deepcopy(module.state_dict())

    def stopping(turn, num, seed):
        if turn == 27:  # the calls before it judge the step after 24 iterations, too
            raise KeyboardInterrupt
        return call_at(turn, num, seed)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "call_at", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill(module, given, exact, BRIEF, file=file, progress=False)
    assert same(before, module.state_dict())
    monkeypatch.setattr(distill_module, "call_at", lambda turn, num, seed: asked.append(turn) or call_at(turn, num, seed))
    distill(module, given, exact, BRIEF, file=file, progress=False)
    assert asked[0] == 24  # written where a step has just been made
    assert same(whole.state_dict(), module.state_dict())
    assert not same(whole.state_dict(), before)


def test_processes_change_the_same_words():
    team, ends = Threads(), {}
    cases = [case(words(ONE)) for _ in range(2)]

    def run(rank):
        team.me.rank = rank
        module, given, exact, _ = cases[rank]
        distill(module, given, exact, replace(BRIEF, iterations=12, batch=2), team=team, progress=False)
        ends[rank] = module

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(ends[0].state_dict(), ends[1].state_dict())
    assert not torch.equal(ends[0].layers[0].qweight, case(words(ONE))[0].layers[0].qweight)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (words(Trellis(bits=2)), "refine: discrete must be None for trellises, .* got one at layers.0 of model.*OfRoles"),
        (
            LayerSpec(weight=TensorSpec(format=Int(bits=3), granularity=PerChannel())),
            "refine: discrete must be None where no weights that are words of books learn, got none among 2 layers of model",
        ),
    ],
)
def test_layers_without_words_are_refused(spec, said):
    module, given, exact, _ = case(spec)
    with pytest.raises(ValueError, match=said):
        distill(module, given, exact, BRIEF, progress=False)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: DiscreteSteps(share=0), "DiscreteSteps: share must be above 0 and at most 1, got 0. PV-Tuning takes 0.01"),
        (lambda: DiscreteSteps(every=0), "DiscreteSteps: every must be a positive integer, got 0"),
        (lambda: DiscreteSteps(calls=1.5), "DiscreteSteps: calls must be a positive integer, got 1.5"),
        (lambda: DiscreteSteps(calls=1), "DiscreteSteps: calls must be at least 2, got 1. One error cannot be told from chance"),
        (
            lambda: Distill(iterations=5, discrete=DiscreteSteps(every=6)),
            "Distill: every of discrete must be at most the 5 iterations, got 6",
        ),
    ],
)
def test_wrong_choices(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
