"""Uniform and FP8 grids: find a scale, encode, decode. Rows of a matrix [R, L] share one scale each.

Integer, symmetric:   x ~ scale * code,            code in -(2^(b-1)-1) .. 2^(b-1)-1
Integer, asymmetric:  x ~ scale * (code - zero),   code in 0 .. 2^b - 1, zero an integer code (zero itself is representable)
FP8 E4M3:             x ~ scale * code,            code a torch.float8_e4m3fn number

Scales are float32; all arithmetic is float32, whatever the input. A row of zeros gets scale 1, so nothing divides by zero.
"""

import torch
from torch import Tensor

from dqtk.spec import MSE, AbsMax, Dynamic, Float, Format, Int, Range

FP8_MAX = 448.0  # largest finite torch.float8_e4m3fn


def code_range(form: Int) -> tuple[int, int]:
    """Least and largest code."""
    top = 2 ** (form.bits - 1) - 1
    return (-top, top) if form.symmetric else (0, 2**form.bits - 1)


def find_scale(x: Tensor, form: Format, how: Range) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero point) of each row.

    Args:
        x: float [R, L]. The range always includes 0.
        form: number format.
        how: ``AbsMax``, ``MSE``, or ``Dynamic`` (as ``AbsMax``).
    Returns:
        scale float32 [R, 1] and zero float32 [R, 1] (integers), the latter ``None`` for symmetric formats.
    """
    x = x.float()
    low, high = x.amin(dim=1, keepdim=True).clamp(max=0), x.amax(dim=1, keepdim=True).clamp(min=0)
    if isinstance(how, AbsMax | Dynamic):
        return scale_of_range(low, high, form)
    assert isinstance(how, MSE)
    best_scale, best_zero = scale_of_range(low, high, form)
    best = _error(x, best_scale, best_zero, form)
    for fraction in torch.linspace(1, how.least, how.steps).tolist()[1:]:
        scale, zero = scale_of_range(low * fraction, high * fraction, form)
        error = _error(x, scale, zero, form)
        better = error < best
        best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def scale_of_range(low: Tensor, high: Tensor, form: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that map [low, high] (low <= 0 <= high) onto the format's codes."""
    absmax = torch.maximum(-low, high)
    if isinstance(form, Float):
        return _nonzero(absmax / FP8_MAX), None
    least, most = code_range(form)
    if form.symmetric:
        return _nonzero(absmax / most), None
    scale = _nonzero((high - low) / (most - least))
    return scale, (-low / scale).round().clamp(least, most)


def _nonzero(scale: Tensor) -> Tensor:
    # Smaller scales than the least normal float32 times 448 would lose the reciprocal; such rows are zero in effect. NaN stays NaN.
    return torch.where(scale <= 1e-30, torch.ones_like(scale), scale)


def _error(x: Tensor, scale: Tensor, zero: Tensor | None, form: Format) -> Tensor:
    return (decode(encode(x, scale, zero, form), scale, zero) - x).square().sum(dim=1, keepdim=True)


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, form: Format) -> Tensor:
    """Nearest codes (ties to even): int8 for symmetric, uint8 for asymmetric integers, float8_e4m3fn for FP8. Saturates."""
    y = x.float() / scale
    if isinstance(form, Float):
        return y.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    least, most = code_range(form)
    y = y.round() if zero is None else y.round() + zero
    return y.clamp(least, most).to(torch.int8 if form.symmetric else torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """float32 values of codes."""
    values = codes.float()
    return (values if zero is None else values - zero) * scale


def dequantized(x: Tensor, form: Format, how: Range) -> Tensor:
    """Round rows to the format and back: what storing them costs. float32, shape of ``x`` [R, L]."""
    scale, zero = find_scale(x, form, how)
    return decode(encode(x, scale, zero, form), scale, zero)
