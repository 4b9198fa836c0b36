"""Scales that are themselves small numbers: powers of two (MX) and E4M3 (NVFP4), one per group of a row.

Groups are rows of a matrix [R, L] here, as in ``affine``. A group's step is what its levels are multiplied with.
"""

import math

import torch
from torch import Tensor

from dqtk.spec import MSE, E4M3Group, E8M0Group, Format, Range

from .affine import rounded, squared_error, top_level
from .floats import e8m0_decode, e8m0_encode

E4M3_MAX = 448.0


def e8m0_scale(x: Tensor, form: Format, granularity: E8M0Group, how: Range) -> Tensor:
    """uint8 [R, 1]: exponents of the groups' steps (OCP MX 1.0, section 6.3; of three for ``MSE``). Groups of zeros get step 1,
    groups with NaN or infinity the code of NaN."""
    x = x.float()
    amax = x.abs().amax(dim=1, keepdim=True)
    top = top_level(form)
    # floor(log2 amax) - floor(log2 top), exactly: frexp, not log2
    floor = torch.frexp(amax)[1] - 1 - math.frexp(top)[1] + 1
    floor = floor.float().clamp(-126, 126)
    if isinstance(how, MSE):
        candidates = [floor + offset for offset in (0, 1, -1)]  # the first of equals, where float32 cannot tell them apart
        errors = torch.cat([squared_error(x, torch.exp2(c), None, form) for c in candidates], dim=1)
        exponent = torch.cat(candidates, dim=1).gather(1, errors.argmin(dim=1, keepdim=True))
    elif granularity.saturate:
        exponent = floor
    else:  # the least power of two under which nothing saturates
        exponent = torch.where(amax > torch.exp2(floor) * top, floor + 1, floor)
    step = torch.where(amax > 0, torch.exp2(exponent), torch.ones_like(amax))
    return e8m0_encode(torch.where(amax.isfinite(), step, amax))


def tensor_scale(amax: Tensor, form: Format) -> Tensor:
    """The float32 scale above E4M3 scales: the largest group's scale becomes 448."""
    scale = amax.float() / (top_level(form) * E4M3_MAX)
    return torch.where(scale <= 1e-30, torch.ones_like(scale), scale)


def e4m3_scale(x: Tensor, above: Tensor, form: Format, how: Range) -> Tensor:
    """float8_e4m3fn [R, 1]: the groups' scales under the float scale ``above`` (broadcast to [R, 1]). Never zero.

    ``MSE`` tries, for every group, every E4M3 number from a third to twice of the plain one (22). All 126 would give the same
    at 4 bits; at 2 bits, and at 3 in groups of 128, an outlier above numbers all alike can want less than a third.
    """
    x = x.float()
    plain = (x.abs().amax(dim=1, keepdim=True) / (top_level(form) * above)).clamp(2.0**-9, E4M3_MAX)
    stored = plain.to(torch.float8_e4m3fn)
    if not isinstance(how, MSE):
        return stored
    best, best_error = stored.float(), squared_error(x, stored.float() * above, None, form)
    center = stored.view(torch.uint8).to(torch.int16)
    for offset in range(-13, 9):  # codes are ordered like their values: eight codes are a factor of two
        code = (center + offset).clamp(1, 126).to(torch.uint8)
        scale = code.view(torch.float8_e4m3fn).float()
        error = squared_error(x, scale * above, None, form)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best.to(torch.float8_e4m3fn)


def round_groups(x_RL: Tensor, form: Format, granularity: E8M0Group | E4M3Group, above: Tensor | None, how: Range) -> Tensor:
    """Groups rounded and decoded again, float32 [R, L]. ``above``: the float scale of E4M3 groups, broadcast to [R, 1]."""
    if isinstance(granularity, E8M0Group):
        return rounded(x_RL, e8m0_decode(e8m0_scale(x_RL, form, granularity, how)), None, form)
    assert above is not None
    return rounded(x_RL, e4m3_scale(x_RL, above, form, how).float() * above, None, form)
