"""Integer linear layers in Triton: one kernel rounds rows, another multiplies them and ends with scales, bias and activation.

Codes and sums are exact, and every float operation is the reference's, in its order and rounded as there (division to nearest, no
fused multiply-add): without an activation, results equal the reference bit for bit. GELU's erf and exp are the device's.

4-bit weights stay packed until a tile of them is in registers. Byte j of a row holds the codes of two inputs
(``numerics.packing``):

    low half:  input 8 (j / 4) + j % 4          high half:  the same + 4

The order of a sum does not matter, so the rounding kernel writes the inputs of all low halves first and those of all high halves
behind them, and a tile of bytes makes two products without a shuffle. Codes of other widths are expanded to int8 by torch first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqtk.numerics.packing import integer_weight

from .device import EXACT, dense, nearest, per_group, rounded_to, sizes_of, tile_of
from .tiles import Tile

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}
_ROUNDED_AT_ONCE = 1024


@triton.jit
def _load_smoothed(x, smooth, at, inside, SMOOTH: tl.constexpr):
    values = tl.load(x + at, mask=inside, other=0.0)
    if SMOOTH:
        factors = tl.load(smooth + at, mask=inside, other=0.0).to(tl.float32)
        values = rounded_to(values.to(tl.float32) * factors, x.dtype.element_ty)
    return values.to(tl.float32)


@triton.jit
def _round_rows(
    x, smooth, input_scale, input_zero, codes, scales, K, padded, stride,
    SMOOTH: tl.constexpr, STATIC: tl.constexpr, ZERO: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes [T, padded] and scales [T] of x [T, K], one program per row."""
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * padded
    top = tl.zeros((BLOCK,), dtype=tl.float32)
    wrong = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = _load_smoothed(x, smooth, at, at < K, SMOOTH)
        wrong = wrong | (v != v).to(tl.int32)
        top = tl.maximum(top, tl.abs(v))
    largest = tl.where(tl.max(wrong, axis=0) > 0, float("nan"), tl.max(top, axis=0))
    if STATIC:
        scale = tl.load(input_scale)
        kept = tl.where(largest < float("inf"), scale, largest)  # what is not finite stays visible
    else:
        scale = tl.div_rn(largest, 127.0)
        scale = tl.where(scale <= 1e-30, 1.0, scale)
        kept = scale
    tl.store(scales + row, kept)
    for start in range(0, padded, BLOCK):
        at = start + tl.arange(0, BLOCK)
        v = tl.div_rn(_load_smoothed(x, smooth, at, at < K, SMOOTH), tl.zeros((BLOCK,), dtype=tl.float32) + scale)
        v = tl.where(v == v, v, 0.0)
        v = nearest(tl.minimum(tl.maximum(v, -1024.0), 1024.0))
        if ZERO:
            v += tl.load(input_zero).to(tl.float32)
        v = tl.minimum(tl.maximum(v, -128.0), 127.0)
        v = tl.where(at < K, v, 0.0).to(tl.int8)
        if HALVES:
            to = (at % 8) // 4 * (padded // 2) + at // 8 * 4 + at % 4
            tl.store(codes + to, v, mask=at < padded)
        else:
            tl.store(codes + at, v, mask=at < padded)


@triton.jit
def _gelu(y, TANH: tl.constexpr):
    if TANH:
        active = y / (1.0 + tl.exp(tl.minimum(-1.5957691216057308 * (y + 0.044715 * y * y * y), 80.0)))
    else:
        active = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return active


@triton.jit
def _finish(acc, y, t, n, T, N, x_scale, w_scale, scale_step, bias, active_from, BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Scales, bias and activation of a tile of sums, and its results in memory."""
    factors = tl.load(w_scale + n * scale_step, mask=n < N, other=0.0)
    v = acc.to(tl.float32) * tl.load(x_scale + t, mask=t < T, other=0.0)[:, None] * factors[None, :]
    if BIAS:
        v += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    v = rounded_to(v, y.dtype.element_ty)
    if ACTIVATION > 0:
        active = rounded_to(_gelu(v.to(tl.float32), ACTIVATION == 2), y.dtype.element_ty)
        v = tl.where((n >= active_from)[None, :], active, v)
    to = t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + to, v, mask=(t < T)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["scale_step", "active_from", "T"])
def _multiply(
    codes, weight, y, x_scale, w_scale, scale_step, bias, input_zero, active_from, T, N, K,
    BIAS: tl.constexpr, ZERO: tl.constexpr, ACTIVATION: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y [T, N] of codes int8 [T, K] and weight int8 [N, K]."""
    down, across = tile_of(T, N, TILE_T, TILE_N, BAND)
    t, n, j = down * TILE_T + tl.arange(0, TILE_T), across * TILE_N + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    a = codes + t.to(tl.int64)[:, None] * K + j[None, :]
    b = weight + n.to(tl.int64)[None, :] * K + j[:, None]
    acc = tl.zeros((TILE_T, TILE_N), dtype=tl.int32)
    sums = tl.zeros((TILE_N,), dtype=tl.int32)
    for start in range(0, K, TILE_K):
        rest = j < K - start
        a_TK = tl.load(a + start, mask=(t < T)[:, None] & rest[None, :], other=0)
        b_KN = tl.load(b + start, mask=rest[:, None] & (n < N)[None, :], other=0)
        acc = tl.dot(a_TK, b_KN, acc, out_dtype=tl.int32)
        if ZERO:
            sums += tl.sum(b_KN.to(tl.int32), axis=0)
    if ZERO:
        acc -= (tl.load(input_zero) * sums)[None, :]
    _finish(acc, y, t, n, T, N, x_scale, w_scale, scale_step, bias, active_from, BIAS, ACTIVATION)


@triton.jit
def _in_groups(w, group_scale, start, TILE_K: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr, n, N, groups):
    """4-bit codes [TILE_K, TILE_N] times the scales of their groups of ``GROUP`` bytes (0: there are none)."""
    if GROUP > 0:
        w *= per_group(group_scale, start, n, N, groups, groups, GROUP, TILE_K, TILE_N).to(tl.int8)
    return w


@triton.jit(do_not_specialize=["scale_step", "active_from", "T"])
def _multiply_4bit(
    codes, weight, group_scale, groups, y, x_scale, w_scale, scale_step, bias, input_zero, active_from, T, N, K, width,
    BIAS: tl.constexpr, ZERO: tl.constexpr, ACTIVATION: tl.constexpr, GROUP: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y [T, N] of codes int8 [T, 2 width], low halves first, and weight uint8 [N, width]; tiles are counted in bytes."""
    down, across = tile_of(T, N, TILE_T, TILE_N, BAND)
    t, n, j = down * TILE_T + tl.arange(0, TILE_T), across * TILE_N + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    a = codes + t.to(tl.int64)[:, None] * (2 * width) + j[None, :]
    b = weight + n.to(tl.int64)[None, :] * width + j[:, None]
    acc = tl.zeros((TILE_T, TILE_N), dtype=tl.int32)
    sums = tl.zeros((TILE_N,), dtype=tl.int32)
    for start in range(0, width, TILE_K):
        rest = j < width - start
        rows = (t < T)[:, None] & rest[None, :]
        pairs = tl.load(b + start, mask=rest[:, None] & (n < N)[None, :], other=0)
        low = _in_groups((pairs & 15).to(tl.int8) - 8, group_scale, start, TILE_K, TILE_N, GROUP, n, N, groups)
        high = _in_groups((pairs >> 4).to(tl.int8) - 8, group_scale, start, TILE_K, TILE_N, GROUP, n, N, groups)
        acc = tl.dot(tl.load(a + start, mask=rows, other=0), low, acc, out_dtype=tl.int32)
        acc = tl.dot(tl.load(a + start + width, mask=rows, other=0), high, acc, out_dtype=tl.int32)
        if ZERO:
            k = (start + j) // 4 * 8 + (start + j) % 4
            sums += tl.sum(tl.where((k < K)[:, None], low.to(tl.int32), 0), axis=0)
            sums += tl.sum(tl.where((k + 4 < K)[:, None], high.to(tl.int32), 0), axis=0)
    if ZERO:
        acc -= (tl.load(input_zero) * sums)[None, :]
    _finish(acc, y, t, n, T, N, x_scale, w_scale, scale_step, bias, active_from, BIAS, ACTIVATION)


def linear_int8(
    x_TK: Tensor,
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
    *,
    tile: Tile,
    rounded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[T, N] in the dtype of ``x_TK`` [T, K]: float32, bfloat16 or float16. Other arguments as dqtk::linear_int8 has them.

    ``tile``: one of ``tiles.INT4`` where the weight ``stays_packed``, else of ``tiles.INT8``. ``rounded``: the input as
    ``round_rows`` gives it, where that was done before.
    """
    (t, k), n = x_TK.shape, qweight.shape[0]
    y = x_TK.new_empty((t, n))
    if 0 in (t, n):
        return y
    scale, group_scale, bias, smooth = dense(scale, group_scale, bias, smooth)
    halves = stays_packed(qweight, group_scale, bits, k)
    with torch.cuda.device_of(x_TK):
        codes, x_scale = rounded or round_rows(x_TK, input_scale, input_zero, smooth, halves)
        ends = (y, x_scale, scale, int(scale.numel() > 1), bias, input_zero, active_from, t, n, k)
        constants = {
            "BIAS": bias is not None,
            "ZERO": input_zero is not None,
            "ACTIVATION": ACTIVATIONS[activation],
            **sizes_of(tile),
            **EXACT,
        }
        grid = (triton.cdiv(t, tile.rows) * triton.cdiv(n, tile.outputs),)
        if halves:
            groups = 1 if group_scale is None else group_scale.shape[1]
            group = 0 if group_scale is None else k // groups // 2
            packed = qweight.contiguous()
            _multiply_4bit[grid](codes, packed, group_scale, groups, *ends, packed.shape[1], GROUP=group, **constants)
        else:
            _multiply[grid](codes, integer_weight(qweight, group_scale, bits, k).contiguous(), *ends, **constants)
    return y


def stays_packed(qweight: Tensor, group_scale: Tensor | None, bits: int, k: int) -> bool:
    """Whether the kernels read a weight as it is stored in 4 bits: without groups, or in groups of a power of two from 8 on."""
    if qweight.dtype != torch.uint8 or bits != 4:
        return False
    size = 8 if group_scale is None else k // group_scale.shape[1]
    return size >= 8 and size & (size - 1) == 0


def round_rows(
    x_TK: Tensor, input_scale: Tensor | None, input_zero: Tensor | None, smooth: Tensor | None, halves: bool
) -> tuple[Tensor, Tensor]:
    """int8 codes [T, K] and float32 scales [T], as ``kernels.int8.quantize_rows`` gives them, of inputs times ``smooth``.

    ``halves``: codes lie as 4-bit weights need them, and their rows are filled up with zeros to a multiple of 8.
    """
    t, k = x_TK.shape
    x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    padded = k + (-k % 8 if halves else 0)
    codes = torch.empty((t, padded), dtype=torch.int8, device=x.device)
    scales = torch.empty(t, dtype=torch.float32, device=x.device)
    _round_rows[(t,)](
        x,
        smooth,
        input_scale,
        input_zero,
        codes,
        scales,
        k,
        padded,
        x.stride(0),
        SMOOTH=smooth is not None,
        STATIC=input_scale is not None,
        ZERO=input_zero is not None,
        HALVES=halves,
        BLOCK=min(_ROUNDED_AT_ONCE, triton.next_power_of_2(max(padded, 1))),
        num_warps=4,
        **EXACT,
    )
    return codes, scales
