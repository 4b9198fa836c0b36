"""Every family of formats on real layers: what they compute, store and keep, transforms and low-rank branch included."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqtk.kernels import from_matrix, to_matrix
from dqtk.methods.rtn import rtn
from dqtk.nn import BUFFERS, QuantConv2d, QuantLinear, runtime_class
from dqtk.numerics.codebook import bitmod, log_grid, nf4
from dqtk.numerics.hadamard import pack_signs, random_signs
from dqtk.numerics.inputs import round_input
from dqtk.numerics.packing import dequantize
from dqtk.numerics.storage import layer_bytes, layer_layout
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
    PerToken,
    Smooth,
    TensorSpec,
    TwoLevel,
)

E2M1, E4M3, E3M4 = Float(exponent=2, mantissa=1), Float(), Float(exponent=3, mantissa=4)
UE4M4 = Float(exponent=4, mantissa=4, signed=False)


def weight(form, granularity=None):
    return TensorSpec(format=form, granularity=granularity or PerChannel())


def dynamic(form, granularity=None):
    return TensorSpec(format=form, granularity=granularity or PerToken(), range=Dynamic())


def static(form):
    return TensorSpec(format=form, granularity=PerTensor())


WEIGHTS = {
    "e3m4": weight(E3M4),
    "e5m2": weight(Float(exponent=5, mantissa=2), PerTensor()),
    "e2m1 group": weight(E2M1, PerGroup(size=8)),
    "mxfp4": weight(E2M1, E8M0Group(size=8)),
    "nvfp4": weight(E2M1, E4M3Group(size=8)),
    "int6": weight(Int(bits=6)),
    "int4 e8m0": weight(Int(bits=4), E8M0Group(size=8)),
    "int3 asym": weight(Int(bits=3, symmetric=False), PerGroup(size=8)),
    "two-level": weight(Int(bits=3), TwoLevel(size=8)),
    "nf4": weight(nf4(), PerGroup(size=8)),
    "bitmod": weight(bitmod(4), PerGroup(size=8)),
}
INPUTS = {
    "e4m3 token": dynamic(E4M3),
    "e2m1 group": dynamic(E2M1, PerGroup(size=8)),
    "mxfp8": dynamic(E4M3, E8M0Group(size=8)),
    "nvfp4": dynamic(E2M1, E4M3Group(size=8)),
    "int8": dynamic(Int(bits=8)),
    "int4 asym": dynamic(Int(bits=4, symmetric=False)),
    "int6 group": dynamic(Int(bits=6), PerGroup(size=8)),
    "int4 static": static(Int(bits=4, symmetric=False)),
    "int8 static": static(Int(bits=8)),
    "ue4m4 static": static(UE4M4),
    "log static": static(log_grid(6, 1.2)),
}
RANGES = {
    "int4 static": {"input_scale": torch.tensor([0.4]), "input_zero": torch.tensor([2], dtype=torch.int32)},
    "int8 static": {"input_scale": torch.tensor([0.02]), "input_zero": torch.tensor([0], dtype=torch.int32)},
    "ue4m4 static": {"input_scale": torch.tensor([0.03]), "input_zero": torch.tensor([80.5])},
    "log static": {"input_scale": torch.tensor([2.5])},
}
LAYERS = {
    "linear": (lambda: nn.Linear(24, 7), (2, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 7, bias=False), (5, 24)),
    "conv1d": (lambda: nn.Conv1d(16, 5, 3, stride=2, padding=1), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 8, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(8, 5, (3, 1, 2), padding=(1, 0, 1), bias=False), (1, 8, 4, 5, 4)),
}


def build(name, dtype=torch.float32):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().to(dtype), torch.randn(shape).to(dtype)


def extras(layer, spec):
    """Tensors of transforms and branch, by hand."""
    channels, matrix = layer.weight.shape[1], to_matrix(layer.weight)
    generator, found = torch.Generator().manual_seed(7), {}
    for transform in spec.transforms:
        if isinstance(transform, Smooth):
            found["smooth"] = torch.exp2(torch.randn(channels, generator=generator)).bfloat16()
        else:
            found["signs"] = pack_signs(random_signs(channels, transform.seed))
    if spec.low_rank is not None:
        for name, shape in (("down", (2, matrix.shape[1])), ("up", (len(matrix), 2))):
            found[name] = (torch.randn(shape, generator=generator) / 4).bfloat16()
    return found


def filled(layer, spec, given=None):
    """A runtime layer whose codes are those of ``layer``, taken as already transformed."""
    new = runtime_class(layer).like(layer, spec)
    matrix = layer.weight.detach() if isinstance(layer, nn.Linear) else to_matrix(layer.weight.detach())
    new.fill(rtn(matrix, spec.weight).tensors() | (given or {}) | extras(layer, spec), layer.bias)
    return new.eval()


def product(layer, x, matrix, bias):
    """The layer's matmul or convolution in float64."""
    bias = None if bias is None else bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), matrix.double(), bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
    kernel = from_matrix(matrix.double(), layer.kernel_size)
    return conv(x.double(), kernel, bias, layer.stride, layer.padding, layer.dilation)


def rounded(layer, x, spec, given):
    scale, zero = given.get("input_scale"), given.get("input_zero")
    if isinstance(layer, nn.Linear):
        return round_input(x.float(), spec, scale, zero, x.ndim - 1)
    return round_input(x.float().movedim(1, -1), spec, scale, zero).movedim(-1, 1)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("stored", WEIGHTS)
def test_weights_alone(stored, name):
    plain, x = build(name)
    new = filled(plain, LayerSpec(weight=WEIGHTS[stored]))
    matrix = dequantize(rtn(to_matrix(plain.weight.detach()), WEIGHTS[stored]), WEIGHTS[stored], plain.weight[0].numel())
    assert new.op == "weight_only"
    torch.testing.assert_close(new(x).double(), product(plain, x, matrix, plain.bias), rtol=1e-5, atol=1e-5)
    assert (new(x) - plain(x)).norm() < 0.35 * plain(x).norm()
    half, x = filled(plain.bfloat16(), LayerSpec(weight=WEIGHTS[stored])), x.bfloat16()
    assert half(x).dtype == torch.bfloat16
    assert torch.equal(half(x), half.plain()(x))


PAIRS = [
    *((stored, given) for stored in ("nvfp4", "e3m4") for given in INPUTS),
    *((stored, given) for stored in WEIGHTS for given in ("nvfp4", "int8", "int8 static")),
]


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv2d"])
@pytest.mark.parametrize(("stored", "given"), dict.fromkeys(PAIRS))
def test_rounded_inputs(stored, given, name):
    """F.linear or a convolution of the rounded operands in float64, whichever op runs. Rounded bfloat16 is not bfloat16 again."""
    plain, x = build(name)
    spec, ranges = LayerSpec(weight=WEIGHTS[stored], input=INPUTS[given]), RANGES.get(given, {})
    new = filled(plain, spec, ranges)
    matrix = dequantize(rtn(to_matrix(plain.weight.detach()), spec.weight), spec.weight, plain.weight[0].numel())
    expected = product(plain, rounded(plain, x, spec.input, ranges), matrix, plain.bias)
    torch.testing.assert_close(new(x).double(), expected, rtol=1e-5, atol=1e-5)
    half = filled(plain.bfloat16(), spec, ranges)
    expected = product(plain, rounded(plain, x.bfloat16(), spec.input, ranges), half.stored_matrix(), half.bias)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).double(), expected, rtol=2**-8, atol=1e-5)


EVERYTHING = {f"weight {name}": (LayerSpec(weight=spec), {}) for name, spec in WEIGHTS.items()}
EVERYTHING |= {
    f"input {name}": (LayerSpec(weight=WEIGHTS["nvfp4"], input=spec), RANGES.get(name, {})) for name, spec in INPUTS.items()
}
EVERYTHING |= {
    "smooth": (LayerSpec(weight=WEIGHTS["nvfp4"], transforms=(Smooth(),)), {}),
    "rotated": (LayerSpec(weight=WEIGHTS["int6"], input=INPUTS["int8"], transforms=(Hadamard(),)), {}),
    "svdquant": (
        LayerSpec(
            weight=WEIGHTS["bitmod"], input=INPUTS["int4 static"], transforms=(Hadamard(), Smooth()), low_rank=LowRank(rank=2)
        ),
        RANGES["int4 static"],
    ),
}


@pytest.mark.parametrize("case", EVERYTHING)
def test_stored_tensors_are_the_declared_ones(case):
    spec, given = EVERYTHING[case]
    plain, _ = build("linear")
    new = filled(plain, spec, given)
    held = {name: tensor for name, tensor in new.state_dict().items() if name != "bias"}
    assert {name: (tuple(t.shape), t.dtype) for name, t in held.items()} == layer_layout(spec, 7, 24, 24)
    assert layer_bytes(spec, 7, 24, 24) == sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert set(held) == {name for name in BUFFERS if getattr(new, name) is not None}


@pytest.mark.parametrize("case", EVERYTHING)
def test_state_round_trip(case):
    spec, given = EVERYTHING[case]
    plain, x = build("linear")
    new = filled(plain, spec, given)
    for assign in (False, True):
        empty = runtime_class(plain).like(plain, spec, device="meta" if assign else None)
        empty.load_state_dict(copy.deepcopy(new.state_dict()), strict=True, assign=assign)
        assert torch.equal(empty(x), new(x))


@pytest.mark.parametrize("case", EVERYTHING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_keep_buffers(case, dtype):
    spec, given = EVERYTHING[case]
    plain, x = build("linear")
    new = filled(plain, spec, given)
    before, expected = {name: tensor.clone() for name, tensor in new.named_buffers()}, new(x)
    moved = new.to(dtype)
    assert moved.bias.dtype == moved.compute_dtype == dtype
    for name, tensor in moved.named_buffers():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    y = moved(x.to(dtype))
    assert y.dtype == dtype
    tolerance = 0.1 if spec.input is not None else 0.02  # an input in bfloat16 may round to another code
    assert (y.float() - expected).norm() < tolerance * expected.norm()
    back = moved.float()
    back.bias.data = plain.bias.data
    assert torch.equal(back(x), expected)


TRANSFORMS = {
    "smooth": {"transforms": (Smooth(),)},
    "rotated": {"transforms": (Hadamard(seed=3),)},
    "rotated in blocks": {"transforms": (Hadamard(block=4, regular=True),)},
    "smooth, rotated": {"transforms": (Smooth(), Hadamard(block=8))},
    "rotated, smooth": {"transforms": (Hadamard(), Smooth())},
    "branch": {"low_rank": LowRank(rank=2)},
    "all": {"transforms": (Smooth(), Hadamard()), "low_rank": LowRank(rank=2)},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("more", TRANSFORMS)
@pytest.mark.parametrize("stored", ["nvfp4", "two-level", "bitmod"])
def test_the_plain_layer_computes_the_same(name, more, stored):
    """Decoded codes and branch, back in the basis of the layer's own input."""
    if "conv" in name and "low_rank" in TRANSFORMS[more]:
        more = {key: value for key, value in TRANSFORMS[more].items() if key != "low_rank"}
    else:
        more = TRANSFORMS[more]
    plain, x = build(name)
    new = filled(plain, LayerSpec(weight=WEIGHTS[stored], **more))
    ordinary = new.plain()
    assert type(ordinary) is type(plain)
    assert ordinary.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(ordinary(x), new(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(new.weight + 0, ordinary.weight)
    assert new.dequantize().shape == plain.weight.shape
    if more:
        assert not torch.allclose(new.dequantize_matrix(), new.stored_matrix(), atol=1e-2)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
@pytest.mark.parametrize("more", ["smooth", "rotated", "smooth, rotated", "rotated, smooth"])
def test_a_transformed_weight_keeps_the_layers_function(name, more):
    """Codes of the weight in the new basis, inputs in the same basis: with 8 bits nearly the old output, in any order."""
    plain, x = build(name)
    for given in (None, dynamic(Int(bits=8))):
        spec = LayerSpec(weight=weight(Int(bits=8)), input=given, **TRANSFORMS[more])
        new = filled(plain, spec)
        channels, matrix = plain.weight.shape[1], to_matrix(plain.weight.detach())
        turned = matrix.unflatten(1, (-1, channels))
        for transform in spec.transforms:
            if isinstance(transform, Smooth):
                turned = turned / new.smooth
            else:
                turned = new.basis.__class__((transform,), channels).apply(turned, None, new.signs)
        new.fill(rtn(turned.flatten(1), spec.weight).tensors() | extras(plain, spec), plain.bias)
        assert (new(x) - plain(x)).norm() < 0.03 * plain(x).norm()
        torch.testing.assert_close(new.weight + 0, plain.weight.detach(), rtol=0, atol=0.02)


def test_the_branch_runs_on_the_input_that_is_not_rounded():
    """In the compute dtype, on the transformed input."""
    plain, x = build("linear without bias")
    spec = LayerSpec(weight=WEIGHTS["nvfp4"], input=INPUTS["nvfp4"], **TRANSFORMS["all"])
    new = filled(plain, spec)
    without = filled(plain, LayerSpec(weight=spec.weight, input=spec.input, transforms=spec.transforms))
    z = new.basis.apply(x, new.smooth, new.signs)
    branch = z.double() @ (new.up.double() @ new.down.double()).T
    torch.testing.assert_close(new(x).double() - without(x).double(), branch, rtol=1e-4, atol=1e-4)
    half = new.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_convolutions_have_no_branch():
    spec = LayerSpec(weight=WEIGHTS["nvfp4"], low_rank=LowRank(rank=4))
    with pytest.raises(ValueError, match=r"QuantConv2d: low_rank must be None for convolutions, got LowRank\(rank=4.*Leave it out"):
        QuantConv2d.like(nn.Conv2d(8, 8, 3), spec)


@pytest.mark.parametrize("given", [name for name in INPUTS if "static" not in name])
@pytest.mark.parametrize("more", ["smooth", "all"])
def test_tokens_do_not_influence_each_other(given, more):
    plain, x = build("linear")
    new = filled(plain, LayerSpec(weight=WEIGHTS["nvfp4"], input=INPUTS[given], **TRANSFORMS[more]))
    before = new(x)
    x[0, 1] *= 1e3
    after = new(x)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, [0, 2, 3, 4]], before[0, [0, 2, 3, 4]])
    torch.testing.assert_close(new(x[1, 2]), after[1, 2], rtol=1e-5, atol=1e-5)  # a vector is one token
    assert new(x[:0]).shape == (0, 5, 7)


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_gradients_are_those_of_the_plain_layer(given, name):
    """Rounding is passed over, whichever op runs; transforms and branch are differentiated."""
    plain, x = build(name)
    more = TRANSFORMS["all"] if name == "linear" else TRANSFORMS["smooth, rotated"]
    spec = LayerSpec(weight=WEIGHTS["int6"], input=INPUTS[given], **more)
    new = filled(plain, spec, RANGES.get(given))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = new(a), new.plain()(b)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert torch.equal(y, new(x))


@pytest.mark.parametrize("case", EVERYTHING)
def test_convolutions_take_one_sample_without_batch(case):
    spec, given = EVERYTHING[case]
    if spec.low_rank is not None:
        return
    plain, x = build("conv2d")
    new = filled(plain, spec, given)
    torch.testing.assert_close(new(x[0]), new(x[:1])[0])
    torch.testing.assert_close(new(x)[1], new(x[1]), rtol=1e-5, atol=1e-5)


def test_layers_say_what_runs():
    plain, _ = build("linear")
    new = filled(plain, LayerSpec(weight=WEIGHTS["nvfp4"], input=INPUTS["nvfp4"], **TRANSFORMS["all"]))
    assert new.op == "emulated"
    assert new.kernel().endswith("emulated in floating point")
    assert "WFP4 E2M1 group 8 E4M3, AFP4 E2M1 group 8 E4M3, smooth, rotated, rank 2" in repr(new)
    assert isinstance(new, QuantLinear)


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_autocast_does_not_lower_what_is_emulated(layer):
    """Rounded numbers are multiplied in float32, as without autocast; weights alone may run in bf16."""
    plain, x = build(layer)
    new = filled(plain, LayerSpec(weight=WEIGHTS["nvfp4"], input=INPUTS["e2m1 group"]), {})
    assert new.op == "emulated"
    with torch.autocast("cpu", torch.bfloat16):
        y = new(x)
    assert torch.equal(y, new(x))
