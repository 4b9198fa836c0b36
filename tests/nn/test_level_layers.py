"""Layers whose input has a range per interval of the noise level: each call uses its interval's, everywhere a model may go."""

import copy

import pytest
import torch
from torch import nn

from dqtk.checkpoint import replace_layer
from dqtk.nn import QuantConv2d, QuantLinear, runtime_class
from dqtk.nn.noise import noise_states
from dqtk.numerics.storage import layer_layout
from dqtk.spec import Float, Int, LayerSpec, PerChannel, PerGroup, PerLevel, PerTensor, TensorSpec

EDGES = (300.0, 700.0)
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8))
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
PAIRS = {
    "int8": (W8, Int(bits=8, symmetric=False)),
    "int8 symmetric": (W8, Int(bits=8)),
    "fp8": (WFP8, Float()),
    "emulated": (W4, Int(bits=6, symmetric=False)),
    "emulated unsigned": (W4, Float(exponent=4, mantissa=4, signed=False)),
}
ENDS = torch.tensor([-0.5, -1, -9]), torch.tensor([0.4, 3, 6])


def spec_of(name, granularity):
    weight, form = PAIRS[name]
    return LayerSpec(weight=weight, input=TensorSpec(format=form, granularity=granularity))


def layer_of(plain, spec, ends):
    from dqtk.kernels import to_matrix
    from dqtk.methods.solve import solve

    new = runtime_class(plain).like(plain, spec)
    weight = plain.weight.detach()
    matrix = weight if weight.ndim == 2 else to_matrix(weight)
    (solution,) = solve([matrix], spec, channels=weight.shape[1], input_range=ends)
    new.fill(solution.tensors, plain.bias)
    return new


class Denoiser(nn.Module):
    """[B, 8, 4, 4] -> [B, 8, 4, 4], through a linear over the channels and a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, sample, timestep):
        return self.conv(self.linear(sample.movedim(1, -1)).movedim(-1, 1))


def quantized(name, granularity=None, ends=ENDS):
    torch.manual_seed(0)
    model = Denoiser().requires_grad_(False)
    for path in ("linear", "conv"):
        spec = spec_of(name, granularity or PerLevel(edges=EDGES))
        replace_layer(model, path, layer_of(model.get_submodule(path), spec, ends))
    return model


X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
TIMES = {0: 10.0, 1: 300.0, 2: 999.0}


@pytest.mark.parametrize("name", PAIRS)
def test_each_call_is_that_of_a_layer_with_one_range(name):
    model = quantized(name)
    assert isinstance(model.linear, QuantLinear)
    assert isinstance(model.conv, QuantConv2d)
    assert len(noise_states(model)) == 1
    outputs = []
    for index, time in TIMES.items():
        one = quantized(name, PerTensor(), tuple(end[index : index + 1] for end in ENDS))
        outputs.append(model(X, torch.tensor(time)))
        assert torch.equal(outputs[-1], one(X, torch.tensor(time)))
    assert not torch.equal(outputs[0], outputs[1])
    assert model.linear.op == quantized(name, PerTensor(), tuple(end[:1] for end in ENDS)).linear.op


@pytest.mark.parametrize("name", PAIRS)
def test_storage_grows_by_some_numbers(name):
    """Known before the edges are: at most ``most`` ranges."""
    for granularity, count in ((PerTensor(), 1), (PerLevel(edges=EDGES), 3), (PerLevel(most=5), 5)):
        found = layer_layout(spec_of(name, granularity), 16, 8, 8)
        assert found["input_scale"] == ((count,), torch.float32)
        assert found.get("input_zero", ((count,), None))[0] == (count,)


def test_copies_dtypes_and_a_layer_that_is_taken_out():
    model = quantized("int8")
    other = copy.deepcopy(model)
    model(X, torch.tensor(10.0))
    expected = other(X, torch.tensor(999.0))
    assert torch.equal(model.linear(X.movedim(1, -1)), quantized_at(0).linear(X.movedim(1, -1)))
    assert torch.equal(other(X, torch.tensor(999.0)), expected)
    half = model.to(torch.bfloat16)
    assert half(X.bfloat16(), torch.tensor(999.0)).dtype == torch.bfloat16
    assert half.linear.input_scale.dtype == torch.float32
    assert not hasattr(model.linear.plain(), "noise")


def quantized_at(index):
    return quantized("int8", PerTensor(), tuple(end[index : index + 1] for end in ENDS))


def test_a_layer_by_itself_says_what_it_lacks():
    layer = layer_of(nn.Linear(8, 8), spec_of("int8", PerLevel(edges=EDGES)), ENDS)
    with pytest.raises(ValueError, match=r"QuantLinear: the layer must follow a denoiser's calls, as its input has 3 scales"):
        layer(X.movedim(1, -1))


def test_compiled_once_for_all_levels():
    model = quantized("int8")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = [model(X, torch.tensor([time])) for time in TIMES.values()]
    run = torch.compile(model, backend=backend, fullgraph=True)
    found = [run(X, torch.tensor([TIMES[0]]))]
    compiled = len(graphs)
    found += [run(X, torch.tensor([time])) for time in list(TIMES.values())[1:]]
    assert len(graphs) == compiled
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
