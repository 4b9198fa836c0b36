"""Words of learned books through the native library. The structure mirrors that of vectors.cpp."""

import ctypes

import torch
from torch import Tensor

from dqtk.numerics.packing import packed_width

from .decoder import Decoder

_Int, _Wide, _Pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Vectors(ctypes.Structure):
    """``scale``: of row n at ``n * scale_step``."""

    _fields_ = (
        *((name, _Pointer) for name in ("codes", "books", "scale")),
        *((name, _Wide) for name in ("stride", "n", "k", "scale_step")),
        *((name, _Int) for name in ("bits", "words", "length", "count", "threads")),
    )


def vector_decoder(library: ctypes.CDLL, qweight: Tensor, codebook: Tensor, scale: Tensor, k: int) -> Decoder:
    """A weight [N, K] of words. Arguments as the dqtk::decode_vectors op has them."""
    (count, words, length), n = codebook.shape, qweight.shape[0]
    bits = (words - 1).bit_length()
    assert qweight.shape[1] == packed_width(bits, k // length * count)
    qweight = qweight.contiguous()
    codebook, scale = (tensor.to(torch.float32).contiguous() for tensor in (codebook, scale))
    sizes = qweight.shape[1], n, k, int(scale.numel() > 1)
    pointers = [tensor.data_ptr() for tensor in (qweight, codebook, scale)]
    weight = _Vectors(*pointers, *sizes, bits, words, length, count, torch.get_num_threads())
    return Decoder(library=library, kind="vectors", weight=weight, n=n, k=k, kept=(qweight, codebook, scale))
