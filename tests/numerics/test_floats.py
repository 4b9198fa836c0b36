"""Small floats: OCP's tables, torch's own float8, and every split against brute force."""

import pytest
import torch

from dqtk.methods.rtn import rtn
from dqtk.numerics.affine import encode
from dqtk.numerics.floats import (
    bias_of,
    codes_of,
    e8m0_decode,
    e8m0_encode,
    grid,
    largest,
    round_to,
    step_of,
    values_of,
)
from dqtk.numerics.packing import dequantize
from dqtk.spec import MSE, AbsMax, E4M3Group, E8M0Group, Float, Int, PerChannel, PerGroup, PerTensor, TensorSpec

SPLITS = [
    Float(exponent=e, mantissa=bits - signed - e, signed=signed)
    for signed in (True, False)
    for bits in range(3, 9)
    for e in range(1, min(7, bits - signed) + 1)
]
TORCH = {Float(exponent=4, mantissa=3): torch.float8_e4m3fn, Float(exponent=5, mantissa=2): torch.float8_e5m2}
E2M1, E3M2, E2M3 = (Float(exponent=e, mantissa=m) for e, m in ((2, 1), (3, 2), (2, 3)))
# The non-negative values by code, OCP MX 1.0 tables 3 to 5.
OCP = {
    E2M1: [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    E3M2: [
        *(0, 0.0625, 0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.625, 0.75, 0.875, 1, 1.25, 1.5, 1.75),
        *(2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28),
    ],
    E2M3: [
        *(0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875),
        *(2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5),
    ],
}


def short(form):
    return f"{'' if form.signed else 'U'}E{form.exponent}M{form.mantissa}"


@pytest.mark.parametrize("form", OCP, ids=short)
def test_values_are_those_of_ocp(form):
    half = torch.tensor(OCP[form], dtype=torch.float32)
    assert torch.equal(grid(form), torch.cat([half, -half]))
    assert largest(form) == OCP[form][-1]


@pytest.mark.parametrize("form", TORCH, ids=short)
def test_values_are_those_of_torch(form):
    """All 256 codes; infinity and NaN are no numbers here."""
    theirs = torch.arange(256, dtype=torch.uint8).view(TORCH[form]).float()
    theirs[theirs.isinf()] = torch.nan
    assert torch.equal(grid(form).nan_to_num(-1), theirs.nan_to_num(-1))
    assert largest(form) == {4: 448, 5: 57344}[form.exponent]


def ties(form):
    values = grid(form)[~grid(form).isnan()].double().unique()
    return ((values[1:] + values[:-1]) / 2).float()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.02, 1.0, 50.0, 1e4, 1e6])
@pytest.mark.parametrize("form", TORCH, ids=short)
def test_rounding_is_torchs_bit_for_bit(form, scale, seeded):
    x = seeded(20000) * scale
    expected = x.clamp(-largest(form), largest(form)).to(TORCH[form])
    assert torch.equal(round_to(x, form), expected.float())
    codes = encode(x[None], torch.ones(1, 1), None, form)[0]
    assert codes.dtype == TORCH[form]
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("form", TORCH, ids=short)
def test_ties_subnormals_and_ends_are_torchs(form):
    top, least = largest(form), 2.0 ** (1 - bias_of(form) - form.mantissa)
    fine = torch.linspace(-8 * least, 8 * least, 257)  # every multiple of 1/16 of the least subnormal
    x = torch.cat([ties(form), fine, torch.tensor([0.0, -0.0, top, -top, 1e-40, -1e-40])])
    for nudged in (x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(-torch.inf))):
        expected = nudged.clamp(-top, top).to(TORCH[form])
        assert torch.equal(encode(nudged[None], torch.ones(1, 1), None, form)[0].view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("form", SPLITS, ids=short)
def test_too_large_saturates_and_nan_stays(form):
    top = largest(form)
    y = round_to(torch.tensor([top * 1.01, 1e38, torch.inf, -1e38, -torch.inf, torch.nan]), form)
    assert y[:5].tolist() == [top, top, top, -top if form.signed else 0.0, -top if form.signed else 0.0]
    assert y[5].isnan()
    if form in TORCH:
        assert encode(torch.tensor([[torch.nan]]), torch.ones(1, 1), None, form).float().isnan().all()


@pytest.mark.parametrize("form", SPLITS, ids=short)
def test_codes_are_ordered_like_their_values(form, levels):
    half = grid(form)[: 2 ** (form.exponent + form.mantissa)]
    numbers = half[~half.isnan()]
    assert numbers[0] == 0
    assert (numbers.diff() > 0).all()
    assert numbers[-1] == largest(form)
    assert half[len(numbers) :].isnan().all()  # what is no number is at the top
    assert len(half) - len(numbers) == {(4, 3): 1, (5, 2): 4}.get((form.exponent, form.mantissa), 0) * form.signed
    if form.signed:
        assert torch.equal(grid(form)[len(half) :][: len(numbers)], -numbers)
    assert torch.equal(grid(form)[~grid(form).isnan()].double().unique(), levels(form))
    assert len(grid(form)) == 2**form.bits


@pytest.mark.parametrize("form", SPLITS, ids=short)
def test_codes_round_trip(form):
    every = torch.arange(2**form.bits, dtype=torch.uint8)
    every = every[~grid(form).isnan()]
    values = values_of(every, form)
    assert torch.equal(values, grid(form)[every.long()])
    codes = codes_of(values, form)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, every.masked_fill(values == 0, 0))  # zero of either sign becomes code 0
    assert torch.equal(round_to(values, form), values)


@pytest.mark.parametrize("form", SPLITS, ids=short)
def test_rounding_is_to_the_nearest_of_all(form, levels, seeded):
    values = levels(form)
    top = largest(form)
    y = torch.cat([seeded(400) * torch.logspace(-9, 2, 400, base=2) * top, torch.linspace(-1.1 * top, 1.1 * top, 501), ties(form)])
    expected = values[(y.double()[:, None] - values).abs().argmin(1)]
    got = round_to(y, form).double()
    assert torch.equal((got - y).abs(), (expected - y).abs())
    assert torch.isin(got, values).all()
    at_half = round_to(ties(form), form)
    codes = codes_of(at_half.abs(), form).long()
    if form.mantissa:  # to even
        assert (codes % 2 == 0).all()
    else:  # the larger power of two; zero rather than the least one
        assert torch.equal(at_half.abs(), torch.where(codes > 1, ties(form).abs() * 4 / 3, 0))


@pytest.mark.parametrize("form", SPLITS, ids=short)
def test_steps_are_the_distances_of_neighbours(form, levels):
    values = levels(form)
    values = values[values >= 0]
    inside = (values[1:] * 0.4 + values[:-1] * 0.6).float()
    for y in (values[:-1].float(), inside, -inside):
        assert torch.equal(step_of(y, form).double(), values.diff())


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("how", [AbsMax(), MSE()], ids=["absmax", "mse"])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(), PerGroup(size=16), E8M0Group(size=16), E4M3Group(size=16)], ids=str
)
def test_one_exponent_bit_is_the_symmetric_integer(bits, granularity, how, seeded):
    """E1M2 times 2 is INT4, E1M3 times 4 is INT5, and so on: the same weights, bit for bit."""
    as_float, as_int = Float(exponent=1, mantissa=bits - 2), Int(bits=bits)
    assert torch.equal(grid(as_float).unique() * 2 ** (bits - 3), torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)).float())
    w = seeded(6, 64)
    a, b = (
        dequantize(rtn(w, spec), spec, 64)
        for spec in (TensorSpec(format=form, granularity=granularity, range=how) for form in (as_float, as_int))
    )
    assert torch.equal(a, b)


def test_powers_of_two_are_torchs_e8m0():
    codes = torch.arange(255, dtype=torch.uint8)
    values = e8m0_decode(codes)
    assert torch.equal(values, codes.view(torch.float8_e8m0fnu).float())
    assert torch.equal(values.double(), torch.ldexp(torch.ones(255, dtype=torch.float64), codes.double() - 127))
    assert torch.equal(e8m0_encode(values), codes)


def test_what_is_not_finite_has_the_e8m0_code_of_nan():
    codes = e8m0_encode(torch.tensor([torch.nan, torch.inf, 1.0]))
    assert codes.tolist() == [255, 255, 127]
    assert e8m0_decode(codes).isnan().tolist() == [True, True, False]


def test_grids_live_on_the_cpu_whatever_the_default_device():
    """A grid made while a model was built on the meta device must not be kept from then on."""
    form = Float(exponent=3, mantissa=1)
    grid.cache_clear()
    with torch.device("meta"):
        assert largest(form) == 24
        assert values_of(torch.zeros(2, dtype=torch.uint8, device="meta"), form).is_meta
    assert values_of(torch.tensor([1], dtype=torch.uint8), form).tolist() == [0.125]


def test_a_grid_first_used_in_inference_mode_can_be_trained_with():
    grid.cache_clear()
    with torch.inference_mode():
        grid(E2M1)
    assert not grid(E2M1).is_inference()
