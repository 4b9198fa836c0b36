"""One rule for every format: x ~ scale * (level - zero), where a code names a level. Rows of a matrix [R, L] share one scale each.

Int, symmetric:     level = code, -(2^(b-1)-1) .. 2^(b-1)-1, no zero
Int, asymmetric:    level = code, 0 .. 2^b - 1; zero is one of them (so the number 0 is representable)
Float, signed:      level = the value of a bit pattern, see ``floats``; no zero
Float, unsigned:    the same from 0 up; zero is any number, so that a range may begin below 0 (0 is then a level only by chance)
Codebook:           level = an entry of a table, see ``codebook``; no zero. ``which`` of its tables is an argument

Scales are float32; all arithmetic is float32, whatever the input. A row of zeros gets scale 1, so nothing divides by zero.
"""

import torch
from torch import Tensor

from dqtk.spec import MSE, AbsMax, Codebook, Dynamic, Float, Format, Int, Range

from .codebook import nearest, span, table
from .floats import codes_of, largest, round_to, values_of

TORCH_TYPES = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}  # signed formats whose codes torch has a type for


def code_range(form: Int) -> tuple[int, int]:
    """Least and largest code."""
    top = 2 ** (form.bits - 1) - 1
    return (-top, top) if form.symmetric else (0, 2**form.bits - 1)


def torch_type(form: Format) -> torch.dtype | None:
    """The torch dtype whose numbers are the codes themselves, or None."""
    return TORCH_TYPES.get((form.exponent, form.mantissa)) if isinstance(form, Float) and form.signed else None


def top_level(form: Format, which: int = 0) -> float:
    """The level that the largest magnitude of a row is mapped to."""
    if isinstance(form, Int):
        return float(code_range(form)[1])
    if isinstance(form, Float):
        return largest(form)
    assert isinstance(form, Codebook)
    return span(form, which)


def find_scale(x: Tensor, form: Format, how: Range, which: int = 0) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero) of each row.

    Args:
        x: float [R, L]. The range always includes 0.
        form: number format.
        how: ``AbsMax``, ``MSE``, or ``Dynamic`` (as ``AbsMax``).
        which: table of a codebook.
    Returns:
        scale float32 [R, 1] and zero float32 [R, 1], the latter ``None`` for formats without one.
    """
    x = x.float()
    low, high = x.amin(dim=1, keepdim=True).clamp(max=0), x.amax(dim=1, keepdim=True).clamp(min=0)
    if isinstance(how, AbsMax | Dynamic):
        return scale_of_range(low, high, form, which)
    assert isinstance(how, MSE)
    best_scale, best_zero = scale_of_range(low, high, form, which)
    best = squared_error(x, best_scale, best_zero, form, which)
    for fraction in torch.linspace(how.most, how.least, how.steps).tolist():
        if fraction == 1:
            continue
        scale, zero = scale_of_range(low * fraction, high * fraction, form, which)
        error = squared_error(x, scale, zero, form, which)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def scale_of_range(low: Tensor, high: Tensor, form: Format, which: int = 0) -> tuple[Tensor, Tensor | None]:
    """Scale and zero that map [low, high] (low <= 0 <= high) onto the format's levels."""
    if isinstance(form, Int) and not form.symmetric:
        least, most = code_range(form)
        scale = _nonzero((high - low) / (most - least))
        return scale, (-low / scale).round().clamp(least, most)
    if isinstance(form, Float) and not form.signed:
        scale = _nonzero((high - low) / largest(form))
        return scale, -low / scale
    return _nonzero(torch.maximum(-low, high) / top_level(form, which)), None


def _nonzero(scale: Tensor) -> Tensor:
    # Smaller scales than the least normal float32 times 448 would lose the reciprocal; such rows are zero in effect. NaN stays NaN.
    return torch.where(scale <= 1e-30, torch.ones_like(scale), scale)


def squared_error(x: Tensor, scale: Tensor, zero: Tensor | None, form: Format, which: int = 0) -> Tensor:
    """float32 [R, 1]: what rounding costs each row."""
    return (rounded(x, scale, zero, form, which) - x).square().sum(dim=1, keepdim=True)


def nearest_level(y: Tensor, form: Format, which: int = 0) -> Tensor:
    """The nearest levels (ties to even codes), saturating; float32. ``y`` is x / scale, with the zero added where there is one."""
    if isinstance(form, Int):
        return y.round().clamp(*code_range(form))
    if isinstance(form, Float):
        return round_to(y, form)
    assert isinstance(form, Codebook)
    return table(form, which, y.device)[nearest(y, form, which).long()]


def rounded(x: Tensor, scale: Tensor, zero: Tensor | None, form: Format, which: int = 0) -> Tensor:
    """``x`` as its codes would decode: float32."""
    y = x.float() / scale
    if zero is None:
        return nearest_level(y, form, which) * scale
    y = y.round() + zero if isinstance(form, Int) else y + zero
    return (nearest_level(y, form, which) - zero) * scale


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, form: Format, which: int = 0) -> Tensor:
    """Codes of the nearest levels: int8 for symmetric integers, a torch float8 where there is one, uint8 otherwise."""
    y = x.float() / scale
    if isinstance(form, Int):
        y = y.round() if zero is None else y.round() + zero
        return y.clamp(*code_range(form)).to(torch.int8 if form.symmetric else torch.uint8)
    if isinstance(form, Float):
        level, kind = round_to(y if zero is None else y + zero, form), torch_type(form)
        return codes_of(level, form) if kind is None else level.to(kind)
    assert isinstance(form, Codebook)
    return nearest(y, form, which)


def levels(codes: Tensor, form: Format, which: int = 0) -> Tensor:
    """float32 levels of codes."""
    if isinstance(form, Codebook):
        return table(form, which, codes.device)[codes.long()]
    return values_of(codes, form) if isinstance(form, Float) and codes.dtype == torch.uint8 else codes.float()


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, form: Format, which: int = 0) -> Tensor:
    """float32 values of codes."""
    values = levels(codes, form, which)
    return (values if zero is None else values - zero) * scale


def dequantized(x: Tensor, form: Format, how: Range) -> Tensor:
    """Round rows to the format and back: what storing them costs. float32, shape of ``x`` [R, L]."""
    scale, zero = find_scale(x, form, how)
    return decode(encode(x, scale, zero, form), scale, zero, form)
