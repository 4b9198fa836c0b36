"""dqtk:: ops of linear layers. The body of each op is the reference and defines its meaning; kernels are registered beside it.

``bits`` is the width of the stored weight codes (``numerics.packing``); group scales are those of ``spec.TwoLevel``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import gpu, native
from dqtk.numerics.packing import integer_weight

from .int8 import epilogue, matmul_int_mm, matmul_padded, matmul_reference, quantize_rows
from .straight_through import input_gradient, sum_to_bias

_OUTPUTS_AT_ONCE = 1 << 20  # measured on Zen 4: 4096 tokens of 1152 by 1152 take half the time of one pass over all


def _linear_int8(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, matmul) -> Tensor:
    return _linears_int8(x, [native.IntegerLayer(qweight, scale, group_scale, bias, input_scale, input_zero, bits)], matmul)[0]


def _linears_int8(x, layers, matmul) -> list[Tensor]:
    """Of layers whose input is rounded alike: once."""
    k, input_zero = x.shape[-1], layers[0].input_zero
    rows = x.reshape(-1, k)
    if rows.shape[0] == 0:
        return [x.new_empty((*x.shape[:-1], layer.qweight.shape[0])) for layer in layers]
    codes, x_scale = quantize_rows(rows, layers[0].input_scale, input_zero)
    ys = []
    for layer in layers:
        weight = integer_weight(layer.qweight, layer.group_scale, layer.bits, k)
        y = epilogue(matmul(codes, weight), x_scale, input_zero, weight, layer.scale, layer.bias)
        ys.append(y.to(x.dtype).view(*x.shape[:-1], weight.shape[0]))
    return ys


@torch.library.custom_op("dqtk::linear_int8", mutates_args=())
def linear_int8(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bits: int,
    smooth: Tensor | None = None,
    activation: str = "none",
    active_from: int = 0,
) -> Tensor:
    """y = dequantize(round(x * smooth) @ W^T) + bias with int8 inputs and an exact integer matmul.

    Args:
        x: float [..., K]. Each row is rounded with its own scale when ``input_scale`` is None (dynamic per token).
        qweight: int8 [N, K], or packed uint8 [N, packed_width(bits, K)].
        scale: float32 [N, 1] or [1, 1].
        group_scale: uint8 [N, K / size] or None.
        bias: float [N] or None.
        input_scale, input_zero: float32 [1] and int32 [1] or None; static per-tensor rounding, x ~ scale * (code - zero).
        bits: width of the stored codes.
        smooth: float [K] or None; multiplied with the input in float32, which is then rounded to its own dtype again.
        activation: one of ``ACTIVATIONS``, of the outputs from ``active_from`` on, after they were rounded to their dtype.
    Returns:
        [..., N] in the dtype of ``x``.
    """
    x = smoothed(x, smooth)
    y = _linear_int8(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, matmul_reference)
    return activated(y, activation, active_from)


def smoothed(x: Tensor, smooth: Tensor | None) -> Tensor:
    """``x`` with its channels multiplied, in its dtype."""
    return x if smooth is None else (x.float() * smooth.float()).to(x.dtype)


ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def activated(y: Tensor, activation: str, active_from: int = 0) -> Tensor:
    """``y`` [..., N] with the activation applied to its outputs from ``active_from`` on."""
    if activation == "none":
        return y
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[activation]
    if active_from == 0:
        return F.gelu(y, approximate=approximate)
    return torch.cat([y[..., :active_from], F.gelu(y[..., active_from:], approximate=approximate)], dim=-1)


def linears_int8_through_torch(x, layers) -> list[Tensor]:
    """Of layers whose input is rounded alike, on a CPU without native kernels: some rows at a time, so that their float32 results
    stay in memory that is warm."""
    k, input_zero = x.shape[-1], layers[0].input_zero
    weights, rows = [integer_weight(layer.qweight, layer.group_scale, layer.bits, k) for layer in layers], x.reshape(-1, k)
    ys = [x.new_empty((rows.shape[0], weight.shape[0])) for weight in weights]
    length = max(64, _OUTPUTS_AT_ONCE // max(*[weight.shape[0] for weight in weights], 1) // 64 * 64)
    for first in range(0, rows.shape[0], length):
        codes, x_scale = quantize_rows(rows[first : first + length], layers[0].input_scale, input_zero)
        for layer, weight, y in zip(layers, weights, ys, strict=True):
            done = epilogue(matmul_int_mm(codes, weight), x_scale, input_zero, weight, layer.scale, layer.bias)
            y[first : first + length] = done
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


@linear_int8.register_kernel("cpu")
def _(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, smooth=None, activation="none", active_from=0):
    library = native.load()
    layer = native.IntegerLayer(qweight, scale, group_scale, bias, input_scale, input_zero, bits)
    if library is None or x.dtype not in native.TYPES:
        return activated(linears_int8_through_torch(smoothed(x, smooth), [layer])[0], activation, active_from)
    rows = x.reshape(-1, x.shape[-1])
    (y,) = native.linear_int8(library, rows, [layer], smooth, activation, active_from)
    return y.view(*x.shape[:-1], qweight.shape[0])


@linear_int8.register_kernel("cuda")
def linear_int8_on_cuda(
    x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, smooth=None, activation="none", active_from=0
) -> Tensor:
    """The op on a CUDA device: Triton kernels, else torch's; ``gpu.describe`` says which and why."""
    layer = qweight, scale, group_scale, bias, input_scale, input_zero, bits
    if x.dtype in gpu.TYPES and gpu.serves(x.device):
        y = gpu.linear_int8(x.reshape(-1, x.shape[-1]), *layer, smooth, activation, active_from)
        if y is not None:
            return y.view(*x.shape[:-1], qweight.shape[0])
    return activated(_linear_int8(smoothed(x, smooth), *layer, matmul_padded), activation, active_from)


@linear_int8.register_fake
def _(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, smooth=None, activation="none", active_from=0):
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _save_linear_int8(ctx, inputs, output) -> None:
    x, qweight, scale, group_scale, bias, _, _, bits, smooth, activation, _ = inputs
    assert activation == "none", "a fused activation has no gradient: QuantLinear applies it by itself where something trains"
    ctx.save_for_backward(qweight, scale, group_scale, smooth)
    ctx.bits, ctx.k, ctx.dtype, ctx.bias_dtype = bits, x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward_linear_int8(ctx, grad):
    qweight, scale, group_scale, smooth = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = integer_weight(qweight, group_scale, ctx.bits, ctx.k)
        grad_x = smoothed(input_gradient(grad, weight, scale), smooth).to(ctx.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = sum_to_bias(grad, -1).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, *[None] * 6


linear_int8.register_autograd(_backward_linear_int8, setup_context=_save_linear_int8)


@torch.library.custom_op("dqtk::linears_int8", mutates_args=())
def linears_int8(
    x: Tensor,
    qweights: Sequence[Tensor],
    scales: Sequence[Tensor],
    group_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    bits: int,
    smooth: Tensor | None = None,
) -> list[Tensor]:
    """``linear_int8`` of several layers that read one input, which is rounded once.

    Args:
        x: float [..., K].
        qweights, scales, group_scales, biases: of each layer, as ``linear_int8`` has them.
        input_scale, input_zero, bits, smooth: of all of them.
    Returns:
        For each layer [..., N] in the dtype of ``x``: bit for bit what ``linear_int8`` returns.
    """
    layers = _layers_of(qweights, scales, group_scales, biases, input_scale, input_zero, bits)
    return _linears_int8(smoothed(x, smooth), layers, matmul_reference)


def _layers_of(qweights, scales, group_scales, biases, input_scale, input_zero, bits) -> list[native.IntegerLayer]:
    stored = zip(qweights, scales, group_scales, biases, strict=True)
    return [native.IntegerLayer(*layer, input_scale, input_zero, bits) for layer in stored]


@linears_int8.register_kernel("cpu")
def _(x, qweights, scales, group_scales, biases, input_scale, input_zero, bits, smooth=None):
    library = native.load()
    layers = _layers_of(qweights, scales, group_scales, biases, input_scale, input_zero, bits)
    if library is None or x.dtype not in native.TYPES:
        return linears_int8_through_torch(smoothed(x, smooth), layers)
    ys = native.linear_int8(library, x.reshape(-1, x.shape[-1]), layers, smooth)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


@linears_int8.register_kernel("cuda")
def linears_int8_on_cuda(x, qweights, scales, group_scales, biases, input_scale, input_zero, bits, smooth=None) -> list[Tensor]:
    """The op on a CUDA device: through Triton if its table says so for every layer, else through torch."""
    layers = _layers_of(qweights, scales, group_scales, biases, input_scale, input_zero, bits)
    if x.dtype in gpu.TYPES and gpu.serves(x.device):
        ys = gpu.linears_int8(x.reshape(-1, x.shape[-1]), layers, smooth)
        if ys is not None:
            return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    return _linears_int8(smoothed(x, smooth), layers, matmul_padded)


@linears_int8.register_fake
def _(x, qweights, scales, group_scales, biases, input_scale, input_zero, bits, smooth=None):
    return [x.new_empty((*x.shape[:-1], qweight.shape[0])) for qweight in qweights]


def linear_int8_reference(
    x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, smooth=None, activation="none", active_from=0
) -> Tensor:
    """The op's meaning on any device, for tests."""
    x = smoothed(x, smooth)
    y = _linear_int8(x, qweight, scale, group_scale, bias, input_scale, input_zero, bits, matmul_reference)
    return activated(y, activation, active_from)


@torch.library.custom_op("dqtk::linear_fp8", mutates_args=())
def linear_fp8(x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None) -> Tensor:
    """Linear with FP8 E4M3 weight and input codes; products summed in float32.

    Args:
        x: float [..., K]; rounded per row to E4M3 with scale absmax / 448, or with the static ``input_scale`` float32 [1].
        qweight: float8_e4m3fn [N, K].
        scale: float32 [N, 1] or [1, 1].
        bias: float [N] or None.
    Returns:
        [..., N] in the dtype of ``x``.
    """
    return _linear_fp8(x, qweight, scale, bias, input_scale, _matmul_emulated)


def _linear_fp8(x, qweight, scale, bias, input_scale, matmul) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    if input_scale is None:
        x_scale = rows.abs().amax(dim=1, keepdim=True) / 448 if rows.numel() else rows.new_ones((rows.shape[0], 1))
        x_scale = torch.where(x_scale <= 1e-30, torch.ones_like(x_scale), x_scale)
    else:
        x_scale = input_scale.view(1, 1)
    codes = (rows / x_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    y = matmul(codes, qweight) * x_scale * scale.view(1, -1)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], qweight.shape[0])


def _matmul_emulated(a_TK: Tensor, b_NK: Tensor) -> Tensor:
    return a_TK.float() @ b_NK.float().T


def matmul_scaled(a_TK: Tensor, b_NK: Tensor) -> Tensor:
    """float32 [T, N] = a @ b^T of E4M3 numbers through ``torch._scaled_mm``, which wants multiples of 16; zeros add nothing.

    It is given no scales: they differ per row and column, and it takes such only for some dtypes and devices.
    """
    (t, k), n = a_TK.shape, b_NK.shape[0]
    if 0 in (t, n, k):
        return torch.zeros((t, n), device=a_TK.device)
    a, b = (_filled_up(codes, (0, -k % 16, 0, more)) for codes, more in ((a_TK, -t % 16), (b_NK, -n % 16)))
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.float32)[:t, :n]


def _filled_up(codes: Tensor, pads: tuple[int, ...]) -> Tensor:
    """A float8 matrix with zeros on the right and below; padding is done on its bytes, 0 of which is the number 0."""
    return F.pad(codes.view(torch.uint8), pads).view(codes.dtype) if any(pads) else codes.contiguous()


@linear_fp8.register_kernel("cuda")
def _(x, qweight, scale, bias, input_scale):
    if gpu.no_scaled_matmul() is None:
        return _linear_fp8(x, qweight, scale, bias, input_scale, matmul_scaled)
    return _linear_fp8(x, qweight, scale, bias, input_scale, _matmul_emulated)


@linear_fp8.register_fake
def _(x, qweight, scale, bias, input_scale):
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _save_linear_fp8(ctx, inputs, output) -> None:
    x, qweight, scale, bias, _ = inputs
    ctx.save_for_backward(qweight, scale)
    ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward_linear_fp8(ctx, grad):
    qweight, scale = ctx.saved_tensors
    grad_x = input_gradient(grad, qweight, scale).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = sum_to_bias(grad, -1).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None


linear_fp8.register_autograd(_backward_linear_fp8, setup_context=_save_linear_fp8)
