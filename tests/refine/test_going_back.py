"""Where rates are too high the error rises many times over; learning goes back then, and on from there at half the rates."""

import copy
import math
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_discrete import BRIEF as WORDS
from test_discrete import ONE, words
from test_discrete import case as case_of_words
from test_distill import BRIEF, case
from test_together import Threads
from torch import nn

from dqtk.refine import descent
from dqtk.refine import discrete as discrete_module
from dqtk.refine import distill as distill_module
from dqtk.refine.descent import HALVINGS, Descent, call_at
from dqtk.refine.discrete import Steps
from dqtk.refine.distill import distill, watched_of
from dqtk.spec import RankDecay

HIGH = replace(BRIEF, bias_rate=0.9)


def same(module, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def sharp(rate, iterations=40, loss=lambda p, turn: 1 + 1e4 * (p - 0.01).square().sum()):
    """Adam at a rate that is wider than the valley it stands in: (the descent, the number, the errors that were watched)."""
    number, seen = nn.Parameter(torch.zeros(1)), []
    run = Descent([(rate, {"number": number})], [], iterations)

    def watch():
        seen.append(float(loss(number.detach(), None)))
        return seen[-1]

    run.run(lambda turn: loss(number, turn), None, "", "toy", False, watch=watch)
    return run, number, seen


def test_rates_are_halved_until_the_error_stays():
    run, number, seen = sharp(1.0)
    assert 1 <= run.halved <= HALVINGS
    assert max(seen) > descent.RISE * seen[0]
    assert seen[-1] < seen[0]
    assert number.item() == pytest.approx(0.01, abs=0.01)
    assert run.done == 40


def test_where_no_rate_helps_it_ends_with_what_was_good():
    with pytest.warns(
        UserWarning, match=r"toy: error .* at step 2, where it had been 2, at 64 times lower rates too; ends with step 0"
    ):
        run, number, seen = sharp(100.0)
    assert run.halved == HALVINGS + 1
    assert run.done == 0
    assert number.item() == 0
    assert len(seen) == 2 + HALVINGS


def test_rates_that_fit_are_left_alone(monkeypatch):
    watched = case(runs=12)
    found = distill(*watched[:3], BRIEF, progress=False)
    run = Descent.run
    monkeypatch.setattr(Descent, "run", lambda self, *args, watch, **more: run(self, *args, **more))
    alone = case(runs=12)
    assert distill(*alone[:3], BRIEF, progress=False) == found
    assert same(watched[0], alone[0].state_dict())


def test_a_student_that_would_be_thrown_away_is_kept(monkeypatch, capsys):
    found = distill(*case(runs=12)[:3], HIGH, name="unet")
    assert found.kept
    said = "".join(capsys.readouterr())
    assert "distill unet: error 0." in said
    assert "goes on from step 0 at half the rates" in said
    monkeypatch.setattr(descent, "RISE", math.inf)
    with pytest.warns(UserWarning, match="lowers no error"):
        assert not distill(*case(runs=12)[:3], HIGH, name="unet", progress=False).kept


def test_going_back_in_the_middle_is_resumed_to_the_same_bits(tmp_path, monkeypatch):
    """From the 20th iteration the answers are far away for a while: the error that is watched is put up by hand there."""
    rises = {"left": 2}
    mean = distill_module.error_of

    def rising(output, exact, guidance=None, halves=()):
        error = mean(output, exact, guidance, halves)
        return error if torch.is_grad_enabled() else error * factor["now"]

    factor = {"now": 1.0}

    def calls_of(stop):
        def take(turn, num, seed):
            if turn == stop:
                raise KeyboardInterrupt
            factor["now"] = 1.0
            if turn == 20 and rises["left"]:  # the look behind it finds it ten times as high
                rises["left"] -= 1
                factor["now"] = 10.0
            return call_at(turn, num, seed)

        return take

    monkeypatch.setattr(distill_module, "error_of", rising)
    whole, given, exact, _ = case(runs=12)
    monkeypatch.setattr(distill_module, "call_at", calls_of(None))
    found = distill(whole, given, exact, BRIEF, progress=False)
    assert rises["left"] == 0
    module, given, exact, _ = case(runs=12)
    rises["left"], file = 2, tmp_path / "unet.safetensors"
    monkeypatch.setattr(distill_module, "call_at", calls_of(40))
    with pytest.raises(KeyboardInterrupt):
        distill(module, given, exact, BRIEF, file=file, progress=False)
    monkeypatch.setattr(distill_module, "call_at", calls_of(None))
    assert distill(module, given, exact, BRIEF, file=file, progress=False) == found
    assert same(module, whole.state_dict())
    fast, given, exact, _ = case(runs=12)
    distill(fast, given, exact, BRIEF, progress=False)
    assert not same(fast, whole.state_dict())  # at a quarter of the rates from there


def test_processes_go_back_together(monkeypatch):
    team, ends, halved = Threads(), {}, []
    run_of = Descent.run
    monkeypatch.setattr(Descent, "run", lambda self, *args, **more: (run_of(self, *args, **more), halved.append(self.halved))[0])
    cases = [case(runs=12) for _ in range(2)]

    def run(rank):
        team.me.rank = rank
        ends[rank] = distill(*cases[rank][:3], replace(HIGH, batch=3), team=team, progress=False)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends[0] == ends[1]
    assert ends[0].kept
    assert halved == [2, 2]
    assert same(cases[0][0], cases[1][0].state_dict())


def test_a_loss_that_is_no_number_is_gone_back_from():
    def loss(number, turn):
        value = 1 + 1e4 * (number - 0.01).square().sum()
        return torch.where(number.abs() > 0.3, torch.nan, 1.0) * value

    run, number, _ = sharp(1.0, loss=loss)
    assert 1 <= run.halved <= HALVINGS
    assert math.isfinite(number.item())
    assert run.done == 40


def test_answers_that_are_no_numbers_are_an_error_whatever_the_rate():
    module, given, exact, _ = case(runs=12)
    before = copy.deepcopy(module.state_dict())
    exact[1] = torch.full_like(exact[1], torch.nan)  # of a call that is learned from and not watched
    with pytest.raises(ValueError, match="refine: loss must be a number, got nan at iteration"):
        distill(module, given, exact, BRIEF, progress=False)
    assert same(module, before)


def test_steps_of_words_are_taken_back_and_what_they_gathered_is_forgotten(monkeypatch):
    moved, starts, times = [], [], []
    after, forget = Steps.after, Steps.forget

    def stepped(self, done):
        if not starts:
            starts.extend(mine.mine.codes.clone() for mine in self.gathered)
        after(self, done)
        moved.append(any(not torch.equal(mine.mine.codes, start) for mine, start in zip(self.gathered, starts, strict=True)))
        for mine in self.gathered:
            mine.total += 1.0  # as where learning stops between two steps

    def forgotten(self):
        assert all(torch.equal(mine.mine.codes, start) for mine, start in zip(self.gathered, starts, strict=True))
        assert all(mine.total.any() for mine in self.gathered)
        times.append(1)
        forget(self)
        assert not any(mine.total.any() or mine.rows.any() or mine.blocks.any() for mine in self.gathered)

    monkeypatch.setattr(discrete_module, "falls_by_more_than_chance", lambda change: True)  # every step is taken
    monkeypatch.setattr(Steps, "after", stepped)
    monkeypatch.setattr(Steps, "forget", forgotten)
    monkeypatch.setattr(descent, "RISE", 0.0)  # every look finds the error too high
    module, given, exact, _ = case_of_words(words(ONE))
    with pytest.warns(UserWarning, match=r"ends with step 0|lowers no error"):
        distill(module, given, exact, WORDS, progress=False)
    assert any(moved)
    assert len(times) == HALVINGS + 1


def test_a_branch_that_fades_is_not_watched(monkeypatch):
    asked = []
    run = Descent.run
    monkeypatch.setattr(
        Descent, "run", lambda self, *args, watch, **more: asked.append(watch) or run(self, *args, watch=watch, **more)
    )
    module, given, exact, original = case(runs=4)
    originals = {"layers.0": original.layers[0], "layers.2": original.layers[2]}
    for choice in (BRIEF, replace(BRIEF, decay=RankDecay(rank=4))):
        distill(copy.deepcopy(module), given, exact, choice, originals=originals, progress=False)
    assert [watch is None for watch in asked] == [False, True]


def test_what_is_gone_back_to_is_in_the_file(tmp_path):
    """Watched: 2, then 3, then 100; the file of the second look holds the first one too."""
    errors, file = iter([2.0, 3.0, 100.0, 100.0]), tmp_path / "file.safetensors"

    def started(iterations):
        number = nn.Parameter(torch.zeros(1))
        return Descent([(0.1, {"number": number})], [], iterations), number

    def go(run, number, watch):
        run.run(lambda turn: (number - 1).square().sum(), file, "toy", "toy", False, watch=watch)

    def watch():
        if (error := next(errors)) == 100.0:
            raise KeyboardInterrupt
        return error

    run, number = started(40)
    with pytest.raises(KeyboardInterrupt):
        go(run, number, watch)
    run, number = started(40)
    heights = iter([100.0] + [2.0] * 20)
    go(run, number, lambda: next(heights))
    assert (run.halved, run.done) == (1, 40)
    assert len(list(heights)) == 0  # twenty looks from the start, not from the second one
    stored = dict(safe_open_all(file))
    old = {name: tensor for name, tensor in stored.items() if name not in descent.COUNTS}
    save_file(old, file, metadata={"identity": "toy"})
    with pytest.raises(ValueError, match=r"must belong to this model.*got one of an older version"):
        go(*started(40), watch)


def safe_open_all(file):
    with safe_open(file, framework="pt") as stored:
        return [(name, stored.get_tensor(name)) for name in stored.keys()]  # noqa: SIM118


def test_watched_calls_come_from_all_parts_of_a_run():
    levels = [run / 100 + step / 4 for run in range(5) for step in range(4)]  # 5 runs of 4 steps
    found = watched_of(list(range(20)), levels, [1.0] * 20, 4)
    assert [int(levels[i] * 4) for i in found] == [0, 1, 2, 3]
    counts = [float(step > 1) for run in range(5) for step in range(4)]
    assert {int(levels[i] * 4) for i in watched_of(list(range(20)), levels, counts, 4)} == {2, 3}
    assert len({i // 4 for i in found}) == 4  # and from different ones
    assert watched_of([3, 5], levels, [1.0] * 20, 4) == [5, 3]
