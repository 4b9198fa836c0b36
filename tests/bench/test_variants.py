"""Variants of a module: what they share, what they are made of, and that stand-ins change the function by rounding only."""

from dataclasses import replace

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn

import dqtk
from dqtk.bench.layers import is_emulated
from dqtk.bench.variants import data_free, in_dtype, quantized, shared_copy, unpacked
from dqtk.checkpoint import quantized_layers
from dqtk.diffusers_backend import FusedGELU
from dqtk.plan import Recipe, Rule
from dqtk.recipes import RECIPES, recipe_named
from dqtk.report.sizes import bytes_in_memory
from dqtk.spec import (
    GPTQ,
    ConstantToken,
    Hadamard,
    LayerSpec,
    LowRank,
    PerChannel,
    ShortcutSplit,
    Smooth,
    TensorSpec,
    VectorCodebook,
)


def pointers(module):
    return {name: tensor.data_ptr() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def test_a_copy_has_modules_of_its_own_and_the_same_tensors(bare):
    made = shared_copy(bare)
    assert pointers(made) == pointers(bare)
    made[0] = nn.Identity()
    assert isinstance(bare[0], nn.Linear)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a16", "w8a8-static", "w4a8-rtn"])
def test_a_recipe_that_learns_is_made_without_prompts(bare, name):
    plan = dqtk.plan(bare, Recipe(name="all", rules=(Rule(spec=recipe_named(name).main_spec(), why="test"),)))
    before = pointers(bare)
    made = quantized(bare, plan.choices)
    assert pointers(bare) == before
    layers = quantized_layers(made)
    assert set(layers) == {"0", "2", "4"}
    stored = sum(tensor.nbytes for layer in layers.values() for tensor in layer.buffers())
    assert stored == sum(choice.bytes_after for choice in plan.choices)
    torch.manual_seed(1)
    x = torch.randn(50, 64)
    exact = bare(x)
    assert (made(x) - exact).norm() / exact.norm() < (0.2 if "w4" in name else 0.1)  # static ranges are stand-ins


def test_layers_share_their_books_here_too(bare):
    words = TensorSpec(format=VectorCodebook(words=1024, length=2, group="all"), granularity=PerChannel())
    plan = dqtk.plan(bare, Recipe(name="all", rules=(Rule(spec=LayerSpec(weight=words, solver=GPTQ()), why="test"),)))
    made = quantized(bare, plan.choices)
    assert [name for name, _ in made.named_buffers() if "book" in name] == ["dqtk_books.book_all"]
    stored = sum(tensor.nbytes for tensor in made.buffers())
    assert stored == sum(choice.bytes_after for choice in plan.choices) + plan.book_bytes("model")
    x = torch.randn(3, 64)
    assert made(x).isfinite().all()
    back = unpacked(made)
    assert torch.equal(back(x), made(x))
    assert not any("book" in name for name in back.state_dict())


def test_transforms_and_branches_are_really_there(bare):
    spec = LayerSpec(
        weight=recipe_named("w8a8").main_spec().weight,
        input=recipe_named("w8a8").main_spec().input,
        transforms=(Smooth(), Hadamard()),
        low_rank=LowRank(rank=5),
    )
    layer = data_free(bare[0], spec)
    assert layer.smooth.shape == (64,)
    assert layer.signs.shape == (8,)
    assert layer.down.shape == (5, 64)
    assert layer.up.shape == (96, 5)
    assert layer.basis.transforms == spec.transforms
    assert layer(torch.randn(3, 64)).isfinite().all()


def test_every_recipe_with_a_kernel_can_be_made():
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 32), nn.Conv2d(64, 32, 3, padding=1)
    served = [name for name in RECIPES if not is_emulated(recipe_named(name).main_spec(), "linear", torch.device("cpu"))]
    assert {"w8a8", "w8a8-static", "w4a8", "w4a8-rtn", "w8a16", "w4a16"} <= set(served)
    for name in served:
        spec = recipe_named(name).main_spec()
        assert data_free(linear, spec)(torch.randn(2, 64)).shape == (2, 32), name
        assert data_free(conv, spec)(torch.randn(1, 64, 5, 5)).shape == (1, 32, 5, 5), name


def test_another_dtype_keeps_what_is_tied_and_shares_what_fits(bare):
    bare[2].weight = nn.Parameter(torch.randn(64, 96), requires_grad=False)
    bare.append(nn.Linear(96, 64, bias=False))
    bare[5].weight = bare[2].weight
    bare.register_buffer("table", torch.arange(3))
    half = in_dtype(bare, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half[5].weight is half[2].weight
    assert half.table.data_ptr() == bare.table.data_ptr()
    assert {p.dtype for p in bare.parameters()} == {torch.float32}
    assert bytes_in_memory(half) - 24 == (bytes_in_memory(bare) - 24) / 2
    assert pointers(in_dtype(bare, torch.float32)) == pointers(bare)


def test_a_quantized_model_unpacked_is_its_decoded_self(bare):
    dqtk.quantize(bare, Recipe(name="all", rules=(Rule(spec=recipe_named("w8a16").main_spec(), why="test"),)), progress=False)
    plain = unpacked(bare)
    assert not quantized_layers(plain)
    assert len(quantized_layers(bare)) == 3
    x = torch.randn(4, 64)
    torch.testing.assert_close(plain(x), bare(x), rtol=1e-4, atol=1e-4)


def test_activations_run_where_a_quantized_pipeline_has_them(load_tiny):
    """Variants go through the same swap as ``quantize``; the original keeps its classes, and a decoded variant has them again."""
    module = load_tiny("pixart").transformer
    made = quantized(module, dqtk.plan(module, "w8a8").choices)

    def kinds(model):
        return {type(part) for part in model.modules() if isinstance(part, GELU)}

    assert FusedGELU in kinds(made)
    assert FusedGELU not in kinds(module)
    assert FusedGELU not in kinds(unpacked(made))
    assert FusedGELU in kinds(made)


def test_parts_and_tokens_are_really_there():
    """Timed with stand-ins for what calls would have shown."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 8)
    transforms = (ConstantToken(), ShortcutSplit(at=(8,)))
    made = data_free(layer, replace(recipe_named("w8a8-static").main_spec(), transforms=transforms))
    assert made.spec.transforms == transforms
    assert made.qweight_2.shape == (8, 16)
    assert made(torch.randn(2, 3, 24)).shape == (2, 3, 8)
