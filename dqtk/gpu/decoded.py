"""Linear layers whose weights alone are rounded, in Triton: a tile of codes is decoded in registers and multiplied at once.

Decoded numbers are those of ``packing.dequantize`` rounded to the compute dtype, bit for bit; sums are float32, in another order
than torch's. Codes have 8 bits, or 4 as ``integer.py`` reads them: a tile of bytes is two products, of the inputs of its low halves
and of its high halves. One table of levels at most. Torch decodes everything else, and float32, whose precision in matmuls is the
user's choice there.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import EXACT, dense, per_group, rounded_to, sizes_of, sum_of_products, tile_of
from .tiles import Tile


class Stored(NamedTuple):
    """What dqtk::linear_decoded takes behind input and bias, in its order, the codes in front; ``Decoding`` says what each is."""

    qweight: Tensor
    steps: Tensor
    zero: Tensor | None
    group_scale: Tensor | None
    selector: Tensor | None
    levels: Tensor | None
    bits: int
    signed: bool


@triton.jit
def _decoded(
    code, levels, steps, zeros, group_scale, start, n, N, row_step, groups, TYPE: tl.constexpr,
    SIGNED: tl.constexpr, LEVELS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, GROUP: tl.constexpr,
    STEP_GROUP: tl.constexpr, TILE_K: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """Numbers [TILE_K, TILE_N] of 4-bit codes, or of 8-bit ones."""
    if LEVELS:
        value = tl.load(levels + code.to(tl.int32))
    elif SCALED:
        value = code.to(tl.int8) - 8
        value = (value * per_group(group_scale, start, n, N, groups, groups, GROUP, TILE_K, TILE_N).to(tl.int8)).to(tl.float32)
    elif SIGNED:
        value = (code.to(tl.int8) - 8).to(tl.float32)
    else:
        value = code.to(tl.float32)
    if ZERO:
        value -= per_group(zeros, start, n, N, row_step, groups, STEP_GROUP, TILE_K, TILE_N).to(tl.float32)
    value *= per_group(steps, start, n, N, row_step, groups, STEP_GROUP, TILE_K, TILE_N)
    return rounded_to(value, TYPE)


@triton.jit(do_not_specialize=["T"])
def _multiply_decoded(
    x, weight, levels, steps, zeros, group_scale, bias, y, T, N, K, width, stride, row_step, groups,
    BIAS: tl.constexpr, SIGNED: tl.constexpr, LEVELS: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr,
    GROUP: tl.constexpr, STEP_GROUP: tl.constexpr, HALVES: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """y [T, N] of x [T, K] and codes [N, width], two in a byte where there are ``HALVES``; tiles are counted in bytes."""
    down, across = tile_of(T, N, TILE_T, TILE_N, BAND)
    t, n, j = down * TILE_T + tl.arange(0, TILE_T), across * TILE_N + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    a = x + t.to(tl.int64)[:, None] * stride
    b = weight + n.to(tl.int64)[None, :] * width + j[:, None]
    acc = tl.zeros((TILE_T, TILE_N), dtype=tl.float32)
    for start in range(0, width, TILE_K):
        at = start + j
        codes = tl.load(b + start, mask=(at < width)[:, None] & (n < N)[None, :], other=0)
        if HALVES:
            k = at // 4 * 8 + at % 4
            low = _decoded(
                codes & 15, levels, steps, zeros, group_scale, start, n, N, row_step, groups, x.dtype.element_ty,
                SIGNED, LEVELS, ZERO, SCALED, GROUP, STEP_GROUP, TILE_K, TILE_N,
            )  # fmt: skip
            acc = sum_of_products(tl.load(a + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0), low, acc)
            high = _decoded(
                codes >> 4, levels, steps, zeros, group_scale, start, n, N, row_step, groups, x.dtype.element_ty,
                SIGNED, LEVELS, ZERO, SCALED, GROUP, STEP_GROUP, TILE_K, TILE_N,
            )  # fmt: skip
            k += 4
            acc = sum_of_products(tl.load(a + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0), high, acc)
        else:
            values = _decoded(
                codes, levels, steps, zeros, group_scale, start, n, N, row_step, groups, x.dtype.element_ty,
                False, LEVELS, ZERO, False, GROUP, STEP_GROUP, TILE_K, TILE_N,
            )  # fmt: skip
            acc = sum_of_products(tl.load(a + at[None, :], mask=(t < T)[:, None] & (at < K)[None, :], other=0.0), values, acc)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    to = t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + to, rounded_to(acc, y.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])


def takes(x: Tensor, stored: Stored) -> bool:
    """Whether the kernel multiplies with a weight as it is stored."""
    if x.dtype not in (torch.bfloat16, torch.float16) or stored.bits not in (4, 8) or stored.selector is not None:
        return False
    if stored.bits == 8 and stored.group_scale is not None:
        return False
    groups = (stored.steps if stored.group_scale is None else stored.group_scale).shape[1]
    size = x.shape[-1] // groups
    return groups == 1 or (size >= 8 and size & (size - 1) == 0)


def linear_decoded(x_TK: Tensor, bias: Tensor | None, stored: Stored, tile: Tile) -> Tensor:
    """[T, N] in the dtype of ``x_TK`` [T, K], for what ``takes`` says; ``bias`` [N] or None, rounded to that dtype first.

    ``tile``: one of ``tiles.DECODED``.
    """
    (t, k), n = x_TK.shape, stored.qweight.shape[0]
    y = x_TK.new_empty((t, n))
    if 0 in (t, n):
        return y
    x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    raw = stored.qweight if stored.levels is None else stored.qweight.view(torch.uint8)
    bias = None if bias is None else bias.to(x.dtype)
    weight, steps, zero, group_scale, levels, bias = dense(raw, stored.steps, stored.zero, stored.group_scale, stored.levels, bias)
    halves, groups = stored.bits == 4, (stored.steps if stored.group_scale is None else stored.group_scale).shape[1]
    group = 0 if groups == 1 else k // groups // (2 if halves else 1)
    with torch.cuda.device_of(x):
        _multiply_decoded[(triton.cdiv(t, tile.rows) * triton.cdiv(n, tile.outputs),)](
            x,
            weight,
            levels,
            steps,
            zero,
            group_scale,
            bias,
            y,
            t,
            n,
            k,
            weight.shape[1],
            x.stride(0),
            steps.shape[1] if steps.shape[0] > 1 else 0,
            groups,
            BIAS=bias is not None,
            SIGNED=stored.signed,
            LEVELS=stored.levels is not None,
            ZERO=stored.zero is not None,
            SCALED=stored.group_scale is not None,
            GROUP=group,
            STEP_GROUP=group if stored.group_scale is None else 0,
            HALVES=halves,
            **sizes_of(tile),
            **EXACT,
        )
    return y
