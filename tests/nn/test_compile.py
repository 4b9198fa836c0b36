"""One graph, forward and backward: eager results, no breaks."""

import torch
from torch import nn

from dqtk.methods.rtn import rtn
from dqtk.nn import QuantLinear
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.numerics.floats import grid
from dqtk.numerics.hadamard import pack_signs, random_signs
from dqtk.spec import (
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerTensor,
    Smooth,
    TensorSpec,
)


class Typed(torch.nn.Module):
    """Reads ``weight.dtype`` in the graph, as T5's feed-forward does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.to(self.inner.first.weight.dtype))


def test_full_graph(small):
    for kinds in (("w8a8", "w4a8-rtn", "w8a8-static"), ("w4", "wfp8", "w8")):
        model = Typed(small(*kinds))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for size in (2, 3):  # the second call compiles for any batch size
            x = torch.randn(size, 16, 16, generator=torch.Generator().manual_seed(size))
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = compiled(a), model(b)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


E2M1 = Float(exponent=2, mantissa=1)
FORMATS = [
    LayerSpec(
        weight=TensorSpec(format=E2M1, granularity=E4M3Group(size=8)),
        input=TensorSpec(format=E2M1, granularity=E4M3Group(size=8), range=Dynamic()),
        transforms=(Smooth(), Hadamard()),
        low_rank=LowRank(rank=2),
    ),
    LayerSpec(
        weight=TensorSpec(format=E2M1, granularity=E8M0Group(size=8)),
        input=TensorSpec(format=Float(), granularity=E8M0Group(size=8), range=Dynamic()),
    ),
    LayerSpec(
        weight=TensorSpec(format=Float(exponent=3, mantissa=2), granularity=PerChannel()),
        input=TensorSpec(format=Float(exponent=4, mantissa=4, signed=False), granularity=PerTensor()),
    ),
    LayerSpec(
        weight=TensorSpec(format=nf4(), granularity=PerGroup(size=8)),
        input=TensorSpec(format=nf4(), granularity=PerGroup(size=8), range=Dynamic()),
    ),
    LayerSpec(weight=TensorSpec(format=bitmod(4), granularity=PerGroup(size=8))),
    LayerSpec(weight=TensorSpec(format=Int(bits=7), granularity=E8M0Group(size=8))),
]


def test_every_family_of_formats_is_one_graph():
    """Also when the tables are made while it is traced."""
    layers = []
    for i, spec in enumerate(FORMATS):
        torch.manual_seed(i)
        layer, more = nn.Linear(16, 16), {}
        if spec.transforms:
            more = {"smooth": (torch.rand(16) + 0.5).bfloat16(), "signs": pack_signs(random_signs(16, 0))}
            more |= {"down": torch.randn(2, 16).bfloat16(), "up": torch.randn(16, 2).bfloat16()}
        if spec.needs_ranges:
            more = {"input_scale": torch.tensor([0.01]), "input_zero": torch.tensor([200.0])}
        layers.append(QuantLinear.like(layer, spec))
        layers[-1].fill(rtn(layer.weight.detach(), spec.weight).tensors() | more, layer.bias)
    model = nn.Sequential(*layers)
    grid.cache_clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    b = a.clone().requires_grad_()
    a.requires_grad_()
    y, expected = compiled(a), model(b)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
