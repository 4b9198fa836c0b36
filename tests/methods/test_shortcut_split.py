"""Parts of a concatenated input: the columns and statistics of each, the function, and what scales of their own are worth."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqtk.kernels import from_matrix, to_matrix
from dqtk.methods.shortcut_split import columns_of, inputs_of
from dqtk.methods.solve import solve
from dqtk.nn import runtime_class
from dqtk.numerics.storage import BUFFERS, layer_bytes, layer_layout, parts_of
from dqtk.quantize import runtime_layer
from dqtk.spec import (
    GPTQ,
    Codebook,
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
    TwoLevel,
    describe,
    from_json,
    to_json,
)

SPLIT = ShortcutSplit(at=(24,))
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W3 = TensorSpec(format=Int(bits=3), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=8))
W4_TWO = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=8))
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
NF4 = TensorSpec(format=Codebook(tables=((-1.0, -0.4, 0.0, 0.5), (-1.0, 0.0, 0.2, 1.0))), granularity=PerGroup(size=8))
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
SPECS = {
    "w8a8 static": LayerSpec(weight=W8, input=STATIC, transforms=(SPLIT,)),
    "w8a8": LayerSpec(weight=W8, input=A8, transforms=(SPLIT,)),
    "w8": LayerSpec(weight=W8, transforms=(SPLIT,)),
    "w3a8 static": LayerSpec(weight=W3, input=STATIC, transforms=(SPLIT,)),
    "w4 groups, gptq": LayerSpec(weight=W4, solver=GPTQ(), transforms=(SPLIT,)),
    "w4 two-level, smooth, rotated": LayerSpec(weight=W4_TWO, input=A8, transforms=(SPLIT, Smooth(alpha=0.5), Hadamard())),
    "fp8": LayerSpec(weight=WFP8, input=TensorSpec(format=Float(), granularity=PerTensor()), transforms=(SPLIT,)),
    "tables": LayerSpec(weight=NF4, transforms=(SPLIT,)),
    "three parts": LayerSpec(weight=W8, input=STATIC, transforms=(ShortcutSplit(at=(8, 24)),)),
}
LINEAR_ONLY = {"branch": LayerSpec(weight=W4, low_rank=LowRank(rank=4), transforms=(SPLIT,))}


def unequal(seeded, *shape, seed=0):
    """Numbers whose first 24 channels are 30 times the other 16, and one-sided."""
    x = seeded(*shape, 40, seed=seed)
    return torch.cat([30 * (x[..., :24] + 3), x[..., 24:]], dim=-1)


def layers(seeded):
    torch.manual_seed(0)
    rows = unequal(seeded, 3, 7)
    picture = unequal(seeded, 2, 6, 5).movedim(-1, 1).contiguous()
    return {
        "linear": (nn.Linear(40, 12), rows),
        "no bias": (nn.Linear(40, 12, bias=False), rows),
        "conv": (nn.Conv2d(40, 12, 1), picture),
        "conv 3x3": (nn.Conv2d(40, 12, 3, padding=1, stride=2), picture),
    }


def statistics(layer, x, stats_of):
    """What calibration keeps of one call, ends included."""
    if isinstance(layer, nn.Linear):
        return stats_of(x.reshape(-1, 40))
    from dqtk.calibrate.gather import gather
    from dqtk.calibrate.replay import Call
    from dqtk.sites import Site

    module = nn.ModuleDict({"conv": layer})
    module.forward = lambda sample: layer(sample)
    site = Site(id="unet:conv", kind="conv", role="conv", shape=tuple(layer.weight.shape), bias=True)
    return gather(module, [Call("unet", (), {"sample": x}, 0.5)], [site])["unet:conv"]


def made(layer, x, spec, stats_of):
    """The runtime layer, as ``quantize`` makes it."""
    weight = layer.weight.detach()
    matrix = weight if weight.ndim == 2 else to_matrix(weight)
    (found,) = solve([matrix], spec, statistics(layer, x, stats_of), channels=40)
    return runtime_layer(layer, found)


def halves(layer, x, spec, stats_of):
    """The same from two ordinary layers that add up."""
    total = None
    for part in parts_of(spec, 40):
        cut = slice(part.start, part.stop)
        own = type(layer).__new__(type(layer))
        own.__dict__ = layer.__dict__.copy()
        own._parameters = {"weight": nn.Parameter(layer.weight.detach()[:, cut]), "bias": layer.bias if part.place == 0 else None}
        width = part.stop - part.start
        own.in_features = own.in_channels = width
        dim = x.ndim - 1 if isinstance(layer, nn.Linear) else 1
        given = x.narrow(dim, part.start, width)
        taps = layer.weight[0, 0].numel()
        columns = columns_of(part, 40 * taps, 40)
        whole = statistics(layer, x, stats_of)
        matrix = own.weight.detach() if own.weight.ndim == 2 else to_matrix(own.weight.detach())
        (found,) = solve([matrix], part.spec, inputs_of(part, whole, 40), channels=width)
        assert torch.equal(inputs_of(part, whole, 40).low, whole.low[columns])
        y = runtime_layer(own, found)(given)
        total = y if total is None else total + y
    return total


CASES = [(name, kind) for name in SPECS for kind in ("linear", "no bias", "conv", "conv 3x3")] + [("branch", "linear")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_is_the_sum_of_a_layer_per_part(name, kind, seeded, stats_of):
    """Bit for bit: kernels serve every part as they serve a layer of its size."""
    layer, x = layers(seeded)[kind]
    spec = (SPECS | LINEAR_ONLY)[name]
    new = made(layer, x, spec, stats_of)
    assert torch.equal(new(x), halves(layer, x, spec, stats_of))
    assert new.spec.transforms == spec.transforms
    held = {key: (tuple(t.shape), t.dtype) for key, t in new.named_buffers()}
    k = layer.weight[0].numel()
    assert held == layer_layout(new.spec, 12, k, 40)
    assert layer_bytes(new.spec, 12, k, 40) == sum(t.numel() * t.element_size() for _, t in new.named_buffers())


@pytest.mark.parametrize("kind", ["linear", "conv", "conv 3x3"])
def test_its_weight_means_what_it_meant(kind, seeded, stats_of):
    """Decoding joins the parts in the layer's own order of columns, as plain layers and adapters need it."""
    layer, x = layers(seeded)[kind]
    new = made(layer, x, LayerSpec(weight=W8, transforms=(SPLIT, Smooth(alpha=0.5), Hadamard())), stats_of)
    largest = layer.weight.detach().abs().max()
    assert (new.dequantize() - layer.weight).abs().max() < 0.02 * largest
    torch.testing.assert_close(new.plain()(x), new(x), rtol=1e-3, atol=1e-2)
    assert not any(name.startswith("qweight") or name == "parts" for name in vars(new.plain()))


def test_the_function_is_kept_in_float64(seeded):
    """x W^T is the sum over the parts, whatever the taps."""
    conv = nn.Conv2d(40, 6, 3, padding=1).double()
    x = seeded(2, 40, 5, 5).double()
    matrix = to_matrix(conv.weight.detach())
    total = conv.bias.detach().view(1, -1, 1, 1)
    for part in parts_of(SPECS["three parts"], 40):
        weight = from_matrix(matrix[:, columns_of(part, matrix.shape[1], 40)], (3, 3))
        total = total + F.conv2d(x[:, part.start : part.stop], weight, padding=1)
    torch.testing.assert_close(total, conv(x).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", ["w8a8 static", "w3a8 static"])
def test_scales_of_their_own_pay_where_halves_differ(kind, name, seeded, stats_of):
    layer, x = layers(seeded)[kind]
    with torch.no_grad():
        layer.weight[:, :24] /= 30  # so that both halves count alike in the output
    spec = SPECS[name]
    whole = LayerSpec(weight=spec.weight, input=spec.input)
    exact = layer(x).detach()
    errors = [float((made(layer, x, s, stats_of)(x) - exact).square().mean()) for s in (spec, whole)]
    assert errors[0] < errors[1] / 4


def test_gptq_sees_each_part_of_the_second_moments(seeded, stats_of):
    x = unequal(seeded, 50)
    part = parts_of(SPECS["w8"], 40)[1]
    found = inputs_of(part, stats_of(x), 40)
    torch.testing.assert_close(found.gram, stats_of(x[:, 24:].contiguous()).gram)
    assert torch.equal(found.sample, x[:, 24:])


def test_what_is_written():
    spec = SPECS["three parts"]
    assert from_json(to_json(spec)) == spec
    assert describe(spec) == "W8 per channel, A8 per tensor asym, split 8 24"
    assert {name for name in layer_layout(spec, 4, 40, 40) if name.startswith("q")} == {"qweight", "qweight_2", "qweight_3"}
    assert "parts" not in BUFFERS
    opened = LayerSpec(weight=W8, input=STATIC, transforms=(ShortcutSplit(),))
    assert layer_layout(opened, 4, 40, 40).keys() == {"qweight", "scale", "input_scale", "input_zero"}


def test_kernel_says_that_there_are_parts(seeded, stats_of):
    layer, x = layers(seeded)["conv"]
    said = made(layer, x, SPECS["three parts"], stats_of).kernel()
    assert said.startswith("conv_int8: integer matmul")
    assert said.endswith("summed over 3 parts of the input")


@pytest.mark.parametrize(
    ("transforms", "said"),
    [
        ((lambda: ShortcutSplit(at=(8, 8)),), r"ShortcutSplit: at must be ascending channels above 0, got \(8, 8\)"),
        ((lambda: ShortcutSplit(at=(0,)),), r"ShortcutSplit: at must be ascending channels above 0, got \(0,\)"),
        ((lambda: ShortcutSplit(at=8),), r"ShortcutSplit: at must be a tuple, got 8"),
        ((Hadamard, lambda: SPLIT), r"transforms must begin with ShortcutSplit, got .* The others act on what these leave"),
    ],
)
def test_impossible_splits(transforms, said):
    with pytest.raises(ValueError, match=said):
        LayerSpec(weight=W8, transforms=tuple(make() for make in transforms))


def test_a_split_behind_the_last_channel():
    with pytest.raises(ValueError, match=r"ShortcutSplit: at must be below the layer's 24 input channels, got \(24,\)"):
        runtime_class(nn.Linear(24, 4)).like(nn.Linear(24, 4), SPECS["w8"])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_compiled_copied_and_cast(kind, seeded, stats_of):
    """One graph; a copy has buffers of its own; casts leave every part's codes and scales."""
    layer, x = layers(seeded)[kind]
    new = made(layer, x, SPECS["w8a8 static"], stats_of).requires_grad_(False)
    assert torch.equal(torch.compile(new, backend="eager", fullgraph=True)(x), new(x))
    other = copy.deepcopy(new)
    assert torch.equal(other(x), new(x))
    other.qweight_2.zero_()
    assert not torch.equal(other(x), new(x))
    half = copy.deepcopy(new).to(torch.bfloat16)
    assert half.scale_2.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16
