"""What the Triton kernels share on the device."""

import os
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .tiles import Tile

EXACT = {"enable_fp_fusion": False}  # products round before they are added to, as torch's do

# Triton's interpreter (seen in 3.8) loses the carry when it rounds float32 to bfloat16 (some results are half of what they should
# be), and multiplies the bits of bfloat16 numbers as if they were integers.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def dense(*tensors: Tensor | None) -> list[Any]:
    """Tensors as the kernels read them: without gaps."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@triton.jit
def rounded_to(v, TYPE: tl.constexpr):
    """float32 numbers in another type: to nearest, ties to even."""
    if _INTERPRETED and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        v = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        v = v.to(TYPE)
    return v


@triton.jit
def sum_of_products(a, b, acc):
    """acc + a @ b in float32, of 16-bit numbers or of float32 ones in three parts of 10 bits."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def nearest(v):
    """To the nearest integer, ties to even, of |v| < 2^22."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def tile_of(T, N, TILE_T: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """Which rows and outputs a program makes: bands of rows are walked down first, so that their weights are still in the cache."""
    i = tl.program_id(0)
    down, across = tl.cdiv(T, TILE_T), tl.cdiv(N, TILE_N)
    band = i // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = i % (BAND * across)
    return band * BAND + inside % height, inside // height


@triton.jit
def per_group(
    values, start, n, N, row_step, groups, GROUP: tl.constexpr, TILE_K: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """What belongs to the groups of a tile of weights [TILE_K, TILE_N] that begins at byte ``start`` of rows ``n``.

    Values of row n stand from ``n * row_step`` on, one per ``GROUP`` bytes; 0: one for the row, and the result is [1, TILE_N].
    """
    at = values + n.to(tl.int64) * row_step
    if GROUP == 0:
        found = tl.load(at, mask=n < N, other=0)[None, :]
    elif GROUP >= TILE_K:
        found = tl.load(at + start // GROUP, mask=n < N, other=0)[None, :]
    else:
        g = start // GROUP + tl.arange(0, TILE_K // GROUP)
        found = tl.load(at[None, :] + g[:, None], mask=(g < groups)[:, None] & (n < N)[None, :], other=0)
        found = tl.broadcast_to(found[:, None, :], (TILE_K // GROUP, GROUP, TILE_N)).reshape(TILE_K, TILE_N)
    return found


def sizes_of(tile: Tile) -> dict[str, int]:
    """What a product's kernel is told about its tiles."""
    sizes = {"TILE_T": tile.rows, "TILE_N": tile.outputs, "TILE_K": tile.width, "BAND": 8}
    return sizes | {"num_warps": tile.warps, "num_stages": tile.stages}
