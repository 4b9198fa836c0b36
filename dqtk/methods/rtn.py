"""Round to nearest: find each row's range, round, pack. The baseline every other solver must beat on its own objective.

Two-level groups (``spec.TwoLevel``): the float scale of an output channel is set so that its largest group uses the largest integer
group scale; every group then takes the integer scale with the least squared error among all of them. Searching costs 18 roundings
of the weight at 4 bits (42 at 3, 127 at 2) and is exact, because group scales are small integers.
"""

from dataclasses import fields

import torch
from torch import Tensor

from dqtk.numerics.affine import code_range, encode, find_scale
from dqtk.numerics.packing import Packed, count_groups, empty_packed, max_group_scale, pack_codes
from dqtk.spec import Int, PerTensor, TensorSpec, TwoLevel

BLOCK = 2**18  # weights rounded at a time


def rtn(weight: Tensor, spec: TensorSpec) -> Packed:
    """Quantize a weight.

    Args:
        weight: float [N, K]; K divisible by the group size.
        spec: format, granularity and range.
    Returns:
        The stored form; see ``Packed``.
    Raises:
        ValueError: the group size does not divide K.
    """
    num_groups = count_groups(spec, weight.shape[1])
    if isinstance(spec.granularity, PerTensor):
        return _rtn_rows(weight, spec, num_groups)
    # Output channels do not depend on each other; blocks of them bound the temporaries of the range search.
    n, k = weight.shape
    packed, rows = empty_packed(spec, n, k, weight.device), max(1, BLOCK // k)
    for start in range(0, n, rows):
        block = _rtn_rows(weight[start : start + rows], spec, num_groups)
        for field in fields(Packed):
            stored, part = getattr(packed, field.name), getattr(block, field.name)
            if part is not None:
                stored[start : start + rows] = part
    return packed


def _rtn_rows(weight: Tensor, spec: TensorSpec, num_groups: int) -> Packed:
    weight = weight.float()
    if isinstance(spec.granularity, TwoLevel):
        return _two_level(weight, spec, spec.granularity.size)
    n, k = weight.shape
    rows = weight.reshape(1, -1) if isinstance(spec.granularity, PerTensor) else weight.reshape(-1, k // num_groups)
    scale, zero = find_scale(rows, spec.format, spec.range)
    codes = encode(rows, scale, zero, spec.format).view(n, k)
    shape = (1, 1) if isinstance(spec.granularity, PerTensor) else (n, num_groups)
    stored_zero = None if zero is None else zero.view(shape).to(torch.uint8)
    return Packed(qweight=pack_codes(codes, spec), scale=scale.view(shape), zero=stored_zero)


def _two_level(weight: Tensor, spec: TensorSpec, size: int) -> Packed:
    n, k = weight.shape
    form = spec.format
    assert isinstance(form, Int)
    top_code, top_scale = code_range(form)[1], max_group_scale(spec)
    groups = weight.reshape(n, k // size, size)
    group_rows = groups.reshape(-1, size)
    fitted, _ = find_scale(group_rows, form, spec.range)
    # Groups of zeros (or of next to nothing) get scale 1, above their absmax; they must not decide their channel's scale.
    fitted = torch.where(fitted <= group_rows.abs().amax(dim=1, keepdim=True), fitted, torch.zeros_like(fitted))
    scale = fitted.view(n, -1).amax(dim=1, keepdim=True) / top_scale
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    best = torch.full((n, k // size), torch.inf, device=weight.device)
    chosen = torch.ones_like(best)
    for candidate in range(1, top_scale + 1):
        step = (scale * candidate)[..., None]
        error = (torch.clamp((groups / step).round(), -top_code, top_code) * step - groups).square().sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, float(candidate), chosen)
    step = (scale * chosen)[..., None].expand(-1, -1, size).reshape(n, k)
    codes = encode(weight, step, None, form)
    return Packed(qweight=pack_codes(codes, spec), scale=scale, group_scale=chosen.to(torch.uint8))
