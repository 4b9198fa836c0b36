"""The contract of every paired image score: two float batches [B, 3, H, W] in [0, 1] of one shape, one value per image out.

``as_pair`` checks it in one place, so that every score refuses the same things with the same words: 0-255 floats, [-1, 1]
tensors and single images without a batch axis are the usual slips, and each would silently give a wrong number rather than an
error.
"""

import torch
from torch import Tensor


def as_pair(where: str, a: Tensor, b: Tensor, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Both batches, checked, in ``dtype`` (default: float32, or float64 where either is float64).

    ``a`` and ``b`` are floating tensors [B, 3, H, W] in [0, 1]; half precision is widened, since its rounding (bf16 near 1:
    2^-9) would be read as image error. Raises ``ValueError`` for another rank, channel count, dtype or range, for NaN, and for
    unequal shapes.
    """
    for name, x in (("first", a), ("second", b)):
        if x.ndim != 4 or x.shape[1] != 3 or x.numel() == 0:
            raise ValueError(
                f"{where}: the {name} batch must be [B, 3, H, W] and not empty, got {list(x.shape)}. Add a batch axis."
            )
        if not x.is_floating_point():
            raise ValueError(f"{where}: the {name} batch must be floating point in [0, 1], got {x.dtype}. Divide uint8 by 255.")
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{where}: the {name} batch must be in [0, 1], got [{low:.4g}, {high:.4g}]. Rescale it.")
    if a.shape != b.shape:
        raise ValueError(
            f"{where}: both batches must be of one shape, got {list(a.shape)} and {list(b.shape)}. Compare images of the same size."
        )
    if dtype is None:
        dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(dtype), b.to(device=a.device, dtype=dtype)
