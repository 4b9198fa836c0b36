"""Layers quantized as ``dqtk.quantize`` would, and the specs that the tests of this folder run through."""

import pytest
import torch
from torch import nn

from dqtk.kernels import to_matrix
from dqtk.methods.solve import solve
from dqtk.nn import runtime_class
from dqtk.spec import Dynamic, Float, Int, LayerSpec, PerChannel, PerGroup, PerTensor, PerToken, TensorSpec, TwoLevel

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4_GROUP = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=8))
W4_TWO_LEVEL = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=8))
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
A8_STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())

SPECS = {
    "w8": LayerSpec(weight=W8),
    "w4": LayerSpec(weight=W4_GROUP),
    "wfp8": LayerSpec(weight=WFP8),
    "w8a8": LayerSpec(weight=W8, input=A8),
    "w8a8-static": LayerSpec(weight=W8, input=A8_STATIC),
    "w4a8-rtn": LayerSpec(weight=W4_TWO_LEVEL, input=A8),
    "fp8": LayerSpec(weight=WFP8, input=AFP8),
}


def quantize_layer(layer, spec):
    """A runtime layer with the codes of ``layer``; a static input expects values from -3 to 4."""
    new = runtime_class(layer).like(layer, spec)
    weight = layer.weight.detach()
    matrix = weight if weight.ndim == 2 else to_matrix(weight)
    (solution,) = solve([matrix], spec, channels=weight.shape[1], input_range=(torch.tensor([-3.0]), torch.tensor([4.0])))
    new.fill(solution.tensors, layer.bias)
    return new


@pytest.fixture
def specs():
    """Name -> spec."""
    return SPECS


@pytest.fixture
def quantized():
    """Function (layer, spec or its name) -> runtime layer."""
    return lambda layer, spec: quantize_layer(layer, SPECS.get(spec, spec) if isinstance(spec, str) else spec)


class Small(nn.Module):
    """A linear, a linear without bias and a convolution: [B, 16, 16] -> [B, 8, 4, 4]."""

    def __init__(self, first, second, third):
        super().__init__()
        self.first, self.second, self.conv = first, second, third

    def forward(self, x):
        return self.conv(self.second(self.first(x)).transpose(-1, -2).unflatten(-1, (4, 4)))


@pytest.fixture
def small(quantized):
    """Function (specs of the three layers) -> module."""

    def make(first="w8", second="w4a8-rtn", third="w8a8"):
        torch.manual_seed(0)
        layers = (nn.Linear(16, 8), nn.Linear(8, 8, bias=False), nn.Conv2d(8, 8, 3, padding=1))
        return Small(*(quantized(layer, spec) for layer, spec in zip(layers, (first, second, third), strict=True))).eval()

    return make
