"""Where rates are too high the error rises many times over; learning goes back then, and on from there at half the rates."""

import copy
import math
import threading
from dataclasses import replace

import pytest
import torch
from test_discrete import BRIEF as WORDS
from test_discrete import ONE, words
from test_discrete import case as case_of_words
from test_distill import BRIEF, case
from test_together import Threads
from torch import nn

from dqtk.refine import descent
from dqtk.refine import distill as distill_module
from dqtk.refine.descent import MOST, Descent, call_at
from dqtk.refine.discrete import Gathered, Steps
from dqtk.refine.distill import distill, watched_of

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

    run.run(lambda turn: loss(number, turn), None, "", "", False, watch=watch)
    return run, number, seen


def test_rates_are_halved_until_the_error_stays():
    run, number, seen = sharp(1.0)
    assert 1 <= run.halved <= MOST
    assert max(seen) > descent.RISE * seen[0]
    assert seen[-1] < seen[0]
    assert number.item() == pytest.approx(0.01, abs=0.01)
    assert run.done == 40


def test_where_no_rate_helps_it_ends_with_what_was_good():
    run, number, seen = sharp(100.0)
    assert run.halved == MOST + 1
    assert run.done == 0
    assert number.item() == 0
    assert len(seen) == 2 + MOST


def test_rates_that_fit_are_left_alone(monkeypatch):
    watched = case(runs=12)
    found = distill(*watched[:3], BRIEF, progress=False)
    monkeypatch.setattr(descent, "RISE", math.inf)
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


def test_processes_go_back_together():
    team, ends = Threads(), {}
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
    assert same(cases[0][0], cases[1][0].state_dict())


def test_a_loss_that_is_no_number_is_gone_back_from():
    def loss(number, turn):
        value = 1 + 1e4 * (number - 0.01).square().sum()
        return torch.where(number.abs() > 0.3, torch.nan, 1.0) * value

    run, number, _ = sharp(1.0, loss=loss)
    assert 1 <= run.halved <= MOST
    assert math.isfinite(number.item())
    assert run.done == 40


def test_what_steps_of_words_have_gathered_is_forgotten(monkeypatch):
    forgotten = []
    clear = Gathered.clear
    monkeypatch.setattr(Gathered, "clear", lambda self: forgotten.append(1) or clear(self))
    monkeypatch.setattr(Steps, "after", lambda self, done: None)
    monkeypatch.setattr(descent, "RISE", 0.0)  # every look finds the error too high
    module, given, exact, _ = case_of_words(words(ONE))
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match="lowers no error"):
        distill(module, given, exact, WORDS, progress=False)
    assert len(forgotten) % (MOST + 1) == 0
    assert forgotten
    assert same(module, before)


def test_watched_calls_come_from_all_parts_of_a_run():
    levels = [run / 100 + step / 4 for run in range(5) for step in range(4)]  # 5 runs of 4 steps
    found = watched_of(list(range(20)), levels, [1.0] * 20, 4)
    assert [int(levels[i] * 4) for i in found] == [0, 1, 2, 3]
    counts = [float(step > 1) for run in range(5) for step in range(4)]
    assert {int(levels[i] * 4) for i in watched_of(list(range(20)), levels, counts, 4)} == {2, 3}
    assert watched_of([3, 5], levels, [1.0] * 20, 4) == [5, 3]
