"""Trellis codes through the native library: the search for states, and rows of numbers. Structures mirror those of trellis.cpp."""

import ctypes

import torch
from torch import Tensor

from dqtk.numerics.trellis import curve, multipliers, num_steps, packed_width, values
from dqtk.spec.trellis import Trellis

from .decoder import Decoder

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


def trellis_decoder(
    library: ctypes.CDLL, packed: Tensor, scale: Tensor | None, n: int, k: int, tile: tuple[int, int], trellis: Trellis
) -> Decoder:
    """A weight [N, K] of rings. Arguments as the dqtk::decode_trellis op has them."""
    assert packed.shape == (-(-n // tile[0]) * -(-k // tile[1]), packed_width(trellis, tile[0] * tile[1]))
    packed = packed.contiguous()
    scale = None if scale is None else scale.to(torch.float32).contiguous()
    rings = _Rings(
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
    return Decoder(library=library, kind="trellis", weight=rings, n=n, k=k, step=tile[0], kept=(packed, scale))
