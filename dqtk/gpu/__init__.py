"""Kernels of CUDA devices in Triton: ``serves`` says whether they run on a device, ``describe`` which they are, or why none.

Triton is imported by the first call of a kernel, not before.
"""

import torch
from torch import Tensor

from .support import describe, forget, no_scaled_matmul, serves

TYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["TYPES", "describe", "forget", "linear_decoded", "linear_int8", "no_scaled_matmul", "serves"]


def linear_int8(x_TK: Tensor, *layer, **how) -> Tensor:
    """``integer.linear_int8``."""
    from .integer import linear_int8

    return linear_int8(x_TK, *layer, **how)


def linear_decoded(x_TK: Tensor, bias: Tensor | None, *stored) -> Tensor | None:
    """``decoded.linear_decoded``; None where it does not take such an input or such a weight."""
    from .decoded import Stored, linear_decoded, takes

    weight = Stored(*stored)
    return linear_decoded(x_TK, bias, weight) if takes(x_TK, weight) else None
