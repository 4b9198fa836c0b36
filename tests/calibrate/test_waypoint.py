"""Replays that begin where the last one ended: the same inputs to the bit, fewer blocks run, in full where that would not be so."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import dqtk
from dqtk.calibrate.replay import Call, replay, waypoint_for
from dqtk.calibrate.waypoint import Waypoint
from dqtk.checkpoint import quantized_layers
from dqtk.recipes import recipe_named
from dqtk.sites import find_sites

NUM = 6


class Block(nn.Module):
    """Also scales its input by what it makes of the time: ``mod`` sees nothing of the blocks before."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.mod, self.ran = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8), 0

    def forward(self, x, time):
        self.ran += 1
        return x * (1 + 0.1 * self.mod(time.expand(8))) + time * self.down(self.up(x).tanh())


class Chain(nn.Module):
    """Blocks in a row.

    skip: in front of this block the first one's answer is added. pairs: blocks answer a tuple. again: calls after the first come
    back to the first block behind the second. late: calls after the first also go through another block, behind the first.
    """

    def __init__(self, skip=None, pairs=False, again=False, late=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.out = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(NUM)), nn.Linear(8, 8)
        self.late_blocks = nn.ModuleList([Block()])
        self.skip, self.pairs, self.again, self.late = skip, pairs, again, late
        if pairs:
            for block in self.blocks:
                block.forward = lambda x, time, block=block: (Block.forward(block, x, time), None)

    def forward(self, x, timestep):
        x, first, later = self.embed(x), None, float(timestep) > 1
        for number, block in enumerate(self.blocks):
            x = x + first if number == self.skip else x
            x = block(x, timestep)
            x = x[0] if self.pairs else x
            first = x if first is None else first
            x = self.late_blocks[0](x, timestep) if later and self.late and not number else x
            x = self.blocks[0](x, timestep) if later and self.again and number == 1 else x
        return self.out(x)


def calls(num=4):
    draw = torch.Generator().manual_seed(1)
    return [
        Call("transformer", (), {"x": torch.randn(2, 3 + i, 8, generator=draw), "timestep": torch.tensor(float(i + 1))}, 0.5)
        for i in range(num)
    ]


def paths(*numbers):
    return [f"blocks.{number}.{name}" for number in numbers for name in ("up", "down")]


def inputs(module, made, watched, waypoint=None):
    """What the layers saw: path -> inputs, and how often each block ran."""
    seen = {path: [] for path in watched}
    before = [block.ran for block in module.blocks]
    replay(module, made, {path: lambda x, call, path=path: seen[path].append(x.clone()) for path in watched}, waypoint)
    return seen, [block.ran - num for block, num in zip(module.blocks, before, strict=True)]


def same(one, two):
    return all(
        len(one[path]) == len(two[path]) and all(torch.equal(a, b) for a, b in zip(one[path], two[path], strict=True))
        for path in one
    )


@pytest.mark.parametrize("pairs", [False, True])
def test_stages_see_the_same_and_run_less(pairs):
    module, made = Chain(pairs=pairs), calls()
    waypoint = waypoint_for(module, made, [*paths(*range(NUM)), "out"], 2**20)
    total = Counter()
    for watched in (paths(0, 1), paths(2)[:1], [*paths(2)[1:], *paths(3)], paths(4, 5), ["out"]):
        plain, full = inputs(module, made, watched)
        again, ran = inputs(module, made, watched, waypoint)
        assert same(plain, again)
        total.update(full=sum(full) - sum(full) // (len(made) + 1), ran=sum(ran))  # without the pass that counts
        assert all(("forward" in vars(block)) == pairs for block in module.blocks)
    assert waypoint.trusted
    assert waypoint.begin == NUM - 1
    assert total["ran"] < 0.75 * total["full"]


def test_calls_that_were_not_the_first_begin_there():
    """Of four calls three begin in front of the last block looked into; the first is made in full, and once more from there."""
    module, made = Chain(), calls()
    waypoint = waypoint_for(module, made, paths(*range(NUM)), 2**20)
    inputs(module, made, paths(3), waypoint)
    assert inputs(module, made, paths(4), waypoint)[1] == [1, 1, 1, 1 + 4, 1 + 4, 0]


def check(module, stages, limit=2**20):
    """All stages see what full replays see; the waypoint behind them."""
    made = calls()
    every = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    waypoint = waypoint_for(module, made, every, limit)
    for watched in stages:
        assert same(inputs(module, made, watched)[0], inputs(module, made, watched, waypoint)[0]), watched
    return waypoint


def test_what_others_read_is_not_left_out():
    """A skip connection around the waypoint: seen by the first call, then replays are made in full."""
    assert not check(Chain(skip=NUM - 1), [paths(0, 1), paths(2, 3), paths(5), paths(5)[1:]]).trusted
    assert check(Chain(skip=1), [paths(0, 1), paths(2), paths(3), paths(4)]).begin == 4  # in front of all that is kept
    module, made = Chain(skip=NUM - 1), calls()
    waypoint = waypoint_for(module, made, paths(*range(NUM)), 2**20)
    for watched in (paths(0, 1), paths(2, 3), paths(5), paths(5)[1:]):
        _, full = inputs(module, made, watched)
        _, ran = inputs(module, made, watched, waypoint)
    assert ran == [num - 1 for num in full]  # all of every call; only the pass that counts is spared


def test_layers_that_see_nothing_of_the_blocks_prove_nothing():
    """Behind a skip the modulation of a block sees the same bits; what is kept for the next stage must be right too."""
    module = Chain(skip=2)
    waypoint = check(module, [["blocks.1.down"], ["blocks.2.mod"], ["blocks.3.mod"], ["blocks.3.up"], ["blocks.4.down"]])
    assert not waypoint.trusted


def test_calls_that_go_another_way():
    """Later calls reach a block that the first does not, or one twice."""
    late = check(Chain(late=True), [paths(3), ["late_blocks.0.up"], paths(4)])
    assert late.begin in (0, 4)
    check(Chain(again=True), [paths(1), paths(2)[:1], paths(3)])
    check(Chain(again=True), [paths(0), paths(1), paths(4)])


def test_a_model_that_zeros_do_not_fit():
    module = Chain()
    plain = module.blocks[2].forward

    def strict(x, time):
        if not bool(x.any()):
            raise RuntimeError("no zeros here")
        return plain(x, time)

    module.blocks[2].forward = strict
    module.blocks[1].register_forward_hook(lambda block, args, output: output)
    hurdle = module.blocks[3].register_forward_pre_hook(lambda block, args: _refuse(args[0]))
    assert check(module, [paths(3), paths(4)]).begin == 4
    hurdle.remove()
    module.blocks[1].register_forward_hook(lambda block, args, output: _refuse(output))
    assert not check(module, [paths(3), paths(5), paths(5)]).trusted


def _refuse(x):
    if not bool(x.any()):
        raise RuntimeError("no zeros here")


def test_blocks_that_changed_meanwhile_run_again():
    """Sequential solving: what is kept lies in front of the block that changes next."""
    module, made = Chain(), calls()
    waypoint = waypoint_for(module, made, paths(*range(NUM)), 2**20)
    for number in range(NUM):
        plain, _ = inputs(module, made, paths(number))
        again, _ = inputs(module, made, paths(number), waypoint)
        assert same(plain, again)
        with torch.no_grad():
            module.blocks[number].up.weight.mul_(1.1)
    assert waypoint.trusted


@pytest.mark.parametrize("room", [0, 1, 2.5, 4, 8])
def test_no_more_is_kept_than_allowed(room, monkeypatch):
    """In bytes of one call's answers, at any moment; where there is no room replays are made in full."""
    size, most = max(4 * call.kwargs["x"].numel() for call in calls()), 0
    fits = Waypoint._fits

    def watched_fits(self, output):
        nonlocal most
        found = fits(self, output)
        kept = [leaf for kept in (self._kept, self._new) for leaf in tree_leaves(list(kept.values())) if hasattr(leaf, "copy")]
        most = max(most, sum(4 * leaf.copy.numel() for leaf in kept) + (4 * output.numel() if found else 0))
        return found

    monkeypatch.setattr(Waypoint, "_fits", watched_fits)
    waypoint = check(Chain(), [paths(2), paths(4), paths(5)], limit=room * size)
    assert most <= room * size
    assert waypoint.trusted == (room == 8)


def test_a_layer_before_the_waypoint():
    module, made = Chain(), calls()
    waypoint = waypoint_for(module, made, paths(*range(NUM)), 2**20)
    inputs(module, made, paths(4), waypoint)
    plain, _ = inputs(module, made, paths(1))
    assert same(plain, inputs(module, made, paths(1), waypoint)[0])


@pytest.mark.parametrize(("name", "component"), [("pixart", "transformer"), ("sdxl", "unet")])
@pytest.mark.parametrize("sequential", [False, True])
def test_solved_as_from_full_replays(load_tiny, name, component, sequential, monkeypatch):
    """Real denoisers, a chain and a UNet, in several stages: the same codes to the bit."""
    found, served = [], []
    serves = Waypoint.serves
    for full in (True, False):

        def answer(self, watched, full=full):
            served.append(not full and serves(self, watched))
            return served[-1]

        monkeypatch.setattr(Waypoint, "serves", answer)
        pipe = load_tiny(name)
        spec = recipe_named("w4a8").main_spec()
        patterns = ("*.ff.net.2", "*attn2.to_q") if name == "pixart" else ("*resnets.0.conv2", "*blocks.1.*attn2.to_q")
        rules = [dqtk.Rule(pattern=pattern, spec=spec, why="test") for pattern in patterns]
        plan = dqtk.plan(pipe, dqtk.Recipe(name="some", rules=(*rules, dqtk.Rule(spec=None, why="test"))))
        how = {"call_kwargs": {"num_inference_steps": 2}, "progress": False}
        stats = dqtk.calibrate(pipe, ["a circle", "a square"], plan, batch_size=1, steps_per_run=1, **how)
        dqtk.quantize(pipe, plan, stats, sequential=sequential, max_memory=8 * 2**20, progress=False)
        layers = quantized_layers(getattr(pipe, component))
        found.append({path: layer.state_dict() for path, layer in layers.items()})
    assert any(served)
    assert found[0].keys() == found[1].keys()
    for path, tensors in found[0].items():
        assert all(torch.equal(tensor, found[1][path][key]) for key, tensor in tensors.items()), path


def test_the_tiny_transformer_is_a_chain(load_tiny):
    pipe = load_tiny("pixart")
    how = {"call_kwargs": {"num_inference_steps": 2}, "progress": False}
    stats = dqtk.calibrate(pipe, ["a circle"], dqtk.plan(pipe, "w4a8"), **how)
    module = pipe.transformer
    sites = [site.path for site in find_sites(module) if ".ff." in site.path]
    waypoint = waypoint_for(module, stats.calls, sites, 2**30)
    for watched in (sites[:2], sites[2:4], sites[4:6]):
        replay(module, stats.calls, {path: lambda x, call: None for path in watched}, waypoint)
    assert waypoint.trusted
    assert waypoint.begin == 2
