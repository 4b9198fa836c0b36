"""Every spec that a weight may have, and the levels of a format by brute force."""

import pytest
import torch

from dqtk.numerics.codebook import bitmod, log_grid, nf4
from dqtk.spec import (
    Codebook,
    E4M3Group,
    E8M0Group,
    Float,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
    TwoLevel,
)

UNEVEN = Codebook(tables=((-3.0, -0.5, 0.0, 0.25, 0.5, 1.0, 2.0, 2.5),), name="uneven")
FORMATS = [
    *(Int(bits=bits, symmetric=symmetric) for bits in range(2, 9) for symmetric in (True, False)),
    *(Float(exponent=e, mantissa=bits - 1 - e) for bits in range(3, 9) for e in range(1, bits)),
    *(nf4(), bitmod(3), bitmod(4), log_grid(4), UNEVEN),
]
GRANULARITIES = [PerTensor(), PerChannel(), PerGroup(size=8), TwoLevel(size=8), E8M0Group(size=8), E4M3Group(size=8)]


def is_weight(spec):
    try:
        LayerSpec(weight=spec)
    except ValueError:
        return False
    return True


EVERY = [TensorSpec(format=form, granularity=granularity) for form in FORMATS for granularity in GRANULARITIES]
EVERY = [spec for spec in EVERY if is_weight(spec)]


def name_of(spec):
    return str(LayerSpec(weight=spec)).removesuffix(", A16")


@pytest.fixture(params=EVERY, ids=name_of)
def weight_spec(request):
    """Every format at every granularity that takes it."""
    return request.param


def levels_of(form, which=0):
    if isinstance(form, Int):
        top = 2 ** (form.bits - 1) - 1
        return torch.arange(-top, top + 1).double() if form.symmetric else torch.arange(2**form.bits).double()
    if isinstance(form, Codebook):
        return torch.tensor(form.tables[which]).double()
    bias, found = 2 ** (form.exponent - 1) - 1, []
    for field in range(2**form.exponent):
        for mantissa in range(2**form.mantissa):
            found.append(2.0 ** (max(field, 1) - bias) * ((field > 0) + mantissa / 2**form.mantissa))
    if form.signed:
        found = found[: {(4, 3): -1, (5, 2): -4}.get((form.exponent, form.mantissa))]
        found += [-x for x in found]
    return torch.tensor(sorted(set(found)), dtype=torch.float64)


@pytest.fixture
def levels():
    """Function (format, table) -> its levels, ascending, float64: written down again, independently of the code under test."""
    return levels_of


@pytest.fixture
def seeded():
    """Function (shape, seed) -> normal numbers."""

    def draw(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return draw


def draw_from(distribution, count):
    generator = torch.Generator().manual_seed(0)
    if distribution == "gauss":
        return torch.randn(count, generator=generator)
    if distribution == "laplace":
        u = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
        return (-u.sign() * torch.log1p(-2 * u.abs())).float()
    normal, chi = torch.randn(count, generator=generator), torch.zeros(count)
    for _ in range(4):
        chi += torch.randn(count, generator=generator).square()
    return normal / (chi / 4).sqrt()


@pytest.fixture(scope="session")
def sample():
    """Function ("gauss", "laplace" or "t4", count) -> independent draws, always the same."""
    return draw_from
