"""Layers whose precision depends on the noise level: each call is that of a layer of one spec, wherever a model may go."""

import copy

import pytest
import torch
from torch import nn

from dqtk.checkpoint import quantized_layers, replace_layer
from dqtk.kernels import to_matrix
from dqtk.methods.by_level import solve_site
from dqtk.nn import runtime_class
from dqtk.nn.steps import StepState, choosing, forget_steps, step_states
from dqtk.numerics.storage import layer_bytes, layer_layout
from dqtk.spec import (
    ByLevel,
    Dynamic,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerLevel,
    PerTensor,
    PerToken,
    TensorSpec,
)

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8))
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
A4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8), range=Dynamic())
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
LEVELS = TensorSpec(format=Float(), granularity=PerLevel(edges=(500.0,)))
TURNED = (Hadamard(),)
EDGES = (800.0, 200.0)
POLICIES = {
    "one weight": (LayerSpec(weight=W4), LayerSpec(weight=W4, input=A4)),
    "one rotated weight": (LayerSpec(weight=W4, transforms=TURNED), LayerSpec(weight=W4, input=A4, transforms=TURNED)),
    "two weights": (LayerSpec(weight=W8, input=A8), LayerSpec(weight=W4, input=A4, transforms=TURNED)),
    "static": (LayerSpec(weight=W8), LayerSpec(weight=W8, input=STATIC)),
    "range per level": (LayerSpec(weight=W8, input=LEVELS), LayerSpec(weight=W4, input=A4)),
}
ENDS = {1: (torch.tensor([-3.0]), torch.tensor([4.0])), 2: (torch.tensor([-3.0, -1]), torch.tensor([4.0, 2]))}
TIMES = {999.0: 0, 800.0: 0, 799.0: 1, 200.0: 1, 199.0: 0, 0.0: 0}  # time -> spec; a time at an edge lies above it


def policy(name):
    outer, inner = POLICIES[name]
    return ByLevel(specs=(outer, inner, outer), edges=EDGES)


class Denoiser(nn.Module):
    """[B, 8, 4, 4] -> [B, 8, 4, 4], through a linear over the channels and a convolution."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, sample, timestep):
        return self.conv(self.linear(sample.movedim(1, -1)).movedim(-1, 1))


def quantized(spec):
    torch.manual_seed(0)
    model = Denoiser().requires_grad_(False)
    for path in ("linear", "conv"):
        plain = model.get_submodule(path)
        new = runtime_class(plain).like(plain, spec)
        weight = plain.weight.detach()
        matrix = weight if weight.ndim == 2 else to_matrix(weight)
        ranges = lambda part: ENDS[2 if isinstance(part.input.granularity, PerLevel) else 1] if part.needs_ranges else None  # noqa: E731
        (solution,) = solve_site([matrix], spec, channels=weight.shape[1], range_for=ranges)
        new.fill(solution.tensors, plain.bias)
        replace_layer(model, path, new)
    return model


X = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", POLICIES)
def test_each_call_is_that_of_a_model_with_one_spec(name):
    model = quantized(policy(name))
    assert len(step_states(model)) == 1
    plain = [quantized(spec) for spec in POLICIES[name]]
    for time, index in TIMES.items():
        assert torch.equal(model(X, torch.tensor(time)), plain[index](X, torch.tensor(time))), time
    assert not torch.equal(model(X, torch.tensor(999.0)), model(X, torch.tensor(500.0)))


@pytest.mark.parametrize("name", POLICIES)
def test_a_shared_weight_is_stored_once(name):
    spec, shape = policy(name), (16, 8, 8)
    outer, inner = (layer_bytes(part, *shape) for part in POLICIES[name])
    num = 2 if POLICIES[name][0].weight != POLICIES[name][1].weight else 1
    assert layer_bytes(spec, *shape) == (outer + inner if num == 2 else max(outer, inner))
    assert ("qweight_2" in layer_layout(spec, *shape)) == (num == 2)
    layers = quantized_layers(quantized(spec))
    assert len(layers) == 2
    stored = {key.rpartition(".")[2] for key in layers["linear"].state_dict()} - {"bias"}
    assert stored == set(layer_layout(spec, 8, 8, 8))


def test_the_state_follows_times_that_rise():
    spec = ByLevel(specs=POLICIES["one weight"], edges=(0.25,), rising=True)
    model = quantized(spec)
    plain = [quantized(part) for part in POLICIES["one weight"]]
    for time, index in {0.0: 0, 0.24: 0, 0.25: 1, 0.9: 1}.items():
        assert torch.equal(model(X, torch.tensor([time] * 2)), plain[index](X, torch.tensor(time)))


def test_copies_dtypes_and_a_model_that_is_told_to_forget():
    model = quantized(policy("two weights"))
    other = copy.deepcopy(model)
    assert step_states(other) == [other.linear.steps] != [model.linear.steps]
    expected = other(X, torch.tensor(999.0))
    model(X, torch.tensor(500.0))
    assert (model.linear.steps.kind, other.linear.steps.kind) == ("1", "0")
    assert torch.equal(other(X, torch.tensor(999.0)), expected)
    half = model.to(torch.bfloat16)
    assert half(X.bfloat16(), torch.tensor(500.0)).dtype == torch.bfloat16
    assert half.linear.scale.dtype == torch.float32
    assert half.linear.qweight_2.dtype == torch.uint8
    forget_steps(model)
    assert step_states(model) == []


def test_the_finest_weight_stands_for_the_layer():
    model = quantized(ByLevel(specs=POLICIES["two weights"][::-1], edges=(500.0,)))
    fine = quantized(POLICIES["two weights"][0])
    assert torch.equal(model.linear.dequantize(), fine.linear.dequantize())
    assert torch.equal(model.conv.plain()(X), fine.conv.plain()(X))
    assert not set(vars(model.linear.plain())) & {"ways", "steps", "finest", "stored"}
    assert model.linear.kernel().count(":") == 2


def test_what_cannot_be_chosen_by():
    model = quantized(policy("one weight"))
    with pytest.raises(ValueError, match=r"step_policy: times must be equal within a call, got \[1.0, 700.0\]"):
        model(X, torch.tensor([1.0, 700.0]))
    with pytest.raises(ValueError, match="step_policy: Denoiser must be called with a time, got none"):
        model(X, None)
    layer = copy.deepcopy(model.linear)
    layer.steps = None
    with pytest.raises(ValueError, match="SteppedLinear: the layer must follow a denoiser's calls, as it has 2 specs"):
        layer(X.movedim(1, -1))
    with pytest.raises(ValueError, match=r"step_policy: edges must be known in the denoiser's own time, got shares \[0.5\] only"):
        choosing(model, ByLevel(specs=POLICIES["one weight"], shares=(0.5,)))
    with pytest.raises(ValueError, match="step_policy: edges must be finite and ascending"):
        StepState((2.0, 1.0), (0, 1, 0))


@pytest.mark.parametrize("region", ["whole", "layers"])
@pytest.mark.parametrize("name", ["one weight", "two weights"])
def test_compiled_once_for_every_kind(region, name):
    model = quantized(policy(name))
    expected = [model(X, torch.tensor([time])) for time in TIMES]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if region == "whole":
        run = torch.compile(model, backend=backend)
    else:
        model.linear.compile(backend=backend, fullgraph=True)
        run = model
    by_kind = {index: run(X, torch.tensor([time])) for index, time in ((0, 999.0), (1, 500.0))}
    compiled = len(graphs)
    found = [run(X, torch.tensor([time])) for time in TIMES]
    assert len(graphs) == compiled <= (2 if region == "layers" else 2 * 2)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert torch.equal(found[0], by_kind[0])
