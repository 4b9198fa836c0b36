"""What the Triton kernels share on the device."""

import os

import triton
import triton.language as tl

from .tiles import Tile

# Triton's interpreter (seen in 3.8) loses the carry when it rounds float32 to bfloat16: results are half of what they should be.
_BY_BITS = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def rounded_to(v, TYPE: tl.constexpr):
    """float32 numbers in another type: to nearest, ties to even."""
    if _BY_BITS and TYPE == tl.bfloat16:  # noqa: SIM300
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        v = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        v = v.to(TYPE)
    return v


@triton.jit
def tile_of(T, N, TILE_T: tl.constexpr, TILE_N: tl.constexpr, BAND: tl.constexpr):
    """Which rows and outputs a program makes: bands of rows are walked down first, so that their weights are still in the cache."""
    i = tl.program_id(0)
    down, across = tl.cdiv(T, TILE_T), tl.cdiv(N, TILE_N)
    band = i // (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    inside = i % (BAND * across)
    return band * BAND + inside % height, inside // height


def sizes_of(tile: Tile) -> dict[str, int]:
    """What a product's kernel is told about its tiles."""
    sizes = {"TILE_T": tile.rows, "TILE_N": tile.outputs, "TILE_K": tile.width, "BAND": 8}
    return sizes | {"num_warps": tile.warps, "num_stages": tile.stages}
