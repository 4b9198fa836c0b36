"""Small floating-point grids: E exponent bits, M mantissa bits, optionally a sign; round, encode, decode.

A code is the bit pattern sign | exponent | mantissa, as in the OCP specifications (OFP8 1.0, MX 1.0). With bias 2^(E-1) - 1:

    exponent field > 0:  2^(field - bias) * (1 + mantissa / 2^M)
    exponent field = 0:  2^(1 - bias) * mantissa / 2^M              subnormal

E4M3 and E5M2 with a sign keep the codes that OFP8 gives to NaN and infinity unused, so their largest values are 448 and 57344. In
every other split all codes are numbers. Rounding is to nearest, ties to even mantissas (up, between powers of two without mantissa
bits), and saturates. Between 2^e and 2^(e+1) the step is 2^(e - M), so rounding is integer rounding with a step of each number's
own (Kuzmin et al. 2022, arXiv 2208.09225, section 3.1).
"""

from functools import cache

import torch
from torch import Tensor

from dqtk.spec import Float

E8M0_BIAS, E8M0_NAN = 127, 255  # of the byte that stores a power of two (OCP MX 1.0, section 5.4.1)
_NUM_SPECIAL = {(4, 3): 1, (5, 2): 4}  # codes at the top of each sign that are no numbers


def bias_of(form: Float) -> int:
    """Exponent bias."""
    return 2 ** (form.exponent - 1) - 1


def largest(form: Float) -> float:
    """The largest value."""
    field, mantissa = divmod(2 ** (form.exponent + form.mantissa) - 1 - _num_special(form), 2**form.mantissa)
    return 2.0 ** (max(field, 1) - bias_of(form)) * (min(field, 1) + mantissa / 2**form.mantissa)


def _num_special(form: Float) -> int:
    return _NUM_SPECIAL.get((form.exponent, form.mantissa), 0) if form.signed else 0


@cache
def grid(form: Float) -> Tensor:
    """float32 [2^bits] on the CPU: the value of every code; NaN for those that are no numbers in OFP8."""
    with torch.inference_mode(False):  # a cached inference tensor would break compiled graphs that are trained later
        return _grid(form)


def _grid(form: Float) -> Tensor:
    codes = torch.arange(2**form.bits, device="cpu")
    fields = codes & (2 ** (form.exponent + form.mantissa) - 1)
    exponent, mantissa = fields >> form.mantissa, (fields & (2**form.mantissa - 1)).double() / 2**form.mantissa
    normal = torch.exp2((exponent - bias_of(form)).double()) * (1 + mantissa)
    values = torch.where(exponent > 0, normal, 2.0 ** (1 - bias_of(form)) * mantissa)
    values[fields >= 2 ** (form.exponent + form.mantissa) - _num_special(form)] = torch.nan
    sign = 1 - 2 * (codes >> (form.exponent + form.mantissa)).double()
    return (values * sign).float()


def step_of(y: Tensor, form: Float) -> Tensor:
    """The distance of neighbours on the grid around each number, float32."""
    _, exponent = torch.frexp(y)  # |y| = m * 2^exponent with m in [0.5, 1); 0 for y = 0
    least = 1 - bias_of(form)
    return torch.exp2((exponent - 1).clamp(min=least).masked_fill(y == 0, least).float() - form.mantissa)


def round_to(y: Tensor, form: Float) -> Tensor:
    """The nearest value of the grid, float32; larger numbers saturate, NaN stays."""
    top = largest(form)
    y = y.float().clamp(-top if form.signed else 0.0, top)
    step = step_of(y, form)
    return (y / step).round() * step


def codes_of(values: Tensor, form: Float) -> Tensor:
    """uint8 codes of values that lie on the grid. Zero of either sign becomes code 0."""
    magnitude = values.abs()
    _, exponent = torch.frexp(magnitude)
    field = (exponent - 1 + bias_of(form)).clamp(min=0)
    field = torch.where(magnitude < 2.0 ** (1 - bias_of(form)), torch.zeros_like(field), field)
    unit = torch.exp2((field.clamp(min=1) - bias_of(form)).float())
    mantissa = (magnitude / unit - (field > 0).float()) * 2**form.mantissa
    codes = (field << form.mantissa) + mantissa.round().to(field.dtype)
    if form.signed:
        codes = codes + ((values < 0).to(codes.dtype) << (form.exponent + form.mantissa))
    return codes.to(torch.uint8)


def values_of(codes: Tensor, form: Float) -> Tensor:
    """float32 values of uint8 codes. Compiles without graph breaks."""
    (values,) = _grid_on(form.exponent, form.mantissa, form.signed, codes.device)
    return values[codes.long()]


def _grid_on(exponent: int, mantissa: int, signed: bool, device: torch.device) -> tuple[Tensor]:
    return (grid(Float(exponent=exponent, mantissa=mantissa, signed=signed)).to(device),)


# A constant of compiled graphs, as ``hadamard._factors`` is. A tuple, because dynamo refuses a bare tensor the second time.
_grid_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def e8m0_encode(scale: Tensor) -> Tensor:
    """uint8 exponents of positive powers of two, from 2^-127 to 2^127; 255 for what is not finite."""
    _, exponent = torch.frexp(scale.float())
    return torch.where(scale.isfinite(), (exponent - 1 + E8M0_BIAS).clamp(0, 254), E8M0_NAN).to(torch.uint8)


def e8m0_decode(code: Tensor) -> Tensor:
    """float32 powers of two; NaN for code 255."""
    return torch.exp2(code.float() - E8M0_BIAS).masked_fill(code == E8M0_NAN, torch.nan)
