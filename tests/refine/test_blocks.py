"""Block reconstruction lowers every block's error on calls it has not seen, or leaves the block; the teacher is the original."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate.answers import exact_outputs, outputs
from dqtk.calibrate.replay import Call
from dqtk.calibrate.stats import Stats
from dqtk.checkpoint import quantized_layers
from dqtk.refine import blocks as blocks_module
from dqtk.refine.blocks import reconstruct
from dqtk.refine.descent import call_at
from dqtk.refine.refine import refined
from dqtk.spec import Distill, Dynamic, Int, LayerSpec, PerGroup, Reconstruct, TensorSpec

W3A4 = LayerSpec(
    weight=TensorSpec(format=Int(bits=3), granularity=PerGroup(size=32)),
    input=TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32), range=Dynamic()),
)
CHOICE = Reconstruct(iterations=60)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x, shift=None):
        return (x + self.down(nn.functional.gelu(self.up(self.norm(x) + shift))), "more")


class Denoiser(nn.Module):
    """[B, T, 32]: a layer, and three blocks of which the last is called twice."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.blocks = nn.Linear(32, 32), nn.ModuleList([Block() for _ in range(3)])
        self.dtype = torch.float32

    def forward(self, sample, timestep):
        x = self.proj_in(sample)
        for block in (*self.blocks, self.blocks[2]):
            (x, _) = block(x, shift=timestep)
        return x


def calls(runs=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Call("unet", (), {"sample": torch.randn(8, 6, 32, generator=draw), "timestep": torch.tensor(time)}, time, run)
        for run in range(runs)
        for time in (0.2, 0.9)
    ]


def case():
    torch.manual_seed(0)
    exact_model = Denoiser().requires_grad_(False)
    module = copy.deepcopy(exact_model)
    plan = dqtk.plan(module, dqtk.Recipe(name="w3a4", rules=(dqtk.Rule(spec=W3A4, why="test"),)))
    originals = {choice.site.path: module.get_submodule(choice.site.path) for choice in plan.choices}
    return dqtk.quantize(module, plan, progress=False), originals, calls(), exact_model


def error(module, exact_model, given):
    pairs = zip(outputs(module, given), outputs(exact_model, given), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs) / len(given)


@pytest.mark.parametrize("rank", [None, 4])
def test_every_block_learns_and_the_model_gains(rank):
    module, originals, given, exact_model = case()
    new = calls(seed=1)
    before, state = error(module, exact_model, new), copy.deepcopy(module.state_dict())
    found = reconstruct(module, originals, given, replace(CHOICE, rank=rank), progress=False)
    assert list(found) == ["proj_in", "blocks.0", "blocks.1", "blocks.2"]
    assert sum(block.kept for block in found.values()) >= 3
    assert error(module, exact_model, new) < 0.95 * before
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(state[name], tensor)}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"qweight", "scale", "bias"}
    assert not any("norm" in name for name in changed)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all("forward" not in vars(layer) and "learned" not in vars(layer) for layer in quantized_layers(module).values())


def test_a_block_that_cannot_be_made_better_stays(monkeypatch):
    module, originals, given, _ = case()
    state = copy.deepcopy(module.state_dict())
    found = reconstruct(module, originals, given, replace(CHOICE, iterations=5, weight_rate=0.9, scale_rate=0.9), progress=False)
    kept = {path for path, block in found.items() if block.kept}
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(state[name], tensor)}
    assert kept != set(found)
    assert all(any(name.startswith(path) for path in kept) for name in changed)


def test_the_teacher_is_the_original_whatever_the_blocks_before_have_become():
    module, originals, given, exact_model = case()
    layers = quantized_layers(module)
    with torch.no_grad():
        layers["blocks.0.up"].bias.add_(1)
    met = {}
    for path in ("blocks.1", "blocks.2"):
        with blocks_module._original(layers, originals):
            met[path] = blocks_module._met(module, path, given[:2])
    expected = blocks_module._met(exact_model, "blocks.2", given[:2])
    assert all(torch.equal(a.output[0], b.output[0]) for a, b in zip(met["blocks.2"], expected, strict=True))
    assert torch.equal(met["blocks.1"][1].output[0], met["blocks.2"][1].args[0])


def test_drop_mixes_the_two_inputs():
    student, teacher = (blocks_module._Met((torch.full((1000,), value), "word"), {}, None) for value in (0.0, 1.0))
    args = blocks_module._mixed(student, teacher, 0.25, torch.Generator().manual_seed(0)).args
    assert args[1] == "word"
    assert set(args[0].tolist()) == {0, 1}
    assert float(args[0].mean()) == pytest.approx(0.25, abs=0.05)
    assert blocks_module._mixed(student, teacher, 0.0, None) is student


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, originals, given, _ = case()
    reconstruct(whole, originals, given, CHOICE, progress=False)
    module, originals, given, _ = case()
    asked = []

    def stopping(iteration, num, seed):
        asked.append(iteration)
        if len(asked) == 100:  # in the second block
            raise KeyboardInterrupt
        return call_at(iteration, num, seed)

    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "call_at", stopping)
        with pytest.raises(KeyboardInterrupt):
            reconstruct(module, originals, given, CHOICE, name="unet", folder=tmp_path, progress=False)
    again, originals, given, _ = case()
    monkeypatch.setattr(blocks_module, "call_at", lambda i, num, seed: asked.append(i) or call_at(i, num, seed))
    asked.clear()
    reconstruct(again, originals, given, CHOICE, name="unet", folder=tmp_path, progress=False)
    assert asked[0] == 39  # of the second block
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["unet-blocks.0.safetensors", "unet-blocks.1.safetensors"]


def test_the_choice_picks_the_refiner():
    module, originals, given, exact_model = case()
    exact = exact_outputs({"unet": exact_model}, Stats(calls=given))["unet"]
    how = {"name": "unet", "folder": None, "progress": False}
    for choice in (replace(CHOICE, iterations=20), Distill(iterations=20)):
        state = copy.deepcopy(module.state_dict())
        refined(module, choice, given, exact, originals, **how)
        changed = {name for name, tensor in module.state_dict().items() if not torch.equal(state[name], tensor)}
        assert any("norm" in name for name in changed) == isinstance(choice, Distill)
    with pytest.raises(ValueError, match=r"refine: unet must have quantized layers and calls of at least two .* got 7 and 1"):
        refined(module, CHOICE, given[:2], exact, originals, **how)
    with pytest.raises(ValueError, match="Reconstruct: drop must be from 0 to 1, got 2"):
        Reconstruct(drop=2)
