"""Solved layers in a checkpoint folder: interrupted runs go on, processes share the work, and nothing else changes."""

import errno
import importlib
import os
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from test_stages import BRANCH, LEARNED, PLAIN, Model, planned, state

import dqtk
from dqtk.calibrate import Stats
from dqtk.calibrate.replay import Call
from dqtk.processes import Processes
from dqtk.sources import load_pipeline
from dqtk.spec import GPTQ, LayerSpec, PerChannel, Reconstruct, TensorSpec, VectorCodebook

stages = importlib.import_module("dqtk.stages")
quantizing = importlib.import_module("dqtk.quantize")

WORDS = LayerSpec(
    weight=TensorSpec(format=VectorCodebook(words=16, length=2, group="all"), granularity=PerChannel()), solver=GPTQ()
)
RULES = (("blocks.0.*", LEARNED), ("blocks.1.*", BRANCH), ("blocks.2.*", PLAIN))


def a_model():
    torch.manual_seed(0)
    return Model().requires_grad_(False).eval()


def three_calls():
    inputs = [torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return Stats(calls=[Call("model", (), {"x": x}, 0.5) for x in inputs])


@pytest.fixture
def stats():
    return three_calls()


def quantized(stats, *rules, model=None, **options):
    model = model or a_model()
    return dqtk.quantize(model, planned(model, *(rules or RULES)), stats, progress=False, **options)


@pytest.fixture
def solved(monkeypatch):
    """Shapes of the weights of every group that is really solved from inputs; ``stop_at``: the group that fails."""
    seen, solve = [], stages.solve_site

    def see(weights, spec, inputs=None, **options):
        if inputs is not None:
            if len(seen) == see.stop_at:
                raise KeyboardInterrupt
            seen.append([tuple(weight.shape) for weight in weights])
        return solve(weights, spec, inputs, **options)

    see.stop_at, see.seen = None, seen
    monkeypatch.setattr(stages, "solve_site", see)
    return see


def test_a_checkpoint_changes_nothing(stats, tmp_path):
    assert state(quantized(stats, checkpoint=tmp_path)) == state(quantized(stats))


def test_an_interrupted_run_goes_on(stats, tmp_path, solved):
    solved.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        quantized(stats, checkpoint=tmp_path)
    solved.stop_at = None
    again = quantized(stats, checkpoint=tmp_path)
    assert len(solved.seen) == 8  # four groups of each learned block, none of them twice
    assert state(again) == state(quantized(stats))
    before = len(solved.seen)
    assert state(quantized(stats, checkpoint=tmp_path)) == state(again)
    assert len(solved.seen) == before


def test_a_file_that_was_cut_off_is_solved_again(stats, tmp_path, solved):
    solved.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        quantized(stats, checkpoint=tmp_path)
    journal = tmp_path / "solved" / "done-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-4])  # the last line was not whole
    solved.stop_at = None
    assert state(quantized(stats, checkpoint=tmp_path)) == state(quantized(stats))


def test_a_damaged_file_is_named(stats, tmp_path):
    quantized(stats, checkpoint=tmp_path)
    file = next((tmp_path / "solved").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=f"quantize: {file} must be complete and readable, got"):
        quantized(stats, checkpoint=tmp_path)


def test_other_work_is_refused(stats, tmp_path):
    quantized(stats, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"must be the unfinished work of this command, got another's \(different: plan, specs\)"):
        quantized(stats, ("blocks.1.*", LEARNED), checkpoint=tmp_path)
    louder = Stats(calls=[replace(call, kwargs={"x": 100 * call.kwargs["x"]}) for call in stats.calls])
    with pytest.raises(ValueError, match=r"\(different: stats\)"):
        quantized(louder, checkpoint=tmp_path)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"\(different: model\)"):
        quantized(stats, model=Model().requires_grad_(False).eval(), checkpoint=tmp_path)


@pytest.mark.parametrize("rules", [RULES, (("blocks.2.*", PLAIN), ("blocks.*", WORDS))], ids=["numbers", "shared books"])
def test_processes_share_the_groups(stats, tmp_path, monkeypatch, rules):
    """Threads stand for processes: each solves its share, and both end with the same model. Books are learned by the first."""
    alone, barrier, ran, shares = quantized(stats, *rules), threading.Barrier(2, timeout=60), {}, {}
    models = [a_model(), a_model()]
    me = threading.local()
    monkeypatch.setattr(quantizing, "processes", lambda: Processes(me.rank, 2, torch.device("cpu"), barrier.wait))
    solve = stages.solve_site

    def see(weights, spec, inputs=None, **options):
        if inputs is not None:
            shares.setdefault(me.rank, []).append(len(weights))
        return solve(weights, spec, inputs, **options)

    monkeypatch.setattr(stages, "solve_site", see)
    learn, learned = quantizing.shared_books, []
    monkeypatch.setattr(quantizing, "shared_books", lambda *args: learned.append(me.rank) or learn(*args))

    def run(rank):
        me.rank = rank
        ran[rank] = quantized(stats, *rules, model=models[rank], checkpoint=tmp_path)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {rank: len(share) for rank, share in shares.items()} == {0: 4, 1: 4}
    assert state(ran[0]) == state(ran[1]) == state(alone)
    assert learned == [0]


@pytest.mark.parametrize("option", [{"sequential": True}, {"refine": Reconstruct()}])
def test_what_one_process_does_alone(stats, tmp_path, monkeypatch, option):
    monkeypatch.setattr(quantizing, "processes", lambda: Processes(0, 2, torch.device("cpu"), lambda: None))
    with pytest.raises(
        ValueError,
        match=r"quantize: (checkpoint must be left out with sequential|block reconstruction and sequential must be left to one)",
    ):
        quantized(stats, checkpoint=tmp_path, **option)


def test_a_checkpoint_needs_something_that_takes_long(tmp_path):
    with pytest.raises(ValueError, match="quantize: checkpoint must be left out with recipe r, which learns nothing from inputs"):
        quantized(None, ("blocks.*", PLAIN), checkpoint=tmp_path)


def test_the_calibration_is_kept_too(load_tiny, tmp_path, monkeypatch):
    how = {"prompts": ["a red circle"], "call_kwargs": {"num_inference_steps": 1}, "checkpoint": tmp_path, "progress": False}
    rules = (dqtk.Rule(pattern="transformer_blocks.0.attn1.*", spec=LEARNED, why="test"),)
    plan = dqtk.plan(load_pipeline("tiny-pixart", "float32"), dqtk.Recipe(name="r", rules=rules))
    first = dqtk.quantize(load_tiny("pixart"), plan, **how)
    monkeypatch.setattr(type(first), "__call__", lambda *args, **kwargs: pytest.fail("it was calibrated again"))
    again = dqtk.quantize(load_tiny("pixart"), plan, **how)
    assert state(first.transformer) == state(again.transformer)


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (errno.ENOSPC, ValueError, "quantize: disk must have room for .*safetensors in .*goes on where it stopped"),
        (errno.EACCES, SafetensorError, "os error 13"),
    ],
)
def test_a_full_disk_is_said_in_words(stats, tmp_path, monkeypatch, code, kind, text):
    """safetensors has an error of its own for what the system says."""

    def refuses(*args, **options):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    monkeypatch.setattr(importlib.import_module("dqtk.shards"), "save_file", refuses)
    with pytest.raises(kind, match=text):
        quantized(stats, checkpoint=tmp_path)
