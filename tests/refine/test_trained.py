"""A layer that learns computes what it computes when stored, whatever its format, and its numbers get gradients."""

import copy

import pytest
import torch
from torch import nn

from dqtk.checkpoint import quantized_layers
from dqtk.methods.solve import solve
from dqtk.nn import Quantized
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.quantize import runtime_layer
from dqtk.refine.trained import Trained, training
from dqtk.spec import (
    MSE,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ShortcutSplit,
    TensorSpec,
    TwoLevel,
)

E2M1 = Float(exponent=2, mantissa=1)
WEIGHTS = {
    "two-level": TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=32)),
    "three bits": TensorSpec(format=Int(bits=3), granularity=TwoLevel(size=32)),
    "groups": TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32), range=MSE()),
    "zeros": TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=32)),
    "zeros per channel": TensorSpec(format=Int(bits=3, symmetric=False), granularity=PerChannel()),
    "int8": TensorSpec(format=Int(bits=8), granularity=PerChannel()),
    "per tensor": TensorSpec(format=Int(bits=8), granularity=PerTensor()),
    "fp8": TensorSpec(format=Float(), granularity=PerChannel()),
    "fp6": TensorSpec(format=Float(exponent=3, mantissa=2), granularity=PerGroup(size=64)),
    "nvfp4": TensorSpec(format=E2M1, granularity=E4M3Group()),
    "mxfp4": TensorSpec(format=E2M1, granularity=E8M0Group()),
    "nf4": TensorSpec(format=nf4(), granularity=PerGroup(size=32)),
    "bitmod": TensorSpec(format=bitmod(4), granularity=PerGroup(size=32)),
}
INPUTS = {
    "A16": None,
    "A8": TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic()),
    "A4": TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32), range=Dynamic()),
}


def quantized(layer, spec) -> Quantized:
    weight = layer.weight.detach().flatten(2).permute(0, 2, 1).flatten(1) if layer.weight.ndim > 2 else layer.weight.detach()
    (solution,) = solve([weight], spec, channels=layer.weight.shape[1])
    return runtime_layer(layer, solution)


def trained(layer, rank=None):
    return Trained(layer, layer, 0, rank, torch.Generator().manual_seed(0))


def computed(layer, mine, x):
    """What the layer computes while it learns."""
    vars(layer)["learned"] = mine.weight
    try:
        return layer(x)
    finally:
        del vars(layer)["learned"]


def moved(mine):
    """The same with its numbers moved away from where they start."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in mine.parameters.items():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * (0.01 if name == "scale" else 1))
    return mine


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_storing_changes_no_number(name, rank):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(128, 24), LayerSpec(weight=WEIGHTS[name], transforms=(Hadamard(),)))
    before = layer.stored_matrix()
    mine = trained(layer, rank)
    assert torch.equal(mine.weight(), before)
    learned = moved(mine).weight()
    assert (learned != before).float().mean() > 0.3
    mine.store()
    assert torch.equal(layer.stored_matrix(), learned)
    assert torch.equal(trained(layer).weight(), learned)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", ["two-level", "groups", "fp8", "int8"])
def test_a_learning_layer_computes_what_the_layer_does(name, given):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(64, 24), LayerSpec(weight=WEIGHTS[name], input=INPUTS[given], transforms=(Hadamard(),)))
    x = torch.randn(2, 5, 64)
    assert torch.allclose(computed(layer, trained(layer), x), layer(x), atol=1e-5)


@pytest.mark.parametrize("given", ["A16", "A8"])
def test_convolutions_too(given):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 8, 3, stride=2, padding=1)
    layer = quantized(conv, LayerSpec(weight=WEIGHTS["two-level"], input=INPUTS[given]))
    mine, x = trained(layer, 4), torch.randn(2, 32, 7, 7)
    assert torch.allclose(computed(layer, mine, x), layer(x), atol=1e-5)
    assert torch.allclose(computed(layer, mine, x[0]), layer(x[0]), atol=1e-5)
    moved(mine).store()
    assert torch.allclose(computed(layer, mine, x), layer(x), atol=1e-5)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_number_gets_a_gradient(name, rank):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(128, 24, bias=False), LayerSpec(weight=WEIGHTS[name]))
    mine = trained(layer, rank)
    assert ("scale" in mine.parameters) == (name != "mxfp4")
    computed(layer, moved(mine), torch.randn(5, 128)).square().mean().backward()
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in mine.parameters.values())


def test_gradients_are_those_without_rounding():
    """Of the scale's factor and of levels, with the rounded level as the point where they are taken."""
    layer = quantized(nn.Linear(8, 3, bias=False), LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel())))
    mine = trained(layer)
    slope = torch.randn(3, 8)
    (mine.weight() * slope).sum().backward()
    assert torch.allclose(mine.parameters["moved"].grad, slope * layer.scale)
    assert torch.allclose(mine.parameters["scale"].grad, (slope * layer.stored_matrix()).sum(1, keepdim=True), atol=1e-5)


def test_a_split_input_learns_in_parts():
    torch.manual_seed(0)
    spec = LayerSpec(weight=WEIGHTS["groups"], input=INPUTS["A4"], transforms=(ShortcutSplit(at=(32,)),))
    layer = quantized(nn.Linear(96, 24), spec)
    module, x = nn.Sequential(layer), torch.randn(3, 96)
    before = layer(x)
    with training(quantized_layers(module), 4, torch.Generator().manual_seed(0)) as parts:
        assert [(name, part.k) for name, part in parts.items()] == [("0", 32), ("0_2", 64)]
        assert torch.allclose(module(x), before, atol=1e-5)
        for part in parts.values():
            moved(part)
        learned = module(x)
        learned.square().sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for part in parts.values() for p in part.parameters.values())
        for part in parts.values():
            part.store()
    assert torch.equal(module(x), learned)
    assert not torch.allclose(before, learned)


def test_layers_are_their_own_again_afterwards():
    spec = LayerSpec(weight=WEIGHTS["groups"], input=INPUTS["A4"])
    module = nn.Sequential(quantized(nn.Linear(64, 64), spec), nn.SiLU(), quantized(nn.Linear(64, 8), spec))
    x, before = torch.randn(3, 64), copy.deepcopy(module.state_dict())
    y = module(x)
    with training(quantized_layers(module), None, torch.Generator()) as layers:
        assert list(layers) == ["0", "2"]
        for mine in layers.values():
            moved(mine)
        assert not torch.allclose(module(x), y)
    assert torch.equal(module(x), y)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert "learned" not in vars(module[0])
