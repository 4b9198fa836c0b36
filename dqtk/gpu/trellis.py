"""Weights of trellis codes decoded in Triton: every number of a weight reads the three bytes that hold its state, and nothing else.

Numbers are those of ``trellis.values_of`` times the scale, rounded to the dtype, bit for bit. Rings are whole bytes; torch decodes
others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqtk.numerics.trellis import curve, multipliers
from dqtk.spec.trellis import Trellis

from .device import EXACT, dense, rounded_to

BLOCK = 1024  # numbers of a program


@triton.jit
def _decode(
    packed, scale, y, K, count, across, width, a_0, a_1, b_1, b_2, unit,
    SCALE: tl.constexpr, SCALE_STEP: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    STATE_BITS: tl.constexpr, STEP_BITS: tl.constexpr, VECTOR: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [N, K], of ``count`` numbers, from rings of ``width`` bytes, ``across`` of them side by side."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = at // K, (at % K).to(tl.int32)
    ring = (row // TILE_ROWS) * across + column // TILE_COLUMNS
    place = (row % TILE_ROWS).to(tl.int32) * TILE_COLUMNS + column % TILE_COLUMNS
    start = (place // VECTOR + 1) * STEP_BITS - STATE_BITS  # of the state's bits; before the ring's first it is at the ring's end
    start = tl.where(start < 0, start + width * 8, start)
    byte, bits, inside = start // 8, packed + ring * width, at < count
    word = tl.load(bits + byte, mask=inside, other=0).to(tl.int32) << 16
    word |= tl.load(bits + (byte + 1) % width, mask=inside, other=0).to(tl.int32) << 8
    word |= tl.load(bits + (byte + 2) % width, mask=inside, other=0).to(tl.int32)
    state = (word >> (24 - STATE_BITS - start % 8)) & ((1 << STATE_BITS) - 1)
    factor = tl.where(place % VECTOR == 0, FIRST, SECOND)
    u = (state * factor) & ((1 << STATE_BITS) - 1)
    p = (2 * u + (1 - (1 << STATE_BITS))).to(tl.float32) * unit
    q = p * p
    value = tl.div_rn(p * (a_0 + q * a_1), 1.0 + q * (b_1 + q * b_2))
    if SCALE:
        value *= tl.load(scale + row * SCALE_STEP, mask=inside, other=0.0)
    tl.store(y + at, rounded_to(value, y.dtype.element_ty), mask=inside)


def takes(tile_rows: int, tile_columns: int, trellis: Trellis, dtype: torch.dtype) -> bool:
    """Whether the kernel decodes such rings to such numbers."""
    return tile_rows * tile_columns * trellis.bits % 8 == 0 and dtype in (torch.float32, torch.bfloat16, torch.float16)


def decode_trellis(
    packed: Tensor, scale: Tensor | None, n: int, k: int, tile: tuple[int, int], trellis: Trellis, dtype: torch.dtype
) -> Tensor:
    """[n, k] in ``dtype``, for what ``takes`` says. Arguments as the dqtk::decode_trellis op has them."""
    y = torch.empty((n, k), dtype=dtype, device=packed.device)
    if y.numel() == 0:
        return y
    packed, scale = dense(packed, None if scale is None else scale.float())
    factors = multipliers(trellis)
    with torch.cuda.device_of(packed):
        _decode[(triton.cdiv(n * k, BLOCK),)](
            packed,
            scale,
            y,
            k,
            n * k,
            triton.cdiv(k, tile[1]),
            packed.shape[1],
            *curve(trellis),
            2.0**-trellis.state_bits,
            SCALE=scale is not None,
            SCALE_STEP=0 if scale is None or scale.numel() == 1 else 1,
            TILE_ROWS=tile[0],
            TILE_COLUMNS=tile[1],
            STATE_BITS=trellis.state_bits,
            STEP_BITS=trellis.step_bits,
            VECTOR=trellis.vector,
            FIRST=factors[0],
            SECOND=factors[-1],
            BLOCK=BLOCK,
            **EXACT,
        )
    return y
