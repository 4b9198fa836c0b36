"""Rounds, medians and ratios, under a clock that the test turns."""

import pytest
import torch

from dqtk.bench.timing import Spread, interleaved, stopwatch, threads, times_faster, waiter


class Clock:
    """Seconds that pass only when somebody works; work becomes slower with every second, as on a machine that others use too."""

    def __init__(self, drift=0.0):
        self.now, self.drift = 0.0, drift

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds * (1 + self.drift * self.now)


def test_every_method_once_per_round_in_changing_order():
    clock, order = Clock(), []

    def method(name, seconds):
        def call():
            order.append(name)
            clock.work(seconds)

        return call

    methods = {"a": method("a", 1.0), "b": method("b", 2.0), "c": method("c", 4.0)}
    times = interleaved(methods, 8, clock=clock)
    assert times == {"a": [1.0] * 8, "b": [2.0] * 8, "c": [4.0] * 8}
    rounds = [tuple(order[i : i + 3]) for i in range(3, len(order), 3)]  # behind the first calls, which are not timed
    assert len(rounds) == 8
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1


def test_waiting_is_inside_the_time():
    """A device that works on after the call has returned."""
    clock, left = Clock(), [0.0]

    def wait():
        clock.work(left[0])
        left[0] = 0.0

    times = interleaved({"kernel": lambda: left.__setitem__(0, 3.0)}, 2, wait=wait, clock=clock)
    assert times == {"kernel": [3.0, 3.0]}


def test_ratios_survive_a_machine_that_slows_down():
    clock = Clock(drift=0.02)
    times = interleaved({"slow": lambda: clock.work(0.3), "fast": lambda: clock.work(0.1)}, 30, clock=clock)
    assert times["slow"][-1] > 1.2 * times["slow"][0]
    found = times_faster(times["slow"], times["fast"])
    assert found.median == pytest.approx(3, rel=0.02)
    assert found.low <= found.median <= found.high


def test_ratios_are_within_a_round():
    assert times_faster([2.0, 8.0, 4.0], [1.0, 4.0, 2.0]) == Spread(median=2.0, low=2.0, high=2.0)
    with pytest.raises(ValueError, match="longer"):
        times_faster([1.0], [1.0, 2.0])


def test_quartiles():
    assert Spread.of([5.0]) == Spread(median=5.0, low=5.0, high=5.0)
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert Spread.of([1.0, 3.0]).median == 2.0


def test_progress_is_told_of_every_call():
    told = []
    interleaved({"a": lambda: None, "b": lambda: None}, 3, done=lambda: told.append(1))
    assert len(told) == 2 * (1 + 3)


def test_the_stopwatch_of_the_cpu_is_its_clock():
    mark, seconds = stopwatch(torch.device("cpu"))
    first, second = mark(), mark()
    assert seconds(first, second) == second - first >= 0
    assert waiter(torch.device("cpu"))() is None


def test_threads_are_given_back():
    before, seen = torch.get_num_threads(), []

    def fails():
        with threads(before + 1):
            seen.append(torch.get_num_threads())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
