"""The convolution op: kernel equals reference bit for bit, reference equals torch's convolution of decoded tensors in float64."""

import pytest
import torch
import torch.nn.functional as F

from dqtk.kernels import conv_int8, conv_int8_reference, from_matrix, to_matrix
from dqtk.kernels.conv import output_size
from dqtk.methods.rtn import rtn
from dqtk.numerics.packing import dequantize
from dqtk.spec import Int, PerChannel, TensorSpec, TwoLevel

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# input [B, C, *S], N, kernel, stride, padding, dilation
CASES = [
    ((2, 8, 9), 5, [3], [1], [1], [1]),
    ((1, 3, 17), 4, [4], [3], [2], [2]),
    ((2, 8, 6, 7), 5, [3, 3], [1, 1], [1, 1], [1, 1]),
    ((1, 8, 6, 7), 5, [1, 1], [1, 1], [0, 0], [1, 1]),
    ((3, 5, 9, 8), 1, [3, 2], [2, 3], [2, 0], [1, 2]),
    ((2, 1, 5, 5), 3, [5, 5], [1, 1], [0, 0], [1, 1]),
    ((0, 8, 6, 7), 5, [3, 3], [1, 1], [1, 1], [1, 1]),
    ((1, 8, 3, 5, 4), 6, [3, 3, 3], [1, 2, 2], [1, 1, 1], [1, 1, 1]),
    ((2, 4, 5, 4, 4), 3, [2, 1, 2], [1, 1, 1], [0, 0, 1], [2, 1, 1]),
]
INPUTS = ["dynamic", "static", "static-asymmetric"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(case, bits):
    shape, n, kernel = case[:3]
    granularity = TwoLevel(size=8) if bits <= 7 and shape[1] % 8 == 0 else PerChannel()
    spec = TensorSpec(format=Int(bits=bits), granularity=granularity)
    return spec, rtn(to_matrix(seeded(n, shape[1], *kernel, seed=1)), spec), seeded(n, seed=2)


def input_parameters(mode):
    if mode == "dynamic":
        return None, None
    return torch.tensor([0.021]), torch.tensor([-37 if mode == "static-asymmetric" else 0], dtype=torch.int32)


def arguments(x, case, packed, bits, bias, mode):
    return x, packed.qweight, packed.scale, packed.group_scale, bias, *input_parameters(mode), bits, *case[2:]


def rounded(x, mode):
    """The input as the op must see it, float64: one scale per sample, or the static one."""
    if mode == "dynamic":
        scale = x.abs().flatten(1).amax(1).view(-1, *[1] * (x.ndim - 1)) / 127
        return (x / scale).round().double() * scale.double()
    scale, zero = input_parameters(mode)
    return (((x / scale).round() + zero).clamp(-128, 127) - zero).double() * scale.double()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_reference(case, bits, mode):
    _, packed, bias = stored(case, bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call = arguments(seeded(*case[0]).to(dtype), case, packed, bits, bias.to(dtype), mode)
        y = conv_int8(*call)
        assert y.dtype == dtype
        assert y.shape == (case[0][0], case[1], *output_size(case[0][2:], *case[2:]))
        assert torch.equal(y, conv_int8_reference(*call))


@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_reference_equals_float64(case, mode, bias):
    """Padding is the number 0 in torch, so it must hold the zero point in codes: the asymmetric cases check it."""
    spec, packed, values = stored(case, 4)
    x = seeded(*case[0])
    shape, _, kernel, stride, padding, dilation = case
    weight = from_matrix(dequantize(packed, spec, to_matrix(seeded(1, shape[1], *kernel)).shape[1]), kernel).double()
    values = values if bias else None
    expected = CONV[len(kernel)](rounded(x, mode), weight, None if values is None else values.double(), stride, padding, dilation)
    y = conv_int8_reference(*arguments(x, case, packed, 4, values, mode))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_is_zero_whatever_the_zero_point():
    """An input of zeros gives the bias everywhere, the border included."""
    case = CASES[2]
    _, packed, bias = stored(case, 8)
    y = conv_int8(*arguments(torch.zeros(case[0]), case, packed, 8, bias, "static-asymmetric"))
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y), rtol=1e-6, atol=1e-6)


def test_samples_do_not_influence_each_other():
    case = CASES[2]
    _, packed, bias = stored(case, 8)
    x = seeded(*case[0])
    alone = conv_int8(*arguments(x[1:], case, packed, 8, bias, "dynamic"))
    x[0] *= 1e4
    assert torch.equal(conv_int8(*arguments(x, case, packed, 8, bias, "dynamic"))[1:], alone)


@pytest.mark.parametrize("mode", INPUTS)
def test_memory_format_does_not_matter(mode):
    case = CASES[2]
    _, packed, bias = stored(case, 8)
    x = seeded(*case[0])
    dense = conv_int8(*arguments(x, case, packed, 8, bias, mode))
    for same in (x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        assert torch.equal(conv_int8(*arguments(same, case, packed, 8, bias, mode)), dense)
    assert dense.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel", [[3], [3, 2], [2, 3, 4]], ids=str)
def test_matrix_form_has_the_channel_innermost(kernel):
    w = seeded(4, 5, *kernel)
    matrix = to_matrix(w)
    assert torch.equal(from_matrix(matrix, kernel), w)
    assert torch.equal(matrix[:, :5], w.flatten(2)[:, :, 0])
    assert torch.equal(matrix[:, -5:], w.flatten(2)[:, :, -1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # opcheck's own doing
@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids=str)
def test_opcheck(case, mode):
    _, packed, bias = stored(case, 4)
    torch.library.opcheck(conv_int8, arguments(seeded(*case[0]).requires_grad_(), case, packed, 4, bias.requires_grad_(), mode))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_are_known_without_data(case):
    _, packed, bias = stored(case, 8)
    call = arguments(seeded(*case[0]).bfloat16(), case, packed, 8, bias, "dynamic")
    real, meta = conv_int8(*call), conv_int8(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in call))
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", INPUTS)
def test_inputs_do_not_hide_nan(wrong, mode):
    """The whole sample shows it; the others do not."""
    case = CASES[0]
    _, packed, bias = stored(case, 8)
    x = seeded(2, *case[0][1:])
    x.view(2, -1)[1, 3] = wrong
    y = conv_int8(*arguments(x, case, packed, 8, bias, mode))
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[0]).all()
