"""Products with a stored weight on the CPU, which is never decoded as a whole.

A few rows of inputs are multiplied by the native library as it decodes. For more, some output rows are decoded at a time into
memory that is used again, then torch multiplies. Several small matmuls may round otherwise than a large one.
"""

import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import native

CHUNK_BYTES = 4 << 20  # decoded at a time: in the last cache of most CPUs, and few parallel regions where cores are busy


def linear_on_cpu(decoder: native.Decoder, x: Tensor, bias: Tensor | None) -> Tensor:
    """[..., N] = x W^T + bias in the dtype of ``x`` [..., K], one of ``native.TYPES`` and not empty; W is decoded to that dtype."""
    rows = x.reshape(-1, decoder.k)
    y = decoder.linear_few(rows, bias) if rows.shape[0] <= native.FEW_ROWS else linear_in_chunks(decoder, rows, bias)
    return y.view(*x.shape[:-1], decoder.n)


_room = threading.local()  # memory of decoded rows, kept for the next call: fresh pages cost as much as decoding into them


def _rows_of_memory(length: int, k: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized [length, K]; the same memory at every call of a thread unless it must be larger than ``CHUNK_BYTES``."""
    size = length * k * dtype.itemsize
    if size > CHUNK_BYTES:
        return torch.empty((length, k), dtype=dtype)
    if not hasattr(_room, "bytes") or _room.bytes.numel() < size:
        with torch.inference_mode(False):
            _room.bytes = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    return _room.bytes[:size].view(dtype).view(length, k)


def linear_in_chunks(decoder: native.Decoder, x_TK: Tensor, bias: Tensor | None) -> Tensor:
    """[T, N] = x W^T + bias, a multiple of 64 rows of W decoded at a time, or all that are left."""
    (t, k), n, dtype = x_TK.shape, decoder.n, x_TK.dtype
    length = max(64, CHUNK_BYTES // (k * dtype.itemsize) // 64 * 64)
    bias = None if bias is None else bias.to(dtype)
    if length >= n:
        return F.linear(x_TK, decoder.rows(0, _rows_of_memory(n, k, dtype)), bias)
    y, room = torch.empty((t, n), dtype=dtype), _rows_of_memory(length, k, dtype)
    for first in range(0, n, length):
        out = y[:, first : first + length]
        weight = decoder.rows(first, room[: out.shape[1]]).t()
        if bias is None:
            torch.mm(x_TK, weight, out=out)
        else:
            torch.addmm(bias[first : first + length], x_TK, weight, out=out)
    return y
