"""dqtk:: op of integer convolutions, 1 to 3 spatial dimensions, no groups.

The stored weight is a matrix [N, K] with K = (taps, C_in), channel innermost; the kernel gathers channels-last windows of int8
codes and calls the integer matmul. Convolution inputs have no tokens, so dynamic rounding is per sample. Padding holds the zero
point, which stands for the number 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dqtk import native
from dqtk.numerics.packing import integer_weight

from .int8 import epilogue, matmul_int_mm, matmul_padded, matmul_reference, quantize_rows
from .straight_through import conv_input_gradient, sum_to_bias


def to_matrix(weight: Tensor) -> Tensor:
    """[N, C, *kernel] -> [N, taps * C], channel innermost."""
    return weight.movedim(1, -1).reshape(weight.shape[0], -1)


def from_matrix(matrix: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Inverse of ``to_matrix``."""
    return matrix.view(matrix.shape[0], *kernel_size, -1).movedim(-1, 1)


def output_size(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """Spatial size of the result."""
    zipped = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(length + 2 * p - d * (k - 1) - 1) // s + 1 for length, k, s, p, d in zipped]


def gather_windows(codes: Tensor, kernel, stride, padding, dilation, fill: int) -> Tensor:
    """Windows of a code tensor [B, C, *S] as rows [B * prod(S_out), taps * C]."""
    dims = len(kernel)
    last = codes.movedim(1, -1)
    pads = [0, 0] + [p for p in reversed(padding) for _ in range(2)]
    last = torch.nn.functional.pad(last, pads, value=fill) if any(padding) else last
    for i in range(dims):
        reach = dilation[i] * (kernel[i] - 1) + 1
        last = last.unfold(1 + i, reach, stride[i])[..., :: dilation[i]]
    # [B, *S_out, C, *kernel] -> [B, *S_out, *kernel, C]
    windows = last.movedim(1 + dims, -1)
    return windows.reshape(math.prod(windows.shape[: 1 + dims]), -1)


def _conv_int8(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation, matmul):
    batch, channels = x.shape[:2]
    sizes = output_size(x.shape[2:], kernel, stride, padding, dilation)
    n, k = qweight.shape[0], math.prod(kernel) * channels
    if batch == 0:
        return x.new_empty((0, *sizes, n)).movedim(-1, 1)
    weight = integer_weight(qweight, group_scale, bits, k)
    codes, x_scale = quantize_rows(x.reshape(batch, -1), input_scale, input_zero)
    fill = 0 if input_zero is None else int(input_zero)
    rows = gather_windows(codes.view(x.shape), kernel, stride, padding, dilation, fill)
    if x_scale.shape[0] > 1:
        x_scale = x_scale.repeat_interleave(math.prod(sizes), dim=0)
    y = epilogue(matmul(rows, weight), x_scale, input_zero, weight, scale, bias)
    return y.to(x.dtype).view(batch, *sizes, n).movedim(-1, 1)


@torch.library.custom_op("dqtk::conv_int8", mutates_args=())
def conv_int8(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bits: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolution with int8 inputs and an exact integer matmul. Arguments as ``linear_int8``; ``x`` is [B, C, *S].

    Returns [B, N, *S_out] in the dtype of ``x``, channels last in memory.
    """
    return _conv_int8(
        x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation, matmul_reference
    )


@conv_int8.register_kernel("cpu")
def _(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation):
    library = native.load()
    if library is not None and x.dtype in native.TYPES:
        sizes = output_size(x.shape[2:], kernel, stride, padding, dilation)
        layer = native.IntegerLayer(qweight, scale, group_scale, bias, input_scale, input_zero, bits)
        y = native.conv_int8(library, x, layer, kernel, stride, padding, dilation, sizes)
        return y.view(x.shape[0], *sizes, qweight.shape[0]).movedim(-1, 1)
    return _conv_int8(
        x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation, matmul_int_mm
    )


@conv_int8.register_kernel("cuda")
def _(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation):
    return _conv_int8(
        x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation, matmul_padded
    )


@conv_int8.register_fake
def _(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation):
    sizes = output_size(x.shape[2:], kernel, stride, padding, dilation)
    return x.new_empty((x.shape[0], *sizes, qweight.shape[0])).movedim(-1, 1)


def _save_conv_int8(ctx, inputs, output) -> None:
    x, qweight, scale, group_scale, bias, _, _, ctx.bits, ctx.kernel, ctx.stride, ctx.padding, ctx.dilation = inputs
    ctx.save_for_backward(qweight, scale, group_scale)
    ctx.shape, ctx.dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype


def _backward_conv_int8(ctx, grad):
    qweight, scale, group_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        matrix = integer_weight(qweight, group_scale, ctx.bits, math.prod(ctx.kernel) * ctx.shape[1]).float() * scale
        weight = from_matrix(matrix, ctx.kernel)
        grad_x = conv_input_gradient(grad, weight, ctx.shape, ctx.stride, ctx.padding, ctx.dilation).to(ctx.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = sum_to_bias(grad, 1).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, *[None] * 7


conv_int8.register_autograd(_backward_conv_int8, setup_context=_save_conv_int8)


def conv_int8_reference(
    x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation
) -> Tensor:
    """The op's meaning on any device, for tests."""
    return _conv_int8(
        x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, kernel, stride, padding, dilation, matmul_reference
    )
