"""A stored weight of any format, decoded in parts, or multiplied with a few rows of inputs as it is decoded."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FEW_ROWS = 2  # of inputs, which are multiplied with every row of weights as soon as it is decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoder:
    """A weight [N, K]; the functions that make one (``weight_decoder``, ``vector_decoder``, ``trellis_decoder``) say of what.

    kind: of the native functions, ``dqtk_{kind}_decode`` and ``dqtk_{kind}_few``, which take ``weight``. step: a part begins at a
    multiple of so many rows. kept: tensors that ``weight`` points into.
    """

    library: ctypes.CDLL
    kind: str
    weight: ctypes.Structure
    n: int
    k: int
    step: int = 1
    kept: tuple[Tensor | None, ...]

    def rows(self, first: int, out: Tensor) -> Tensor:
        """``out`` [R, K], one of ``TYPES`` and contiguous, filled with the rows from ``first`` on."""
        assert first % self.step == 0
        assert first + out.shape[0] <= self.n
        decode = getattr(self.library, f"dqtk_{self.kind}_decode")
        place = ctypes.c_int64(first), ctypes.c_int64(out.shape[0]), ctypes.c_int32(TYPES[out.dtype])
        decode(ctypes.byref(self.weight), *place, ctypes.c_void_p(out.data_ptr()))
        return out

    def linear_few(self, x_TK: Tensor, bias: Tensor | None) -> Tensor:
        """[T, N] = x W^T + bias of at most ``FEW_ROWS`` rows, one of ``TYPES``; W is rounded to it, sums are float32."""
        x = x_TK.contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        y = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        x_at, bias_at, y_at = (None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (x, bias, y))
        multiply = getattr(self.library, f"dqtk_{self.kind}_few")
        multiply(ctypes.byref(self.weight), x_at, ctypes.c_int64(x.shape[0]), bias_at, ctypes.c_int32(TYPES[x.dtype]), y_at)
        return y
