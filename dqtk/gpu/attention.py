"""Attention over live blocks in Triton: dqtk::block_attention as its reference defines it, in one pass with a running softmax.

A program takes a block of queries of a head through the blocks of keys that are live for it, from a list: the others cost nothing.
Tokens are picked up in the head's order, by row numbers, and answers are put back where their queries came from.

Where queries and keys are rounded, products are exact sums of bytes, 4-bit codes too. Where probabilities are, codes are relative
to the largest of their row in the tile, which is known at once, so a later maximum changes only what their sums are multiplied
with. Tensor cores multiply signed bytes with signed ones: 8-bit probabilities (0 to 255) are multiplied less 128, and 128 times the
sum of the values' codes is added, which is exact. What smoothing took from queries is multiplied with the keys block by block: a
tensor of all of it would take gigabytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_rows import Rows, list_live, move_rows, places, round_tile
from .device import nearest, rounded_to, sum_of_products
from .tiles import Pass

LEAST_BYTES = 32  # along the sum of a product of bytes
ROWS = 128  # of queries at a time, at most
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _seen(mask, rows, at, m_q, m_k, b, h, m_b, m_h, inside, KIND: tl.constexpr):
    """What a mask adds to scores [rows, keys], in units of the exponent: one row where queries share it."""
    if KIND == "keys" or KIND == "keys added":
        place = mask + b * m_b + h * m_h + at[None, :] * m_k
    else:
        place = mask + b * m_b + h * m_h + rows[:, None] * m_q + at[None, :] * m_k
    if KIND == "keys" or KIND == "all":
        found = tl.where(tl.load(place, mask=inside[None, :], other=0) != 0, 0.0, float("-inf"))
    else:
        found = tl.load(place, mask=inside[None, :], other=0.0).to(tl.float32) * LOG2E
    return found


@triton.jit(do_not_specialize=["N", "H", "C", "R"])
def _attend(
    q, k, v, out, order, mask, columns, counts,
    keys, key_scales, key_mean, values, value_scales, value_sums,
    scale, N, H, C, R,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, m_h, m_q, m_k,
    QK: tl.constexpr, PV: tl.constexpr, SMOOTH_Q: tl.constexpr, MASK: tl.constexpr, ORDER: tl.constexpr, LISTED: tl.constexpr,
    MOVED: tl.constexpr, RAGGED: tl.constexpr, TILES_PER_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDE_OUT: tl.constexpr,
):  # fmt: skip
    """out [B, H, N, OUTPUTS]. QK, PV: the largest code, 0: not rounded. MASK: "", "keys", "all", and either "added"."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    b, h = (pair // H).to(tl.int64), (pair % H).to(tl.int64)
    pair = pair.to(tl.int64)
    i, d, e = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, WIDE_OUT)
    rows = places(order, h, i, N, ORDER)
    there = (i < N)[:, None] & (d < CHANNELS)[None, :]
    queries = tl.load(q + b * q_b + h * q_h + rows[:, None] * q_n + d[None, :], mask=there, other=0.0)
    by = scale * LOG2E
    if QK > 0:
        wide = queries.to(tl.float32)
        if SMOOTH_Q:
            shift = tl.sum(wide, axis=0) / tl.minimum(N - tile * ROWS, ROWS).to(tl.float32)
            wide = tl.where(there, wide - shift[None, :], 0.0)
            mean = tl.load(key_mean + pair * CHANNELS + d, mask=d < CHANNELS, other=0.0)
        codes, step = round_tile(wide, QK)
        by_row = step * by  # [1, 1]
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, WIDE_OUT), dtype=tl.float32)
    block = h * R + tile // TILES_PER_BLOCK
    count = C
    if LISTED:
        count = tl.load(counts + block)
    for nth in range(count):
        column = nth
        if LISTED:
            column = tl.load(columns + block * C + nth)
        j = column * KEYS + tl.arange(0, KEYS)
        at = places(order, h, j, N, ORDER)
        if QK > 0 or MOVED:
            rows_k = tl.load(keys + pair * C * KEYS * WIDE + j[None, :] * WIDE + d[:, None])
        else:
            rows_k = tl.load(
                k + b * k_b + h * k_h + at[None, :] * k_n + d[:, None], mask=(j < N)[None, :] & (d < CHANNELS)[:, None], other=0.0
            )
        if QK > 0:
            scores = tl.dot(codes, rows_k, out_dtype=tl.int32).to(tl.float32) * (by_row * tl.load(key_scales + pair * C + column))
        else:
            scores = sum_of_products(queries, rows_k, tl.zeros((ROWS, KEYS), dtype=tl.float32)) * by
        if SMOOTH_Q:
            plain = k + b * k_b + h * k_h + at[:, None] * k_n + d[None, :]
            plain = tl.load(plain, mask=(j < N)[:, None] & (d < CHANNELS)[None, :], other=0.0).to(tl.float32) - mean[None, :]
            scores += (tl.sum(plain * shift[None, :], axis=1) * by)[None, :]
        if MASK != "":
            scores += _seen(mask, rows, at, m_q, m_k, b, h, m_b, m_h, j < N, MASK)
        if RAGGED:
            scores = tl.where((j < N)[None, :], scores, float("-inf"))
        of_tile = tl.max(scores, axis=1)
        new = tl.maximum(top, of_tile)
        known = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing takes nothing from minus infinity
        shrink = tl.exp2(top - known)
        if PV > 0:
            p = tl.exp2(scores - tl.where(of_tile == float("-inf"), 0.0, of_tile)[:, None])
            weight = tl.exp2(of_tile - known)
            total = total * shrink + tl.sum(p, axis=1) * weight
            p = nearest(p * PV)
            rows_v = tl.load(values + (pair * C + column) * WIDE_OUT * KEYS + e[None, :] * KEYS + tl.arange(0, KEYS)[:, None])
            if KEYS < 32:  # too few for products of bytes; these numbers and their sums are exact in 16 bits and float32
                found = sum_of_products(p.to(tl.float16), rows_v.to(tl.float16), tl.zeros((ROWS, WIDE_OUT), dtype=tl.float32))
            elif PV == 255:
                found = tl.dot((p - 128.0).to(tl.int8), rows_v, out_dtype=tl.int32)
                found = (found + 128 * tl.load(value_sums + (pair * C + column) * WIDE_OUT + e)[None, :]).to(tl.float32)
            else:
                found = tl.dot(p.to(tl.int8), rows_v, out_dtype=tl.int32).to(tl.float32)
            found *= tl.load(value_scales + (pair * C + column) * WIDE_OUT + e)[None, :]
            acc = acc * shrink[:, None] + found * (weight / PV)[:, None]
        else:
            p = tl.exp2(scores - known[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            if MOVED:
                rows_v = tl.load(values + pair * C * KEYS * WIDE_OUT + j[:, None] * WIDE_OUT + e[None, :])
            else:
                rows_v = tl.load(
                    v + b * v_b + h * v_h + at[:, None] * v_n + e[None, :],
                    mask=(j < N)[:, None] & (e < OUTPUTS)[None, :],
                    other=0.0,
                )
            acc = sum_of_products(rounded_to(p, v.dtype.element_ty), rows_v, acc * shrink[:, None])
        top = new
    y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    to = out + b * o_b + h * o_h + rows[:, None] * o_n + e[None, :]
    tl.store(to, rounded_to(y, out.dtype.element_ty), mask=(i < N)[:, None] & (e < OUTPUTS)[None, :])


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    live: Tensor | None,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    qk_bits: int,
    pv_bits: int,
    smooth: str,
    *,
    how: Pass,
) -> Tensor:
    """The op of that name, for what ``gpu.takes_blocks`` says; probabilities are rounded by row."""
    (batch, heads, num, channels), outputs = q.shape, v.shape[3]
    out = torch.empty((batch, num, heads, outputs), dtype=q.dtype, device=q.device).transpose(1, 2)
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    order = None if order is None else order.contiguous()
    wide, wide_out = (max(LEAST_BYTES, triton.next_power_of_2(size)) for size in (channels, outputs))
    most_qk, most_pv = (0 if bits == 16 else 2 ** (bits - signed) - 1 for bits, signed in ((qk_bits, 1), (pv_bits, 0)))
    rows, columns = min(block_q, ROWS), triton.cdiv(num, block_k)
    with torch.cuda.device_of(q):
        mean = None if smooth == "none" or not most_qk else k.mean(2, dtype=torch.float32)
        keys = values = Rows()
        if most_qk or how.moved:
            keys = move_rows(k, order, mean, block_k, wide, "keys" if most_qk else "plain", most_qk)
        if most_pv or how.moved:
            values = move_rows(v, order, None, block_k, wide_out, "values" if most_pv else "plain", 2 ** (pv_bits - 1) - 1)
        listed: tuple[Any, Any] = (None, None) if live is None else list_live(live.contiguous(), columns)
        kind, given, strides = _mask(mask, q)
        grid = (triton.cdiv(num, rows), batch * heads)
        _attend[grid](
            q, k, v, out, order, given, *listed,
            keys.rows, keys.scales, mean, values.rows, values.scales, values.sums,
            scale, num, heads, columns, triton.cdiv(num, block_q),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *strides,
            QK=most_qk, PV=most_pv, SMOOTH_Q=smooth == "qk" and most_qk > 0, MASK=kind, ORDER=order is not None,
            LISTED=live is not None, MOVED=how.moved, RAGGED=num % block_k != 0, TILES_PER_BLOCK=block_q // rows,
            ROWS=rows, KEYS=block_k, CHANNELS=channels, WIDE=wide, OUTPUTS=outputs, WIDE_OUT=wide_out,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
    return out


def _mask(mask: Tensor | None, q: Tensor) -> tuple[str, Tensor | None, tuple[int, ...]]:
    """Its kind, its bytes or numbers, and its strides over [B, H, N, N]; those of axes that it shares are 0."""
    if mask is None:
        return "", None, (0, 0, 0, 0)
    strides = mask.expand(*q.shape[:3], q.shape[2]).stride()
    each = "keys" if strides[2] == 0 else "all"
    return (each, mask.view(torch.uint8), strides) if mask.dtype == torch.bool else (f"{each} added", mask, strides)
