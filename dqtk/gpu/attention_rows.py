"""What attention reads, made ready in Triton: lists of live blocks; keys and values in order, rounded by blocks or as they are.

Codes and scales are those of ``kernels.block_attention``'s reference bit for bit, where the mean key that is taken away is the
same: every float operation is the reference's, in its order. What is not finite makes the scale of its block NaN: it stays visible.

Keys lie as [B H, blocks * block, channels], values that are rounded as [B H, blocks, channels, block], turned round: products of
bytes want both sides along their sum. Channels are filled up to a power of two with zeros, tokens to whole blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import EXACT, nearest

_LISTED_AT_ONCE = 256


@triton.jit
def _list_live(live, columns, counts, C, width, BLOCK: tl.constexpr):
    """The live columns of a row [C], in ascending order, and how many: a program per row of ``live`` [width] bytes."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros((), dtype=tl.int32)
    for start in range(0, C, BLOCK):
        j = start + tl.arange(0, BLOCK)
        byte = tl.load(live + row * width + j // 8, mask=j < C, other=0).to(tl.int32)
        bit = (byte >> (j % 8)) & 1
        place = count + tl.cumsum(bit, axis=0) - 1
        tl.store(columns + row * C + place, j.to(columns.dtype.element_ty), mask=bit > 0)
        count += tl.sum(bit, axis=0)
    tl.store(counts + row, count)


@triton.jit
def places(order, h, i, N, ORDER: tl.constexpr):
    """The tokens that stand at places ``i`` of head ``h``; 0 beyond the last."""
    found = tl.load(order + h.to(tl.int64) * N + i, mask=i < N, other=0) if ORDER else tl.where(i < N, i, 0)
    return found.to(tl.int64)


@triton.jit
def _scale_of(v, AXIS: tl.constexpr, MOST: tl.constexpr):
    """Of codes up to ``MOST`` of numbers v [tokens, channels]: per channel (AXIS 0) or one, [1, 1]."""
    size = tl.abs(v)
    wrong = (~(size < float("inf"))).to(tl.int32)
    top, wrong = tl.max(size, axis=0, keep_dims=True), tl.max(wrong, axis=0, keep_dims=True)
    if AXIS != 0:
        top, wrong = tl.max(top, axis=1, keep_dims=True), tl.max(wrong, axis=1, keep_dims=True)
    scale = tl.div_rn(top, tl.zeros_like(top) + MOST)
    scale = tl.where(scale <= 1e-30, 1.0, scale)
    return tl.where(wrong > 0, float("nan"), scale)


@triton.jit
def codes_of(v, scale, MOST: tl.constexpr):
    """int8 [tokens, channels]: v / scale, to nearest."""
    code = tl.div_rn(v, tl.zeros_like(v) + scale)
    code = tl.where(code == code, code, 0.0)
    return nearest(tl.minimum(tl.maximum(code, -1.0 * MOST), 1.0 * MOST)).to(tl.int8)


@triton.jit
def round_tile(v, MOST: tl.constexpr):
    """Codes int8 [tokens, channels] of numbers v, and their one scale [1, 1]."""
    scale = _scale_of(v, 1, MOST)
    return codes_of(v, scale, MOST), scale


@triton.jit(do_not_specialize=["N", "H"])
def _move_rows(
    x, order, mean, rows, scales, sums, N, H, x_b, x_h, x_n,
    KIND: tl.constexpr, MOST: tl.constexpr, ORDER: tl.constexpr, SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of tokens of a head in order. KIND: "plain": as they are; "keys", "values": codes; the latter per channel, turned."""
    block, pair = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    i, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDE)
    at = places(order, h, i, N, ORDER)
    inside = (i < N)[:, None] & (d < CHANNELS)[None, :]
    raw = tl.load(x + b * x_b + h * x_h + at[:, None] * x_n + d[None, :], mask=inside, other=0.0)
    index = pair.to(tl.int64) * blocks + block
    by_token = rows + (index * BLOCK + tl.arange(0, BLOCK))[:, None] * WIDE + d[None, :]
    if KIND == "plain":
        tl.store(by_token, raw)
    elif KIND == "keys":
        v = raw.to(tl.float32)
        if SMOOTH:
            v -= tl.load(mean + pair.to(tl.int64) * CHANNELS + d, mask=d < CHANNELS, other=0.0)[None, :]
            v = tl.where(inside, v, 0.0)
        codes, scale = round_tile(v, MOST)
        tl.store(by_token, codes)
        tl.store(scales + index + tl.arange(0, 1)[:, None] + tl.arange(0, 1)[None, :], scale)
    else:
        v = raw.to(tl.float32)
        scale = _scale_of(v, 0, MOST)
        codes = codes_of(v, scale, MOST)
        tl.store(rows + (index * WIDE + d)[None, :] * BLOCK + tl.arange(0, BLOCK)[:, None], codes)
        tl.store(scales + (index * WIDE + d)[None, :], scale)
        tl.store(sums + index * WIDE + d, tl.sum(codes.to(tl.int32), axis=0))


class Rows(NamedTuple):
    """Keys or values of all heads as ``_move_rows`` leaves them. scales: float32 [B H, blocks] of keys, [B H, blocks, channels] of
    values; sums: int32 of the codes of values, shaped alike. None: of what is not rounded, or not moved."""

    rows: Tensor | None = None
    scales: Tensor | None = None
    sums: Tensor | None = None


def move_rows(x: Tensor, order: Tensor | None, mean: Tensor | None, block: int, wide: int, kind: str, most: int = 0) -> Rows:
    """Tokens of ``x`` [B, H, N, D] in ``order`` int32 [H, N], by blocks, filled up to ``wide`` channels.

    kind: "plain"; "keys": codes up to ``most``, less ``mean`` float32 [B, H, D] where given; "values": codes up to ``most``.
    """
    (batch, heads, num, channels), blocks = x.shape, triton.cdiv(x.shape[2], block)
    pairs, dtype = batch * heads, x.dtype if kind == "plain" else torch.int8
    rows = torch.empty(
        (pairs, blocks, wide, block) if kind == "values" else (pairs, blocks * block, wide), dtype=dtype, device=x.device
    )
    shape = (pairs, blocks, wide) if kind == "values" else (pairs, blocks)
    scales = None if kind == "plain" else torch.empty(shape, device=x.device)
    sums = torch.empty(shape, dtype=torch.int32, device=x.device) if kind == "values" else None
    sizes = {"BLOCK": block, "CHANNELS": channels, "WIDE": wide, "num_warps": 4}
    switches = {"KIND": kind, "MOST": most, "ORDER": order is not None, "SMOOTH": mean is not None}
    _move_rows[(blocks, pairs)](x, order, mean, rows, scales, sums, num, heads, *x.stride()[:3], **switches, **sizes, **EXACT)
    return Rows(rows, scales, sums)


def list_live(live: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """int32 [H, R, C] and [H, R]: which blocks of keys are live for every block of queries, and how many; places behind them are
    not written."""
    heads, rows, width = live.shape
    listed = torch.empty((heads, rows, columns), dtype=torch.int32, device=live.device)
    counts = torch.empty((heads, rows), dtype=torch.int32, device=live.device)
    block = min(_LISTED_AT_ONCE, triton.next_power_of_2(columns))
    _list_live[(heads * rows,)](live, listed, counts, columns, width, BLOCK=block, num_warps=1)
    return listed, counts
