"""Rounding an input as its spec says, decoded again: what every kernel must compute with, and what ``emulated`` layers run."""

import torch
from torch import Tensor

from dqtk.spec import STATIC, AbsMax, E4M3Group, E8M0Group, Int, PerGroup, TensorSpec

from .affine import find_scale, rounded
from .group_scales import round_groups, tensor_scale

# Made once: compilers would trace what checks a spec's fields.
_ABSMAX, _WITH_ZERO = AbsMax(), {bits: Int(bits=bits, symmetric=False) for bits in range(2, 9)}


def round_input(x: Tensor, spec: TensorSpec, scale: Tensor | None = None, zero: Tensor | None = None, rows: int = 1) -> Tensor:
    """``x`` [..., K] on the spec's grid, in its dtype; gradients pass straight through.

    Args:
        x: float; the last dimension holds the channels.
        spec: format and granularity. Dynamic ranges are found here, per token or per group of a token.
        scale, zero: of a static input [1], as stored (``storage``), or of every row [R, 1].
        rows: leading dimensions that tell tokens apart, from the left; 1 makes a sample of a convolution one token. Linear: all
            but the last.
    """
    with torch.no_grad():
        y = _rounded(x.float(), spec, scale, zero, rows).to(x.dtype)
    return y + (x - x.detach()) if x.requires_grad else y  # plus 0: x + (y - x) would leave the grid in half precision


def _rounded(x: Tensor, spec: TensorSpec, scale: Tensor | None, zero: Tensor | None, rows: int) -> Tensor:
    form, granularity = spec.format, spec.granularity
    if x.numel() == 0:
        return x
    if isinstance(granularity, STATIC):
        assert scale is not None
        if isinstance(form, Int):  # as the integer kernels: 2^b codes and a zero point, symmetric or not
            middle = 2 ** (form.bits - 1)
            zero = x.new_full((1,), middle) if zero is None else zero.float() + middle
            form = _WITH_ZERO[form.bits]
        y = rounded(x, scale, zero, form)
        return y.masked_fill(~x.isfinite(), torch.nan)  # a diverged model must not look healthy
    if isinstance(granularity, PerGroup | E8M0Group | E4M3Group):
        groups = x.unflatten(-1, (-1, granularity.size))
        flat = groups.reshape(-1, granularity.size)
        if isinstance(granularity, PerGroup):
            found, shift = find_scale(flat, form, spec.range)
            return rounded(flat, found, shift, form).view(groups.shape).flatten(-2)
        above = None
        if isinstance(granularity, E4M3Group):
            per_token = tensor_scale(x.flatten(rows).abs().amax(-1), form).flatten()
            above = per_token.repeat_interleave(flat.shape[0] // per_token.numel())[:, None]
        return round_groups(flat, form, granularity, above, _ABSMAX).view(groups.shape).flatten(-2)
    tokens = x.reshape(x.shape[:rows].numel(), -1)
    found, shift = find_scale(tokens, form, spec.range)
    return rounded(tokens, found, shift, form).view(x.shape)
