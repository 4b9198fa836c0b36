"""Kernels of CUDA devices in Triton: ``serves`` says whether they run on a device, ``describe`` which they are, or why none.

Triton is imported by the first call of a kernel, not before.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dqtk.spec.trellis import Trellis

from . import support, table
from .sage import require_sage, sage_version
from .support import describe, no_scaled_matmul, serves
from .table import chosen, chosen_pass

TYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = [
    "TYPES",
    "block_attention",
    "decode_trellis",
    "decode_vectors",
    "describe",
    "forget",
    "linear_decoded",
    "linear_int8",
    "linears_int8",
    "no_scaled_matmul",
    "require_sage",
    "sage_version",
    "serves",
    "takes_blocks",
]


def forget() -> None:
    """Decide again about devices and their tables."""
    support.forget()
    table.forget()


def linear_int8(x_TK: Tensor, qweight: Tensor, scale: Tensor, group_scale: Tensor | None, *others) -> Tensor | None:
    """``integer.linear_int8`` in the best tiles; None where the device's table says that torch's kernels are faster."""
    from .integer import linear_int8, stays_packed

    (t, k), bits = x_TK.shape, others[3]
    kind = "int4" if stays_packed(qweight, group_scale, bits, k) else "int8"
    tile = chosen(kind, max(t, 1), qweight.shape[0], k, x_TK.device)
    return None if tile is None else linear_int8(x_TK, qweight, scale, group_scale, *others, tile=tile)


def linears_int8(x_TK: Tensor, layers: Sequence[Any], smooth: Tensor | None) -> list[Tensor] | None:
    """``integer.linear_int8`` of layers (dqtk::linear_int8's arguments from ``qweight`` to ``bits``) whose input is rounded alike:
    once. None where torch's kernels are faster for one of them, or there are no rows."""
    from .integer import linear_int8, round_rows, stays_packed

    t, k = x_TK.shape
    packed = [stays_packed(layer.qweight, layer.group_scale, layer.bits, k) for layer in layers]
    kinds = ["int4" if halves else "int8" for halves in packed]
    tiles = [chosen(kind, max(t, 1), layer.qweight.shape[0], k, x_TK.device) for kind, layer in zip(kinds, layers, strict=True)]
    if None in tiles or t == 0:
        return None
    first, smooth = layers[0], None if smooth is None else smooth.contiguous()
    with torch.cuda.device_of(x_TK):
        codes = {halves: round_rows(x_TK, first.input_scale, first.input_zero, smooth, halves) for halves in set(packed)}
    return [
        linear_int8(x_TK, *layer, tile=tile, rounded=codes[halves])  # type: ignore[arg-type]
        for layer, tile, halves in zip(layers, tiles, packed, strict=True)
    ]


def linear_decoded(x_TK: Tensor, bias: Tensor | None, *stored) -> Tensor | None:
    """``decoded.linear_decoded`` in the best tiles; None where it does not take such an input or weight, or torch is faster."""
    from .decoded import Stored, linear_decoded, takes

    weight = Stored(*stored)
    if not takes(x_TK, weight):
        return None
    tile = chosen(f"decoded{weight.bits}", max(x_TK.shape[0], 1), weight.qweight.shape[0], x_TK.shape[1], x_TK.device)
    return None if tile is None else linear_decoded(x_TK, bias, weight, tile)


def takes_blocks(block_q: int, block_k: int, channels: int, qk_bits: int, pv_bits: int, pv_mode: str) -> bool:
    """Whether ``block_attention`` serves these: powers of two that fit into registers; probabilities as it rounds them."""
    fit = all(size >= 16 and size & (size - 1) == 0 for size in (block_q, block_k)) and block_k <= 128 and channels <= 256
    whole = block_q <= 128 or qk_bits == 16  # a block of queries has one scale, so it is one tile
    return fit and whole and (pv_bits == 16 or pv_mode == "row")


def block_attention(
    q: Tensor, k: Tensor, v: Tensor, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, smooth
) -> Tensor:
    """``attention.block_attention`` in the way that was measured to be the fastest, or the default."""
    from .attention import block_attention

    how = chosen_pass(q, v, block_q, block_k, qk_bits, pv_bits)
    return block_attention(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, smooth, how=how)


def decode_trellis(packed: Tensor, scale: Tensor | None, n: int, k: int, *how) -> Tensor | None:
    """``trellis.decode_trellis``, of arguments as the op has them; None where the kernel does not take such rings."""
    from .trellis import decode_trellis, takes

    tile_rows, tile_columns, state_bits, bits, vector, dtype = how
    trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
    if not takes(tile_rows, tile_columns, trellis, dtype):
        return None
    return decode_trellis(packed, scale, n, k, (tile_rows, tile_columns), trellis, dtype)


def decode_vectors(qweight: Tensor, codebook: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """``vectors.decode_vectors``, of arguments as the op has them; ``dtype`` one of ``TYPES``."""
    from .vectors import decode_vectors

    return decode_vectors(qweight, codebook, scale, k, dtype)
