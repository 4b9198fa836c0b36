"""Gradients of the rounded layers are those of the decoded layer."""

import pytest
import torch
import torch.nn.functional as F

from dqtk.kernels import conv_int8, from_matrix, linear_fp8, linear_int8, to_matrix
from dqtk.methods.rtn import rtn
from dqtk.numerics.packing import dequantize
from dqtk.spec import Float, Int, PerChannel, TensorSpec, TwoLevel

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=8))
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    y.backward(seeded(*y.shape, seed=9).to(y.dtype))
    return [leaf.grad for leaf in leaves]


def call_linear(spec, packed):
    if spec is WFP8:
        return lambda x, bias: linear_fp8(x, packed.qweight, packed.scale, bias, None)
    return lambda x, bias: linear_int8(x, packed.qweight, packed.scale, packed.group_scale, bias, None, None, spec.bits)


@pytest.mark.parametrize("spec", [W8, W4, WFP8], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (24,), (0, 24)], ids=str)
def test_linear(spec, shape):
    packed = rtn(seeded(7, 24, seed=1), spec)
    weight = dequantize(packed, spec, 24)
    x, bias = seeded(*shape), seeded(7)
    mine, plain = gradients(call_linear(spec, packed), x, bias), gradients(lambda x, b: F.linear(x, weight, b), x, bias)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [W8, W4, WFP8], ids=str)
def test_gradients_have_the_dtypes_of_their_leaves(spec):
    packed = rtn(seeded(7, 24, seed=1), spec)
    x, bias = gradients(call_linear(spec, packed), seeded(3, 24).bfloat16(), seeded(7))
    assert (x.dtype, bias.dtype) == (torch.bfloat16, torch.float32)


CONVS = [
    (F.conv1d, (2, 8, 9), [3], [2], [1], [1]),
    (F.conv2d, (2, 8, 6, 7), [3, 2], [2, 1], [1, 0], [1, 2]),
    (F.conv3d, (1, 8, 4, 5, 4), [3, 1, 2], [1, 2, 1], [1, 0, 1], [1, 1, 2]),
]


@pytest.mark.parametrize("spec", [W8, W4], ids=str)
@pytest.mark.parametrize(("conv", "shape", "kernel", "stride", "padding", "dilation"), CONVS, ids=["1d", "2d", "3d"])
def test_convolution(spec, conv, shape, kernel, stride, padding, dilation):
    packed = rtn(to_matrix(seeded(5, shape[1], *kernel, seed=1)), spec)
    weight = from_matrix(dequantize(packed, spec, packed_inputs := shape[1] * torch.Size(kernel).numel()), kernel)
    assert weight.numel() == 5 * packed_inputs
    x, bias = seeded(*shape), seeded(5)

    def quantized(x, b):
        return conv_int8(
            x, packed.qweight, packed.scale, packed.group_scale, b, None, None, spec.bits, kernel, stride, padding, dilation
        )

    mine, plain = gradients(quantized, x, bias), gradients(lambda x, b: conv(x, weight, b, stride, padding, dilation), x, bias)
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_static_inputs_pass_gradients_beyond_their_range():
    packed = rtn(seeded(7, 24, seed=1), W8)
    scale, zero = torch.tensor([1e-3]), torch.tensor([0], dtype=torch.int32)
    (grad,) = gradients(lambda x: linear_int8(x, packed.qweight, packed.scale, None, None, scale, zero, 8), seeded(3, 24))
    torch.testing.assert_close(grad, seeded(3, 7, seed=9) @ dequantize(packed, W8, 24), rtol=1e-5, atol=1e-5)


def test_bias_alone_can_learn():
    packed = rtn(seeded(7, 24, seed=1), W8)
    bias = seeded(7).requires_grad_()
    linear_int8(seeded(3, 24), packed.qweight, packed.scale, None, bias, None, None, 8).sum().backward()
    assert torch.equal(bias.grad, torch.full((7,), 3.0))


def test_smoothed_inputs():
    packed, smooth = rtn(seeded(7, 24, seed=1), W8), seeded(24, seed=3).exp()
    weight = dequantize(packed, W8, 24) * smooth
    (grad,) = gradients(lambda x: linear_int8(x, packed.qweight, packed.scale, None, None, None, None, 8, smooth), seeded(3, 24))
    torch.testing.assert_close(grad, seeded(3, 7, seed=9) @ weight, rtol=1e-5, atol=1e-5)
