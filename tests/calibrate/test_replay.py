"""Calls that are kept and made again: copies, their choice, where a replay ends, and their files."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dqtk.calibrate import Stats
from dqtk.calibrate.placement import Around, ByDrift, Evenly, Every
from dqtk.calibrate.replay import Call, capturing, counted, kept, replay


class Denoiser(nn.Module):
    """Two layers; the second one is called as often as asked for, the third comes last."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.finished = 0

    def forward(self, x, t, extra=None, times=2):
        x = self.first(x)
        for _ in range(times):
            x = self.second(input=x)
        x = self.last(x)
        self.finished += 1
        return x


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(seed=0, level=0.5, component="transformer", **kwargs):
    return Call(component, (), {"x": seeded(2, 3, 4, seed=seed), "t": torch.tensor(10.0), **kwargs}, level)


def captured(module, run):
    with capturing({"transformer": module}, lambda name, part, given: 0.25) as calls:
        run()
    return calls


# --- keeping ---------------------------------------------------------------------------------------------------------


def test_kept_calls_are_copies():
    """What the pipeline does in place afterwards, as schedulers do with latents, changes nothing."""
    module, x, t = Denoiser(), seeded(2, 3, 4), torch.tensor(10.0)
    before = x.clone()

    def run():
        for _ in range(3):
            module(x, t)
            x.mul_(2)
            t.sub_(1)

    calls = captured(module, run)
    assert [float(c.kwargs["t"]) for c in calls] == [10, 9, 8]
    for i, c in enumerate(calls):
        assert torch.equal(c.kwargs["x"], before * 2**i)
        assert c.args == ()
        assert (c.component, c.level, c.time) == ("transformer", 0.25, 10 - i)
    assert not module._forward_pre_hooks


def test_what_calls_share_is_stored_once():
    """Text embeddings are the same in all steps; one copy serves them all, also inside containers."""
    module, text, mask = Denoiser(), seeded(2, 7), torch.ones(2, dtype=torch.bool)

    def run():
        for seed in range(3):
            module(seeded(2, 3, 4, seed=seed), torch.tensor(1.0), extra={"text": text, "masks": [mask, (mask, None)]})

    calls = captured(module, run)
    assert calls[0].kwargs["extra"]["text"] is calls[2].kwargs["extra"]["text"]
    assert calls[0].kwargs["extra"]["text"] is not text
    assert calls[0].kwargs["extra"]["masks"][0] is calls[1].kwargs["extra"]["masks"][1][0]
    assert calls[0].kwargs["x"] is not calls[1].kwargs["x"]
    assert calls[0].kwargs["extra"]["masks"][1][1] is None


def test_tensors_that_come_and_go_are_not_mixed_up():
    """A tensor that was freed leaves its place in memory, and its id, to the next one."""
    module = Denoiser()

    def run():
        for i in range(50):
            module(torch.full((1, 2, 4), float(i)), torch.tensor(float(i)))

    calls = captured(module, run)
    assert [float(c.kwargs["x"][0, 0, 0]) for c in calls] == [c.time for c in calls] == list(range(50))


def test_arguments_are_kept_by_name_and_without_graph():
    module = Denoiser()
    (c,) = captured(module, lambda: module(seeded(1, 2, 4).requires_grad_(), 3.0, None, times=1))
    assert list(c.kwargs) == ["x", "t", "extra", "times"]
    assert not c.kwargs["x"].requires_grad
    assert c.time == 3.0


def test_inference_mode_keeps_copies_too():
    module, x = Denoiser(), seeded(2, 3, 4)
    with torch.inference_mode():
        mine = x.clone()

        def run():
            for _ in range(2):
                module(mine, 1.0)
                mine.mul_(2)

        calls = captured(module, run)
    for i, c in enumerate(calls):
        assert torch.equal(c.kwargs["x"], x * 2**i)
    assert len(watch(module, calls, "first")["first"]) == 2


def test_no_hook_stays_after_an_exception():
    module = Denoiser()

    def interrupted():
        module(seeded(1, 2, 4), 3.0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captured(module, interrupted)
    assert not module._forward_pre_hooks


# --- choosing --------------------------------------------------------------------------------------------------------


def run_of(num_steps, per_step=1):
    """One pipeline run: a text encoder, then steps from time 999 down."""
    times = torch.linspace(999, 0, num_steps)
    steps = [
        Call("transformer", (), {"x": torch.tensor([float(i)]), "timestep": t, "half": half}, float(t) / 1000)
        for i, t in enumerate(times)
        for half in range(per_step)
    ]
    return [Call("text_encoder", (), {"x": torch.zeros(1)}, None), *steps]


def steps_of(calls):
    return [int(c.kwargs["x"]) for c in calls if c.level is not None]


def test_steps_lie_evenly_and_text_encoders_stay():
    chosen = kept(run_of(20), 5, 0, Evenly())
    assert steps_of(chosen) == [0, 4, 8, 12, 16]
    assert [c.component for c in chosen].count("text_encoder") == 1
    assert chosen[0].component == "text_encoder"


@pytest.mark.parametrize("num_steps", [4, 20, 28])
@pytest.mark.parametrize("num", [1, 3, 4])
def test_runs_together_cover_every_level(num_steps, num):
    """Each run takes steps at equal distances, and other ones than the run before."""
    seen = [steps_of(kept(run_of(num_steps), num, run, Evenly())) for run in range(2 * num_steps)]
    for steps in seen:
        assert len(steps) == num
        gaps = [b - a for a, b in pairwise([*steps, steps[0] + num_steps])]
        assert all(num_steps // num <= gap <= -(-num_steps // num) for gap in gaps)
    assert num == num_steps or seen[0] != seen[1]
    counts = torch.bincount(torch.tensor([step for steps in seen for step in steps]), minlength=num_steps)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 2


def test_all_steps_where_there_are_no_more():
    for run in range(5):
        assert steps_of(kept(run_of(3), 10, run, Evenly())) == [0, 1, 2]
    assert kept([], 10, 0, Evenly()) == []
    assert [c.component for c in kept(run_of(3)[:1], 10, 0, Evenly())] == ["text_encoder"]


def test_both_calls_of_a_guided_step_stay_together():
    """Families that call the denoiser once per half: unconditional and conditional of one time."""
    for run in range(4):
        chosen = [c for c in kept(run_of(10, per_step=2), 3, run, Evenly()) if c.level is not None]
        assert len(chosen) == 6
        assert [c.kwargs["half"] for c in chosen] == [0, 1] * 3
        assert [c.time for c in chosen[::2]] == [c.time for c in chosen[1::2]]


def test_denoisers_without_a_time_have_one_step_per_call():
    calls = [Call("transformer", (), {"x": torch.tensor([float(i)])}, 0.0) for i in range(6)]
    assert steps_of(kept(calls, 3, 0, Evenly())) == [0, 2, 4]


# --- making them again -----------------------------------------------------------------------------------------------


def watch(module, calls, *paths):
    """path -> inputs that were seen, with the seeds of their calls."""
    seen = {path: [] for path in paths}
    replay(module, calls, {path: lambda x, c, path=path: seen[path].append((x.clone(), c)) for path in paths})
    return seen


def test_inputs_are_those_of_the_calls():
    module, calls = Denoiser(), [call(0), call(1)]
    seen = watch(module, calls, "first", "second")
    for c, (x, of) in zip(calls, seen["first"], strict=True):
        assert torch.equal(x, c.kwargs["x"])
        assert of is c
    first, again = (x for x, _ in seen["second"][:2])
    torch.testing.assert_close(first, module.first(calls[0].kwargs["x"]))
    torch.testing.assert_close(again, module.second(first))
    assert len(seen["second"]) == 4
    assert not first.requires_grad
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_replay_ends_behind_the_last_watched_layer():
    """A later layer is called once, when the layers' calls are counted, and never again."""
    module, calls = Denoiser(), [call(seed) for seed in range(5)]
    later = []
    module.last.register_forward_pre_hook(lambda *_: later.append(1))
    watch(module, calls, "first", "second")
    assert len(later) == module.finished == 1
    watch(module, calls, "first")
    assert len(later) == module.finished == 2


def test_layers_may_be_called_more_or_less_often_than_in_the_first_call():
    module = Denoiser()
    for times in ((2, 3, 1), (1, 2, 4), (3, 1, 1)):
        calls = [call(seed, times=num) for seed, num in enumerate(times)]
        seen = watch(module, calls, "first", "second", "last")
        assert [len(seen[path]) for path in ("first", "last")] == [3, 3]
        assert [sum(of is c for _, of in seen["second"]) for c in calls] == list(times)


def test_a_layer_that_only_some_calls_reach_is_seen():
    module, calls = Denoiser(), [call(0, times=0), call(1, times=2), call(2, times=0)]
    assert [of for _, of in watch(module, calls, "first", "second")["second"]] == [calls[1]] * 2


def test_a_layer_that_is_never_reached():
    module = Denoiser()
    with pytest.raises(
        ValueError, match=r"calibrate: layer unused must be called while the pipeline runs, got no call of it and 0 more\. Keep it"
    ):
        watch(module, [call()], "first", "unused")
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_errors_of_the_model_are_not_swallowed():
    module = Denoiser()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        watch(module, [Call("transformer", (), {"x": seeded(2, 5), "t": 1.0}, 0.5)], "first")
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_layers_in_the_order_of_the_call():
    assert list(counted(Denoiser(), call(), ["last", "unused", "second", "first"])) == ["first", "second", "last"]


def test_nothing_to_do():
    module = Denoiser()
    replay(module, [], {"first": lambda *_: pytest.fail("called")})
    replay(module, [call()], {})
    assert module.finished == 0


# --- files -----------------------------------------------------------------------------------------------------------


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


def test_a_file_gives_back_the_same_calls(tmp_path):
    """Tensors of every kind, shared ones still shared; dictionaries, lists, tuples, numbers, text, None."""
    text = seeded(2, 7).bfloat16()
    kwargs = {
        "x": seeded(3, 4).T,
        "t": torch.tensor(999),
        "text": text,
        "added": {"ids": torch.tensor([[1.5, 2.0]], dtype=torch.float64), "nested": {"mask": torch.tensor([True, False])}},
        "parts": [text, (1, 2.5, None), [], ()],
        "flag": True,
        "num": 3,
        "name": "a|b",
        "empty": torch.zeros(0, 3),
        "guidance": None,
        "size": (64, 64),
    }
    calls = [Call("transformer", (), kwargs, 0.75), Call("text_encoder", (), {"x": text, "t": 1e-9}, None)]
    Stats(num_prompts=1, calls=calls).save(tmp_path / "s")
    loaded = Stats.load(tmp_path / "s").calls
    assert [(c.component, c.args, c.level) for c in loaded] == [(c.component, c.args, c.level) for c in calls]
    for old, new in zip(calls, loaded, strict=True):
        same(old.kwargs, new.kwargs)
    assert loaded[0].kwargs["text"] is loaded[0].kwargs["parts"][0] is loaded[1].kwargs["x"]
    assert Stats.load(tmp_path / "s").calls[0].kwargs["x"].is_contiguous()
    Stats(num_prompts=1, calls=loaded).save(tmp_path / "again")
    for old, new in zip(calls, Stats.load(tmp_path / "again").calls, strict=True):
        same(old.kwargs, new.kwargs)


def test_sizes_come_back_as_tuples(tmp_path):
    Stats(calls=[Call("transformer", (), {"shape": torch.Size([2, 3])}, 0.5)]).save(tmp_path / "s")
    assert Stats.load(tmp_path / "s").calls[0].kwargs == {"shape": (2, 3)}


class Pair(NamedTuple):
    a: int
    b: int


@pytest.mark.parametrize(
    ("value", "kind"),
    [(torch.float32, "dtype"), (object(), "object"), (Pair(1, 2), "Pair"), ({1, 2}, "set")],
    ids=["dtype", "object", "Pair", "set"],
)
def test_arguments_that_no_file_can_hold(value, kind, tmp_path):
    stats = Stats(calls=[Call("transformer", (), {"added": {"what": [value]}}, 0.5)])
    where = r"calibrate: argument transformer\.added\.what must be a tensor or plain data to be stored"
    with pytest.raises(ValueError, match=rf"{where}, got {kind}\. Calibrate without an output file"):
        stats.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_merged_statistics_have_the_calls_of_both():
    one, two = Stats(calls=[call(0)]), Stats(calls=[call(1), call(2)])
    merged = one.merge(two)
    assert [c.kwargs for c in merged.calls] == [c.kwargs for c in (*one.calls, *two.calls)]
    assert [c.run for c in merged.calls] == [0, 1, 1]  # runs of their own
    assert len(one.calls) == 1
    assert repr(one) == "Stats(0 prompts, 0 entries of 0 sites, 1 calls)"


def test_around_a_level_prefers_it_and_every_takes_all():
    """Of twenty steps from noise to picture, those near the level are kept more often; each run draws for itself, repeatably."""
    levels = [1 - i / 19 for i in range(20)]
    counts = [0] * 20
    for run in range(200):
        chosen = Around(level=0.2, spread=0.2).choose(levels, 5, run)
        assert chosen == sorted(set(chosen)) == Around(level=0.2, spread=0.2).choose(levels, 5, run)
        assert len(chosen) == 5
        for index in chosen:
            counts[index] += 1
    assert sum(counts[12:19]) > 5 * sum(counts[:7])
    assert Around(level=1.0, spread=1e-6).choose(levels, 20, 0) == list(range(20))
    assert Every().choose(levels, 3, 0) == list(range(20))
    assert len([c for c in kept(run_of(20), 3, 0, Every()) if c.level is not None]) == 20


@pytest.mark.parametrize("fields", [{"level": -0.1}, {"level": 1.1}, {"spread": 0.0}, {"spread": float("nan")}])
def test_around_what_cannot_be(fields):
    with pytest.raises(ValueError, match="Around: level must be from 0 to 1 and spread positive"):
        Around(**fields)


@pytest.mark.parametrize("num", [1, 3, 7, 19, 20])
def test_steps_by_drift_are_as_many_as_asked_for_and_lie_where_ranges_move(num):
    levels = [math.sin(math.pi / 2 * (1 - (i + 0.5) / 20)) for i in range(20)]  # one per bucket, from noise to picture
    still = ByDrift(moved=(1.0,) * 20)
    moving = ByDrift(moved=(0.0,) * 15 + (8.0,) * 5, floor=0.1)  # near the noise
    early = []
    for run in range(20):
        for placement in (still, moving):
            chosen = placement.choose(levels, num, run)
            assert chosen == sorted(set(chosen)) == placement.choose(levels, num, run)
            assert len(chosen) == num
            assert chosen[0] >= 0
            assert chosen[-1] < 20
        early += [index < 5 for index in moving.choose(levels, num, run)]
    share = sum(early) / len(early)
    assert share >= min(0.85, 5 / num - 0.1)
    assert share > 5 / 20 or num == 20


def test_steps_by_drift_of_nothing_that_moves_are_even():
    levels = [math.sin(math.pi / 2 * (1 - (i + 0.5) / 20)) for i in range(20)]
    counts = [0] * 20
    for run in range(40):
        for index in ByDrift(moved=(0.0,) * 20).choose(levels, 5, run):
            counts[index] += 1
    assert min(counts) >= 6
    assert max(counts) <= 15


@pytest.mark.parametrize("fields", [{"moved": ()}, {"moved": (-1.0,)}, {"moved": (math.nan,)}, {"moved": (1.0,), "floor": 0.0}])
def test_drift_that_cannot_be_is_refused(fields):
    with pytest.raises(ValueError, match="ByDrift: moved must be at least one number from 0 up"):
        ByDrift(**fields)
