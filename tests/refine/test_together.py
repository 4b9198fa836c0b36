"""Processes that share the calls of an iteration end with the same numbers, those of one process up to the order of sums."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from test_distill import case

from dqtk.refine import distill as distill_module
from dqtk.refine.descent import call_at
from dqtk.refine.distill import distill
from dqtk.spec import Distill, MostSensitive

CHOICE = Distill(iterations=40, batch=3, weight_rate=0.05)


class Threads:
    """Two threads that stand for processes: sums are made where both wait for each other."""

    def __init__(self):
        self.me, self.meet, self.given = threading.local(), threading.Barrier(2, timeout=60), {}
        self.world = 2

    @property
    def rank(self):
        return self.me.rank

    def add(self, tensor):
        self.given[self.rank] = tensor.detach().clone()
        self.meet.wait()
        total = self.given[0] + self.given[1]
        self.meet.wait()
        tensor.copy_(total)


def together(choice=CHOICE, file=None, change=lambda given, exact, rank: None):
    """What both end with: (module's tensors, what was found, or the error), by rank."""
    team, ends = Threads(), {}
    cases = [case(runs=12) for _ in range(2)]

    def run(rank):
        team.me.rank = rank
        module, given, exact, _ = cases[rank]
        change(given, exact, rank)
        try:
            found = distill(module, given, exact, choice, file=file, team=team, progress=False)
        except (ValueError, KeyboardInterrupt) as error:
            ends[rank] = error
            return
        ends[rank] = (module.state_dict(), found)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def alone(choice=CHOICE):
    module, given, exact, _ = case(runs=12)
    return distill(module, given, exact, choice, progress=False), module.state_dict()


def same(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_two_find_what_one_finds():
    (first, found), (second, also) = together().values()
    wanted, state = alone()
    assert same(first, second)
    assert found == also
    assert (found.before, found.after) == pytest.approx((wanted.before, wanted.after), rel=1e-3)
    flips = [float((tensor != state[name]).float().mean()) for name, tensor in first.items() if name.endswith("qweight")]
    assert max(flips) < 0.01  # codes whose number lay at a rounding edge
    assert all(torch.allclose(t.float(), state[n].float(), atol=1e-3) for n, t in first.items() if not n.endswith("qweight"))


def test_more_processes_than_calls_and_chosen_layers():
    (first, found), (second, _) = together(Distill(iterations=20, layers=MostSensitive(share=0.9, calls=3))).values()
    assert same(first, second)
    assert found.before == pytest.approx(alone(Distill(iterations=1))[0].before, rel=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = together()[0][0]
    file = tmp_path / "state" / "unet.safetensors"
    with monkeypatch.context() as patch:

        def stopping(turn, num, seed):
            if turn >= 25 * CHOICE.batch:  # both reach it: as when a machine goes down
                raise KeyboardInterrupt
            return call_at(turn, num, seed)

        patch.setattr(distill_module, "call_at", stopping)
        assert all(isinstance(end, KeyboardInterrupt) for end in together(file=file).values())
    assert [path.name for path in file.parent.iterdir()] == ["unet.safetensors"]
    asked = []
    monkeypatch.setattr(distill_module, "call_at", lambda turn, num, seed: asked.append(turn) or call_at(turn, num, seed))
    (first, _), (second, _) = together(file=file).values()
    assert sorted(asked) == list(range(24 * CHOICE.batch, 40 * CHOICE.batch))  # saved every second; each call made once
    assert same(first, whole)
    assert same(second, whole)


def test_all_stop_where_one_sees_no_number():
    def change(given, exact, rank):
        if rank == 1:
            exact[:] = [torch.full_like(y, torch.nan) for y in exact]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = together(change=change)
    assert all("loss must be a number, got nan at iteration 0" in str(end) for end in ends.values())


SCRIPT = """
import torch
from dqtk.processes import processes
me = processes()
tensor = torch.arange(3.0, dtype=torch.float64) * (1 + me.rank)
me.add(tensor)
assert tensor.tolist() == [0.0, 3.0, 6.0], tensor
me.wait()
"""


def test_processes_of_torchrun_add(tmp_path):
    (tmp_path / "adds.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "adds.py")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_one_process_adds_nothing():
    from dqtk.processes import ALONE

    tensor = torch.ones(2)
    ALONE.add(tensor)
    assert tensor.tolist() == [1, 1]
