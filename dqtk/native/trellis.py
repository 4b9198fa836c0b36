"""Trellis codes through the native library: the search for states, and rows of numbers. Structures mirror those of trellis.cpp."""

import ctypes

import torch
from torch import Tensor

from dqtk.numerics.trellis import curve, multipliers, num_steps, packed_width, values
from dqtk.spec.trellis import Trellis

from .calls import TYPES

_Int, _Wide, _Pointer, _Float = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class _Search(ctypes.Structure):
    """``weight``: rows ``weight_stride`` apart, or null."""

    _fields_ = (
        *((name, _Pointer) for name in ("x", "weight", "values", "states")),
        *((name, _Wide) for name in ("rows", "steps", "weight_stride")),
        *((name, _Int) for name in ("state_bits", "step_bits", "vector", "threads")),
    )


class _Rings(ctypes.Structure):
    """``scale``: of row n at ``n * scale_step``, or null."""

    _fields_ = (
        ("bits", _Pointer),
        ("scale", _Pointer),
        *((name, _Wide) for name in ("stride", "n", "k", "tile_rows", "tile_columns", "scale_step")),
        ("curve", _Float * 4),
        ("multipliers", _Int * 2),
        *((name, _Int) for name in ("state_bits", "step_bits", "vector", "threads")),
    )


def trellis_search(library: ctypes.CDLL, x: Tensor, weight: Tensor | None, trellis: Trellis, table: Tensor | None = None) -> Tensor:
    """``trellis.encode`` of what ``trellis.search_inputs`` gives: float32 [R, T] on the CPU; int32 [R, n].

    ``table``: float32 [S, V], other values than those of the trellis.
    """
    x, n = x.contiguous(), num_steps(trellis, x.shape[1])
    stride = 0 if weight is None or weight.stride(0) == 0 else x.shape[1]
    weight = None if weight is None else (weight if stride else weight[:1]).contiguous()
    planes = (values(trellis) if table is None else table).t().contiguous()
    states = torch.empty((x.shape[0], n), dtype=torch.int32)
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, planes, states)]
    sizes = trellis.state_bits, trellis.step_bits, trellis.vector, torch.get_num_threads()
    library.dqtk_trellis_search(ctypes.byref(_Search(*pointers, x.shape[0], n, stride, *sizes)))
    return states


class TrellisDecoder:
    """A weight [N, K] of rings, ready to be decoded in parts. Arguments as the dqtk::decode_trellis op has them."""

    def __init__(
        self, library: ctypes.CDLL, packed: Tensor, scale: Tensor | None, n: int, k: int, tile: tuple[int, int], trellis: Trellis
    ):
        self.library, self.n, self.k, self.tile_rows = library, n, k, tile[0]
        assert packed.shape == (-(-n // tile[0]) * -(-k // tile[1]), packed_width(trellis, tile[0] * tile[1]))
        packed = packed.contiguous()
        scale = None if scale is None else scale.to(torch.float32).contiguous()
        self.kept = packed, scale
        self.rings = _Rings(
            packed.data_ptr(),
            None if scale is None else scale.data_ptr(),
            packed.shape[1],
            n,
            k,
            *tile,
            int(scale is not None and scale.numel() > 1),
            (_Float * 4)(*curve(trellis)),
            (_Int * 2)(*multipliers(trellis)),
            trellis.state_bits,
            trellis.step_bits,
            trellis.vector,
            torch.get_num_threads(),
        )

    def rows(self, first: int, out: Tensor) -> Tensor:
        """``out`` [R, K], float32, bfloat16 or float16 and contiguous, filled with the rows from ``first``, a tile's first, on."""
        assert first % self.tile_rows == 0
        assert first + out.shape[0] <= self.n
        count, kind = _Wide(out.shape[0]), _Int(TYPES[out.dtype])
        self.library.dqtk_trellis_decode(ctypes.byref(self.rings), _Wide(first), count, kind, _Pointer(out.data_ptr()))
        return out
