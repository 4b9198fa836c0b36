"""Tables that codes point into: the known ones, and the nearest entry."""

import math
from functools import cache

import torch
from torch import Tensor

from dqtk.spec import Codebook


@cache
def nf4() -> Codebook:
    """NF4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E): quantiles of a normal distribution, eight per side and 0, in [-1,
    1].

    Probabilities run from ``offset`` = 1 - (1/32 + 1/30) / 2 to 1/2; eight positive values, seven negative ones, and zero.
    """
    offset = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    up = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([down, torch.zeros(1, dtype=torch.float64), up]).sort().values
    return Codebook(tables=(tuple((values / values.abs().max()).float().tolist()),), name="NF4")


def bitmod(bits: int) -> Codebook:
    """BitMoD (Chen et al. 2024, arXiv 2411.11745): the float grid with its second zero spent on one more value, four choices per
    group.

    4 bits: E2M1 with one of 5, -5, 8, -8. 3 bits: 0, 1, 2, 4 of both signs with one of 3, -3, 6, -6.
    Raises ``ValueError`` for other widths.
    """
    if bits not in (3, 4):
        raise ValueError(f"bitmod: bits must be 3 or 4, got {bits}. Use another format.")
    side, extra = ((1.0, 2.0, 4.0), (3.0, 6.0)) if bits == 3 else ((0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), (5.0, 8.0))
    base = [*(-x for x in side), 0.0, *side]
    return Codebook(tables=tuple(tuple(sorted([*base, sign * x])) for x in extra for sign in (1, -1)), name="BitMoD")


def _check_bits(where: str, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"{where}: bits must be from 2 to 8, got {bits}. A table has 4 to 256 values.")


def log_grid(bits: int, base: float = 2.0) -> Codebook:
    """base^-k for k = 0 .. 2^bits - 2, and 0: for inputs in [0, 1] that fall off fast, such as attention probabilities.

    Base 2 is the classic log2 quantizer, whose products are shifts. Raises ``ValueError`` for a base of at most 1.
    """
    _check_bits("log_grid", bits)
    if not base > 1:
        raise ValueError(f"log_grid: base must be above 1, got {base}. The usual base is 2.")
    values = [base**-k for k in range(2**bits - 1)]
    return Codebook(tables=((0.0, *reversed(values)),), name=f"log{base:g}")


def adaptive_log(bits: int) -> Codebook:
    """Sixteen ``log_grid`` tables, from a smallest step of 1/2 to one of 2^-28: a calibrated input takes the base that loses least.

    The idea of AdaLog (Wu et al. 2024, arXiv 2407.12951), which searches the base of a logarithmic quantizer per tensor.
    """
    _check_bits("adaptive_log", bits)
    reach = [28 ** (i / 15) for i in range(16)]
    bases = [2 ** (octaves / (2**bits - 2)) for octaves in reach]
    return Codebook(tables=tuple(log_grid(bits, base).tables[0] for base in bases), name="adaptive log")


def tan_grid(bits: int, alpha: float = 1.2) -> Codebook:
    """arctan(k tan(alpha) / (2^bits - 1)) / alpha: steps that shrink towards 1, where attention probabilities matter most.

    The idea of DopQ-ViT's tangent quantizer (Yang et al. 2024, arXiv 2408.03291): equal steps of tan(alpha x). The larger alpha,
    the finer near 1. Raises ``ValueError`` for alpha outside (0, pi / 2).
    """
    if not 0 < alpha < math.pi / 2:
        raise ValueError(f"tan_grid: alpha must be between 0 and pi / 2, got {alpha}. The usual value is 1.2.")
    top = 2**bits - 1
    return Codebook(tables=(tuple(math.atan(k / top * math.tan(alpha)) / alpha for k in range(top + 1)),), name=f"tan{alpha:g}")


def table(form: Codebook, which: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """float32 [2^bits] of one table, ascending."""
    if torch.compiler.is_compiling():  # a constant of the graph
        return torch.tensor(form.tables[which], dtype=torch.float32, device=device)
    return _table(form.tables[which], torch.device(device))


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a cached inference tensor would break compiled graphs that are trained later
        return torch.tensor(values, dtype=torch.float32, device=device)


def span(form: Codebook, which: int = 0) -> float:
    """The largest magnitude of a table: what the absmax of a group is mapped to."""
    return max(abs(form.tables[which][0]), abs(form.tables[which][-1]))


def nearest(y: Tensor, form: Codebook, which: int = 0) -> Tensor:
    """uint8 codes of the nearest entries (of two equally near ones the lower)."""
    values = table(form, which, y.device)
    middles = (values[1:] + values[:-1]) / 2
    return torch.bucketize(y.float().contiguous(), middles).to(torch.uint8)
