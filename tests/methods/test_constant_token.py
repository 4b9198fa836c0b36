"""A token that is the same for every prompt: exact where it stands, harmless where it does not, and the function is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqtk.methods.constant_token import token_tensors
from dqtk.methods.solve import solve
from dqtk.nn.constant_token import multiples, without
from dqtk.numerics.storage import layer_bytes, layer_layout
from dqtk.quantize import runtime_layer
from dqtk.spec import (
    GPTQ,
    ConstantToken,
    Dynamic,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ShortcutSplit,
    Smooth,
    TensorSpec,
    describe,
)

CONSTANT = ConstantToken()
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=8))
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
A6 = TensorSpec(format=Int(bits=6, symmetric=False), granularity=PerTensor())
SPECS = {
    "w8a8 static": LayerSpec(weight=W8, input=STATIC, transforms=(CONSTANT,)),
    "w8a8": LayerSpec(weight=W8, input=A8, transforms=(CONSTANT,)),
    "w4": LayerSpec(weight=W4, transforms=(CONSTANT,)),
    "fp8 static": LayerSpec(weight=WFP8, input=TensorSpec(format=Float(), granularity=PerTensor()), transforms=(CONSTANT,)),
    "w4a6 static": LayerSpec(weight=W4, input=A6, transforms=(CONSTANT,)),
    "gptq": LayerSpec(weight=W4, input=STATIC, solver=GPTQ(), transforms=(CONSTANT,)),
    "split": LayerSpec(weight=W8, input=STATIC, transforms=(CONSTANT, ShortcutSplit(at=(16,)))),
    "smooth, rotated": LayerSpec(weight=W8, input=STATIC, transforms=(CONSTANT, Smooth(alpha=0.5), Hadamard())),
    "branch": LayerSpec(weight=W4, input=A8, low_rank=LowRank(rank=2), transforms=(CONSTANT,)),
}
STATIC_SPECS = [name for name, spec in SPECS.items() if spec.needs_ranges]


@pytest.fixture
def states(seeded):
    """Text states [4, 9, 40]: the first token is one and the same, 60 times as large as the rest."""
    x = seeded(4, 9, 40)
    x[:, 0] = 60 * seeded(40, seed=1).sign()
    return x


@pytest.fixture
def token(states):
    return states[0, 0].clone()


def layer_of(seeded, bias=True):
    layer = nn.Linear(40, 12, bias=bias)
    layer.weight.data = seeded(12, 40, seed=2) / 6
    return layer


def made(layer, states, token, spec, stats_of):
    """The runtime layer, as ``quantize`` makes it from calls with these states."""
    z = without(states, token, multiples(states, token))
    (found,) = solve([layer.weight.detach()], spec, stats_of(z.reshape(-1, z.shape[-1])), token=token)
    return runtime_layer(layer, found)


def noise(y, exact):
    return float((y.double() - exact.double()).square().sum() / exact.double().square().sum())


def test_rows_that_are_the_token_others_and_multiples(states, token):
    x = torch.stack([token, 1.1 * token, -token, torch.zeros(40), states[0, 1], token + 0.01, 3 + 0 * token])
    times = multiples(x, token).flatten()
    assert times[[0, 5]].tolist() == [1, 1]
    assert float(times[1]) == pytest.approx(1.1)
    assert times[[2, 3, 4, 6]].tolist() == [0, 0, 0, 0]
    assert multiples(states[:0], token).shape == (0, 9, 1)
    assert multiples(x, torch.zeros(40)).any() == 0
    torch.testing.assert_close(without(x, token, multiples(x, token))[5], torch.full((40,), 0.01), rtol=1e-3, atol=1e-5)


def test_the_function_is_kept_in_float64(states, token, seeded):
    weight = seeded(12, 40, seed=2).double()
    x = states.double()
    times = multiples(x, token).double()
    z = x - times * token.double()
    exact = x @ weight.T
    torch.testing.assert_close(times * (weight @ token.double()) + z @ weight.T, exact, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("name", SPECS)
def test_the_token_is_as_exact_as_sixteen_bits_are(name, states, token, seeded, stats_of):
    layer = layer_of(seeded)
    new = made(layer, states, token, SPECS[name], stats_of)
    exact = (layer.weight.double() @ token.double()).detach()
    first = new(states)[:, 0].double() - layer.bias.double()
    assert ((first - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4).all()
    assert torch.equal(new.token_output, exact.bfloat16())


@pytest.mark.parametrize("name", SPECS)
def test_what_is_stored_is_counted(name, states, token, seeded, stats_of):
    new = made(layer_of(seeded), states, token, SPECS[name], stats_of)
    held = {key: (tuple(t.shape), t.dtype) for key, t in new.named_buffers()}
    assert held == layer_layout(new.spec, 12, 40, 40)
    rest = LayerSpec(weight=new.spec.weight, input=new.spec.input, transforms=new.spec.transforms[1:], low_rank=new.spec.low_rank)
    assert layer_bytes(new.spec, 12, 40, 40) == layer_bytes(rest, 12, 40, 40) + 2 * (12 + 40)
    assert "constant token" in describe(new.spec)


@pytest.mark.parametrize("name", ["w8a8 static", "w4a6 static", "fp8 static", "split"])
def test_a_static_range_without_the_outlier_pays(name, states, token, seeded, stats_of):
    layer, spec = layer_of(seeded), SPECS[name]
    new = made(layer, states, token, spec, stats_of)
    rest = LayerSpec(weight=spec.weight, input=spec.input, transforms=spec.transforms[1:])
    (found,) = solve([layer.weight.detach()], rest, stats_of(states.reshape(-1, 40)))
    plain = runtime_layer(layer, found)
    exact = layer(states).detach()
    gain = 1 if "fp8" in name else 30  # a float's error follows its numbers; an integer's step is the range's
    assert noise(new(states)[:, 1:], exact[:, 1:]) < noise(plain(states)[:, 1:], exact[:, 1:]) / gain
    assert noise(new(states)[:, 0], exact[:, 0]) < noise(plain(states)[:, 0], exact[:, 0])


@pytest.mark.parametrize("name", STATIC_SPECS)
@pytest.mark.parametrize("first", ["zeros", "another", "weighted", "rounded otherwise"])
def test_a_first_token_that_is_not_the_constant(name, first, states, token, seeded, stats_of):
    """An empty negative prompt, another encoder, a prompt's weighting, another batch size: never clipped, never replaced."""
    layer = layer_of(seeded)
    new = made(layer, states, token, SPECS[name], stats_of)
    rows = {
        "zeros": torch.zeros(40),
        "another": 90 * seeded(40, seed=9).sign(),
        "weighted": 1.21 * token,
        "rounded otherwise": token * (1 + 0.002 * seeded(40, seed=8)),
    }
    x = states.clone()
    x[2:, 0] = rows[first]  # a batch with both: guidance
    exact, y = layer(x).detach(), new(x)
    assert noise(y[2:, 0], exact[2:, 0]) < 1e-3 if "w4" not in name and name != "gptq" else 2e-2
    assert torch.equal(y[:2], new(states)[:2])


@pytest.mark.parametrize("name", SPECS)
def test_it_may_stand_anywhere(name, states, token, seeded, stats_of):
    """Long prompts are encoded in chunks that each begin with the token; one prompt alone; tokens without a batch."""
    layer = layer_of(seeded)
    new = made(layer, states, token, SPECS[name], stats_of)
    chunks = torch.cat([states[:1], states[1:2], states[2:3]], dim=1)
    exact, y = layer(chunks).detach(), new(chunks)
    assert noise(y[:, [0, 9, 18]], exact[:, [0, 9, 18]]) < 2.0**-14
    torch.testing.assert_close(new(states[0]), new(states[:1])[0], rtol=1e-5, atol=1e-5)
    assert new(states[:, :1]).shape == (4, 1, 12)


def test_no_constant_changes_nothing(states, token, seeded, stats_of):
    """Rows that are not the token are those of the layer without one, bit for bit."""
    layer = layer_of(seeded)
    new = made(layer, states, token, SPECS["w8a8 static"], stats_of)
    z = without(states, token, multiples(states, token))
    (found,) = solve([layer.weight.detach()], LayerSpec(weight=W8, input=STATIC), stats_of(z.reshape(-1, 40)))
    assert torch.equal(new(states)[:, 1:], runtime_layer(layer, found)(states)[:, 1:])


def test_dtypes_gradients_and_compilation(states, token, seeded, stats_of):
    layer = layer_of(seeded, bias=False).requires_grad_(False)
    new = made(layer, states, token, SPECS["w8a8 static"], stats_of)
    half = made(layer, states, token, SPECS["w8a8 static"], stats_of).to(torch.bfloat16)
    assert half(states.bfloat16()).dtype == torch.bfloat16
    assert noise(half(states.bfloat16()), layer(states)) < 1e-4
    x = states.clone().requires_grad_()
    new(x).sum().backward()
    torch.testing.assert_close(x.grad, new.dequantize().sum(0).expand(4, 9, 40))
    assert F.linear(states, new.plain().weight).shape == (4, 9, 12)
    run = torch.compile(new, backend="eager", fullgraph=True)
    assert torch.equal(run(states), new(states))


def test_token_tensors_are_of_the_exact_weight(token, seeded):
    weight = seeded(12, 40, seed=2)
    found = token_tensors(weight, token)
    assert found["token"].dtype == found["token_output"].dtype == torch.bfloat16
    assert torch.equal(found["token_output"], (weight.double() @ token.bfloat16().double()).bfloat16())
    assert torch.equal(token_tensors(weight, token.bfloat16())["token"], found["token"])


def test_it_comes_first():
    with pytest.raises(ValueError, match=r"transforms must begin with ConstantToken and ShortcutSplit, got"):
        LayerSpec(weight=W8, transforms=(ShortcutSplit(), CONSTANT))
