"""Runtime layers against ordinary ones with the decoded weight, and as citizens of torch: dtypes, devices, copies, state."""

import copy

import pytest
import torch
from torch import nn

from dqtk.kernels import report_of
from dqtk.nn import BUFFERS, QuantConv1d, QuantConv2d, QuantConv3d, Quantized, QuantLinear, runtime_class
from dqtk.spec import Dynamic, Float, Int, LayerSpec, PerChannel, PerGroup, PerToken, TensorSpec

NAMES = ["w8", "w4", "wfp8", "w8a8", "w8a8-static", "w4a8-rtn", "fp8"]
LAYERS = {
    "linear": (lambda: nn.Linear(24, 7), (2, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 7, bias=False), (5, 24)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3, stride=2, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 8, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(8, 5, 1, bias=False), (2, 8, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(8, 5, (3, 1, 2), stride=(1, 2, 1), padding=(1, 0, 1)), (1, 8, 4, 5, 4)),
}
CLASSES = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d}


def cases():
    return [pytest.param(layer, spec, id=f"{layer}-{spec}") for layer in LAYERS for spec in NAMES]


def make(quantized, layer, spec, dtype=torch.float32):
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    plain = build().to(dtype)
    return plain, quantized(plain, spec), torch.randn(shape).clamp(-3, 4).to(dtype)


@pytest.mark.parametrize(("layer", "spec"), cases())
def test_close_to_the_unquantized_layer(quantized, layer, spec):
    plain, new, x = make(quantized, layer, spec)
    expected = plain(x)
    y = new(x)
    assert y.shape == expected.shape
    error = (y - expected).norm() / expected.norm()
    assert error < (0.02 if "8" in spec and not spec.endswith("fp8") and "4" not in spec else 0.15)


@pytest.mark.parametrize(("layer", "spec"), [case for case in cases() if case.values[1] in ("w8", "w4", "wfp8")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_only_equals_the_plain_layer(quantized, layer, spec, dtype):
    """``plain()`` is an ordinary torch layer with the same weight, and computes the same; a linear's many tokens bit for bit."""
    original, new, x = make(quantized, layer, spec, dtype)
    plain = new.plain()
    assert type(plain) is type(original)
    assert vars(plain).keys() >= {name for name in vars(original) if not name.endswith("hooks") and name != "_modules"}
    assert repr(plain) == repr(original)
    assert not any(isinstance(part, Quantized) for part in plain.modules())
    assert plain.weight.dtype == dtype
    if layer.startswith("linear"):
        torch.testing.assert_close(plain(x), new(x))  # a few tokens are multiplied in another order
        x = torch.cat([x] * 5)
        assert torch.equal(plain(x), new(x))
    torch.testing.assert_close(plain(x), new(x))  # on some CPUs torch picks a convolution by its weight's strides
    assert torch.equal(plain.weight, new.dequantize())
    assert copy.deepcopy(plain).state_dict().keys() == original.state_dict().keys()


@pytest.mark.parametrize(("layer", "spec"), cases())
def test_class_and_hyperparameters_are_those_of_the_layer(quantized, layer, spec):
    plain, new, _ = make(quantized, layer, spec)
    assert type(new) is CLASSES[type(plain)]
    assert isinstance(new, type(plain))
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for name in names:
        assert getattr(new, name, None) == getattr(plain, name, None)
    assert new.training == plain.training


@pytest.mark.parametrize(("layer", "spec"), cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_floating_parameter_in_the_compute_dtype(quantized, layer, spec, dtype):
    """Host models ask for ``next(parameters()).dtype``."""
    plain, new, x = make(quantized, layer, spec, dtype)
    (parameter,) = new.parameters()
    assert parameter.dtype == new.compute_dtype == dtype
    assert not parameter.requires_grad
    assert parameter.numel() == (0 if plain.bias is None else plain.bias.numel())
    assert new(x).dtype == dtype


DECLARED = {
    "w8": {"qweight": (torch.int8, (7, 24)), "scale": (torch.float32, (7, 1))},
    "w4": {"qweight": (torch.uint8, (7, 12)), "scale": (torch.bfloat16, (7, 3)), "zero": (torch.uint8, (7, 3))},
    "wfp8": {"qweight": (torch.float8_e4m3fn, (7, 24)), "scale": (torch.float32, (7, 1))},
    "w8a8": {"qweight": (torch.int8, (7, 24)), "scale": (torch.float32, (7, 1))},
    "w8a8-static": {
        "qweight": (torch.int8, (7, 24)),
        "scale": (torch.float32, (7, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero": (torch.int32, (1,)),
    },
    "w4a8-rtn": {"qweight": (torch.uint8, (7, 12)), "scale": (torch.float32, (7, 1)), "group_scale": (torch.uint8, (7, 3))},
    "fp8": {"qweight": (torch.float8_e4m3fn, (7, 24)), "scale": (torch.float32, (7, 1))},
}


@pytest.mark.parametrize("spec", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_state_is_the_checkpoint_format(quantized, spec, bias):
    new = quantized(nn.Linear(24, 7, bias=bias).bfloat16(), spec)
    expected = DECLARED[spec] | ({"bias": (torch.bfloat16, (7,))} if bias else {"anchor": (torch.bfloat16, (0,))})
    assert {name: (t.dtype, tuple(t.shape)) for name, t in new.state_dict().items()} == expected


@pytest.mark.parametrize(("layer", "spec"), cases())
def test_state_loads_into_empty_storage(quantized, specs, layer, spec):
    plain, new, x = make(quantized, layer, spec)
    for assign in (False, True):
        empty = runtime_class(plain).like(plain, specs[spec], device="meta" if assign else None)
        empty.load_state_dict(new.state_dict(), strict=True, assign=assign)
        assert torch.equal(empty(x), new(x))


MOVES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.bfloat16),
    "cpu": lambda m: m.cpu(),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "deepcopy": copy.deepcopy,
}


def storage(layer):
    return {name: getattr(layer, name) for name in BUFFERS if getattr(layer, name) is not None}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize(("layer", "spec"), cases())
def test_codes_and_scales_survive_casts(quantized, layer, spec, move):
    _, new, x = make(quantized, layer, spec)
    before = {name: tensor.clone() for name, tensor in storage(new).items()}
    moved = MOVES[move](new)
    after = storage(moved)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
        assert moved.state_dict()[name] is after[name] or torch.equal(
            moved.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)
        )
    x = x.to(moved.compute_dtype)
    assert moved(x).dtype == moved.compute_dtype


@pytest.mark.parametrize("spec", NAMES)
def test_casting_back_gives_the_same_layer(quantized, spec):
    _, new, x = make(quantized, "linear without bias", spec)
    expected = new(x)
    assert torch.equal(new.half().float()(x), expected)


@pytest.mark.parametrize("spec", NAMES)
def test_meta_device_and_back(quantized, spec):
    _, new, x = make(quantized, "linear", spec)
    state, expected, dtypes = copy.deepcopy(new.state_dict()), new(x), {name: t.dtype for name, t in storage(new).items()}
    new.to(device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in new.state_dict().values())
    assert new.weight.is_meta
    new.to_empty(device="cpu")
    assert {name: t.dtype for name, t in storage(new).items()} == dtypes
    new.float().load_state_dict(state)
    assert torch.equal(new(x), expected)


def test_deepcopy_is_independent(quantized):
    _, new, x = make(quantized, "linear", "w4a8-rtn")
    expected = new(x)
    copied = copy.deepcopy(new)
    copied.scale.zero_()
    assert torch.equal(new(x), expected)
    assert copied.weight.abs().max() == 0


def test_default_device_and_dtype_are_torchs(specs):
    with torch.device("meta"):
        layer = QuantLinear(24, 7, True, specs["w4a8-rtn"])
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer.compute_dtype == torch.float32
    assert QuantLinear(24, 7, False, specs["w8"], dtype=torch.bfloat16).compute_dtype == torch.bfloat16


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize("spec", ["w8", "w8a8", "w8a8-static"])
def test_convolutions_take_one_sample_without_batch(quantized, layer, spec):
    _, new, x = make(quantized, layer, spec)
    torch.testing.assert_close(new(x[0]), new(x[:1])[0])


@pytest.mark.parametrize("layer", ["conv1d", "conv2d", "conv3d"])
def test_convolutions_with_fp8_inputs_are_emulated(quantized, layer):
    """One scale per sample; padding is the number 0."""
    _, new, x = make(quantized, layer, "fp8")
    scale = x.abs().flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1)) / 448
    codes = (x / scale).to(torch.float8_e4m3fn)
    assert new.op == "emulated"
    plain = new.plain().double()
    torch.testing.assert_close(new(x).double(), plain(codes.double() * scale.double()), rtol=1e-5, atol=1e-5)


def test_groups_must_divide():
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16)))
    with pytest.raises(ValueError, match="group size must divide the 24 inputs"):
        QuantLinear.like(nn.Linear(24, 7), spec)


def test_runtime_classes():
    assert runtime_class(nn.Linear(2, 2)) is QuantLinear
    assert runtime_class(nn.Conv3d(2, 2, 1)) is QuantConv3d
    assert runtime_class(nn.ConvTranspose2d(2, 2, 1)) is None
    assert runtime_class(nn.LayerNorm(2)) is None


def test_layers_say_what_runs(quantized):
    expected = {
        "w4": f"weight_only: {report_of('weight_only', 'cpu')}",
        "w8a8": f"linear_int8: {report_of('linear_int8', 'cpu')}",
        "fp8": "linear_fp8: emulated in floating point",
    }
    for spec, text in expected.items():
        assert make(quantized, "linear", spec)[1].kernel() == text
    assert make(quantized, "conv2d", "w4a8-rtn")[1].kernel() == f"conv_int8: {report_of('conv_int8', 'cpu')}"
    assert "W4 group 8 two-level, A8 per token" in repr(make(quantized, "linear", "w4a8-rtn")[1])


def test_initializers_leave_codes_alone(quantized):
    """Hosts call ``reset_parameters`` on layers they believe to be new."""
    _, new, x = make(quantized, "linear", "w8")
    expected = new(x)
    new.reset_parameters()
    assert torch.equal(new(x), expected)


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_odd_widths_run_in_both_modes_and_are_really_packed(quantized, bits):
    weight = TensorSpec(format=Int(bits=bits), granularity=PerChannel())
    token = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
    for build in (lambda: nn.Linear(24, 7), lambda: nn.Conv2d(8, 5, 3)):
        plain = build()
        x = torch.randn((3, 24) if isinstance(plain, nn.Linear) else (2, 8, 5, 5))
        for spec in (LayerSpec(weight=weight), LayerSpec(weight=weight, input=token)):
            new, expected = quantized(plain, spec), plain(x)
            assert (new(x) - expected).norm() < 0.1 * expected.norm()
            assert new.qweight.numel() == plain.weight.numel() * bits / 8
            assert new.stored_width == bits


def test_fp8_weight_only_with_groups(quantized):
    spec = LayerSpec(weight=TensorSpec(format=Float(), granularity=PerGroup(size=8)))
    plain = nn.Linear(24, 7)
    x = torch.randn(3, 24)
    assert (quantized(plain, spec)(x) - plain(x)).norm() < 0.05 * plain(x).norm()
