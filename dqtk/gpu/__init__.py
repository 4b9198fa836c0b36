"""Kernels of CUDA devices in Triton: ``serves`` says whether they run on a device, ``describe`` which they are, or why none.

Triton is imported by the first call of a kernel, not before.
"""

import torch
from torch import Tensor

from dqtk.spec.trellis import Trellis

from . import support, table
from .support import describe, no_scaled_matmul, serves
from .table import chosen

TYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["TYPES", "decode_trellis", "describe", "forget", "linear_decoded", "linear_int8", "no_scaled_matmul", "serves"]


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


def linear_decoded(x_TK: Tensor, bias: Tensor | None, *stored) -> Tensor | None:
    """``decoded.linear_decoded`` in the best tiles; None where it does not take such an input or weight, or torch is faster."""
    from .decoded import Stored, linear_decoded, takes

    weight = Stored(*stored)
    if not takes(x_TK, weight):
        return None
    tile = chosen(f"decoded{weight.bits}", max(x_TK.shape[0], 1), weight.qweight.shape[0], x_TK.shape[1], x_TK.device)
    return None if tile is None else linear_decoded(x_TK, bias, weight, tile)


def decode_trellis(packed: Tensor, scale: Tensor | None, n: int, k: int, *how) -> Tensor | None:
    """``trellis.decode_trellis``, of arguments as the op has them; None where the kernel does not take such rings."""
    from .trellis import decode_trellis, takes

    tile_rows, tile_columns, state_bits, bits, vector, dtype = how
    trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
    if not takes(tile_rows, tile_columns, trellis, dtype):
        return None
    return decode_trellis(packed, scale, n, k, (tile_rows, tile_columns), trellis, dtype)
