"""Vectors that choose among the words nearest to the original (VQ4DiT's candidates), block by block."""

import copy

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate.answers import outputs
from dqtk.calibrate.replay import Call
from dqtk.checkpoint import quantized_layers
from dqtk.methods.solve import solve
from dqtk.numerics.packing import unpack
from dqtk.quantize import runtime_layer
from dqtk.refine import trained_vectors
from dqtk.refine.blocks import reconstruct
from dqtk.refine.trained import training
from dqtk.spec import Hadamard, LayerSpec, PerChannel, PerTensor, Reconstruct, TensorSpec, VectorCodebook

WORDS = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2), granularity=PerTensor()))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.dtype = nn.ModuleList([Block() for _ in range(2)]), torch.float32

    def forward(self, sample, timestep):
        for block in self.blocks:
            sample = block(sample)
        return sample


def calls(seed):
    draw = torch.Generator().manual_seed(seed)
    given = [{"sample": torch.randn(8, 6, 16, generator=draw), "timestep": torch.tensor(0.5)} for _ in range(12)]
    return [Call("unet", (), kwargs, 0.5, run) for run, kwargs in enumerate(given)]


def case(spec=WORDS):
    torch.manual_seed(0)
    original = Denoiser().requires_grad_(False)
    module = copy.deepcopy(original)
    plan = dqtk.plan(module, dqtk.Recipe(name="words", rules=(dqtk.Rule(spec=spec, why="test"),)))
    replaced = {choice.site.path: module.get_submodule(choice.site.path) for choice in plan.choices}
    return dqtk.quantize(module, plan, progress=False), replaced, original


def error(module, original, given):
    pairs = zip(outputs(module, given), outputs(original, given), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs)


def codes_of(layer):
    return unpack(layer.qweight, 4, layer.k // 2)


def test_choosing_lowers_the_error_beyond_what_books_and_scales_do():
    new, found = calls(seed=1), {}
    for candidates in (1, 2):
        module, replaced, original = case()
        before = error(module, original, new)
        codes = {path: codes_of(layer) for path, layer in quantized_layers(module).items()}
        reconstruct(module, replaced, calls(seed=0), Reconstruct(iterations=60, candidates=candidates), progress=False)
        found[candidates] = error(module, original, new)
        changed = [float((codes_of(layer) != codes[path]).float().mean()) for path, layer in quantized_layers(module).items()]
        assert all(0.02 < share < 0.6 for share in changed) if candidates == 2 else not any(changed)
    assert found[2] < 0.9 * found[1] < 0.9 * before


def test_candidates_are_the_stored_word_and_the_nearest_others():
    module, replaced, _ = case()
    layer, exact = module.blocks[0].up, replaced["blocks.0.up"].weight
    with training({"layer": layer}, None, torch.Generator(), {"layer": replaced["blocks.0.up"]}, 3) as learning:
        choices = learning["layer"].choices
        distance = torch.cdist((exact / layer.scale).reshape(-1, 2), layer.codebook[0].float())
        assert torch.equal(choices[:, 0], codes_of(layer).flatten().long())
        nearest = distance.topk(3, largest=False).indices
        assert torch.equal(choices.sort(dim=1).values, nearest.sort(dim=1).values)
        ratios = learning["layer"].ratios()
        weights = 1 / distance.gather(1, choices)
        expected = weights / weights.sum(dim=1, keepdim=True)
        open_ = expected.amax(dim=1) < 0.99
        torch.testing.assert_close(ratios[open_], expected[open_], rtol=1e-4, atol=1e-4)
        assert 0 < float(learning["layer"].doubt().detach()) < 1


def test_many_words_are_compared_with_fewer_vectors_at_a_time(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    vectors, words = torch.randn(100, 2, generator=draw), torch.randn(512, 2, generator=draw)
    codes, tables, cdist = torch.cdist(vectors, words).argmin(dim=1), [], torch.cdist
    whole = trained_vectors._nearest(vectors, words, codes, 3)
    monkeypatch.setattr(torch, "cdist", lambda a, b: tables.append(len(a) * len(b)) or cdist(a, b))
    monkeypatch.setattr(trained_vectors, "DISTANCES", 20 * 512 + 1)
    found = trained_vectors._nearest(vectors, words, codes, 3)
    assert tables == [20 * 512] * 5
    assert torch.equal(found[0], whole[0])
    torch.testing.assert_close(found[1], whole[1])


def test_a_vector_that_has_decided_stays_and_stands_alone():
    module, replaced, _ = case()
    layer = module.blocks[0].up
    with training({"layer": layer}, None, torch.Generator(), {"layer": replaced["blocks.0.up"]}, 2) as learning:
        mine = learning["layer"]
        mine.parameters["logits"].data[:, 1] = torch.arange(len(mine.choices)) % 2 * 10.0  # every other one
        ratios = mine.ratios()
        decided = ratios.detach().amax(dim=1) == 1
        assert decided[1::2].float().mean() > 0.95
        mine.weight().square().sum().backward()
        assert not mine.parameters["logits"].grad[decided].any()
        assert mine.parameters["logits"].grad[~decided].any()
        with torch.no_grad():
            judged = layer(torch.ones(1, 16))
        mine.store()
    torch.testing.assert_close(layer(torch.ones(1, 16)), judged, rtol=1e-5, atol=1e-5)
    second = mine.choices[1::2, 1][decided[1::2]]
    assert (codes_of(layer).flatten()[1::2][decided[1::2]] == second).float().mean() > 0.95


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec(weight=WORDS.weight, transforms=(Hadamard(),)),
        LayerSpec(weight=TensorSpec(format=VectorCodebook(words=4, length=2, books=2), granularity=PerTensor())),
    ],
    ids=["rotated", "two books"],
)
def test_others_keep_their_codes(spec):
    module, replaced, _ = case(spec)
    layer = module.blocks[0].up
    with training({"layer": layer}, None, torch.Generator(), {"layer": replaced["blocks.0.up"]}, 2) as learning:
        assert learning["layer"].doubt() is None
        assert "logits" not in learning["layer"].parameters


def test_a_row_of_zeros_has_candidates_and_stays_zero():
    linear = nn.Linear(16, 12).requires_grad_(False)
    linear.weight[3] = 0
    words = TensorSpec(format=VectorCodebook(words=4, length=2), granularity=PerChannel())
    (solution,) = solve([linear.weight], LayerSpec(weight=words))
    layer = runtime_layer(linear, solution)
    with training({"layer": layer}, None, torch.Generator(), {"layer": linear}, 2) as learning:
        mine = learning["layer"]
        assert mine.start_logits.isfinite().all()
        mine.weight().square().sum().backward()
        assert all(number.grad.isfinite().all() for number in mine.parameters.values())
        mine.store()
    assert not layer.stored_matrix()[3].any()


@pytest.mark.parametrize("num", [0, 5, 2.0])
def test_numbers_of_candidates(num):
    with pytest.raises(ValueError, match=r"Reconstruct: candidates must be an integer from 1 to 4, got .*VQ4DiT takes 2"):
        Reconstruct(candidates=num)
