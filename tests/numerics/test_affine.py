"""Grids against brute force in float64."""

import pytest
import torch

from dqtk.numerics.affine import (
    code_range,
    decode,
    dequantized,
    encode,
    find_scale,
    nearest_level,
    rounded,
    scale_of_range,
    squared_error,
    top_level,
    torch_type,
)
from dqtk.numerics.codebook import bitmod, log_grid, nf4
from dqtk.numerics.floats import largest
from dqtk.spec import MSE, AbsMax, Dynamic, Float, Int

FORMS = [Int(bits=bits, symmetric=symmetric) for bits in range(2, 9) for symmetric in (True, False)]
FLOATS = [Float(exponent=e, mantissa=m) for e, m in ((4, 3), (5, 2), (2, 5), (3, 2), (2, 1), (1, 2), (3, 0))]
UNSIGNED = [Float(exponent=e, mantissa=m, signed=False) for e, m in ((4, 4), (4, 3), (2, 2), (3, 1))]
TABLES = [nf4(), log_grid(4), log_grid(3, 1.5)]
EVERY = [*FORMS, *FLOATS, *UNSIGNED, *TABLES]


def short(form):
    return getattr(form, "name", None) or str(form).replace("mantissa=", "").replace("exponent=", "")


def rows(n=6, length=40, seed=0):
    x = torch.randn(n, length, generator=torch.Generator().manual_seed(seed))
    x[0] *= 100
    x[1] += 3
    x[2] = -x[2].abs() * 1e-3
    return x


def nearest_on_grid(x, scale, zero, values):
    """The distance to the nearest of all representable numbers, by trying every one, float64."""
    offset = 0 if zero is None else zero.double()
    grid = (values - offset) * scale.double()
    distance = (x.double()[..., None] - grid[:, None, :]).abs()
    return distance.amin(-1)


@pytest.mark.parametrize("form", EVERY, ids=short)
@pytest.mark.parametrize("how", [AbsMax(), MSE()], ids=["absmax", "mse"])
def test_codes_are_the_nearest_of_all(form, how, levels):
    x, values = rows(), levels(form)
    scale, zero = find_scale(x, form, how)
    assert (zero is None) == (getattr(form, "symmetric", getattr(form, "signed", True)))
    codes = encode(x, scale, zero, form)
    assert codes.dtype == (torch.int8 if getattr(form, "symmetric", False) else torch_type(form) or torch.uint8)
    assert torch.isin(decode(codes, torch.ones(1, 1), None, form).double(), values).all()
    error = (decode(codes, scale, zero, form).double() - x.double()).abs()
    best = nearest_on_grid(x, scale, zero, values)
    assert (error <= best + 1e-6 * scale * float(values.abs().max())).all()
    assert torch.equal(rounded(x, scale, zero, form), decode(codes, scale, zero, form))
    torch.testing.assert_close(
        squared_error(x, scale, zero, form).double(), error.square().sum(1, keepdim=True), rtol=1e-4, atol=1e-12
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_integer_codes_stay_in_their_range(form):
    least, most = code_range(form)
    for how in (AbsMax(), MSE()):
        codes = encode(rows(), *find_scale(rows(), form, how), form)
        assert least <= codes.min()
        assert codes.max() <= most


@pytest.mark.parametrize("form", UNSIGNED, ids=short)
def test_unsigned_floats_begin_at_the_least_value(form):
    """After SiLU and GELU: -0.28 is a level, and so is the largest value; fine steps are near the lower end."""
    x = torch.linspace(-0.28, 3.0, 300)[None]
    scale, zero = find_scale(x, form, AbsMax())
    torch.testing.assert_close(scale, torch.tensor([[3.28 / largest(form)]]))
    torch.testing.assert_close(zero * scale, torch.tensor([[0.28]]))
    y = rounded(x, scale, zero, form)
    torch.testing.assert_close(y[0, [0, -1]], x[0, [0, -1]], rtol=1e-6, atol=1e-6)
    error = (y - x).abs()[0]
    assert error[:150].mean() < 0.7 * error[150:].mean()
    positive = torch.linspace(0, 3.0, 300)[None]
    assert not find_scale(positive, form, AbsMax())[1].any()


def test_the_largest_level_is_what_the_absmax_is_mapped_to():
    tops = {Int(bits=4): 7, Int(bits=8): 127, Float(): 448, Float(exponent=2, mantissa=1): 6, nf4(): 1, bitmod(4): 6}
    for form, top in tops.items():
        assert top_level(form) == top
        scale, _ = find_scale(torch.tensor([[1.0, -14.0]]), form, AbsMax())
        torch.testing.assert_close(scale, torch.tensor([[14.0 / top]]))
    assert top_level(bitmod(4), 2) == 8
    assert find_scale(torch.tensor([[1.0, -14.0]]), bitmod(4), AbsMax(), 2)[0] == 14 / 8


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_absmax_covers_the_row(form):
    """Nothing is clipped, so no error exceeds half a step (a whole one at the ends of an asymmetric range)."""
    x = rows()
    scale, zero = find_scale(x, form, AbsMax())
    error = (decode(encode(x, scale, zero, form), scale, zero, form) - x).abs()
    assert (error <= scale * (0.5 if form.symmetric else 1.0) * 1.001).all()


def test_absmax_scale_is_the_textbook_one():
    x = torch.tensor([[-2.0, 1.0, 0.5], [0.0, 1.0, 3.0]])
    scale, zero = find_scale(x, Int(bits=4), AbsMax())
    assert zero is None
    torch.testing.assert_close(scale, torch.tensor([[2 / 7], [3 / 7]]))
    scale, zero = find_scale(x, Int(bits=4, symmetric=False), AbsMax())
    torch.testing.assert_close(scale, torch.tensor([[3 / 15], [3 / 15]]))
    assert zero.tolist() == [[10.0], [0.0]]


@pytest.mark.parametrize("form", EVERY, ids=short)
@pytest.mark.parametrize("most", [1.0, 1.3, 2.0])
def test_mse_search_is_never_worse_than_absmax(form, most):
    x = rows(32, 64, seed=3)
    x[5, 0] = 50.0  # one outlier
    errors = [(dequantized(x, form, how) - x).double().square().sum(1) for how in (AbsMax(), MSE(most=most))]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()


@pytest.mark.parametrize("form", [Int(bits=4), Int(bits=3, symmetric=False), *FLOATS[2:5], UNSIGNED[2], nf4()], ids=short)
def test_mse_search_is_over_the_multiples_that_it_names(form):
    """The best of absmax and of every multiple, tried one by one."""
    x = rows(12, 64, seed=4)
    how = MSE(steps=9, least=0.5, most=1.7)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    tried = [squared_error(x, *scale_of_range(low * f, high * f, form), form) for f in (1.0, *torch.linspace(0.5, 1.7, 9).tolist())]
    found = squared_error(x, *find_scale(x, form, how), form)
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-5, atol=0)


def test_ranges_above_the_absmax_pay_for_floats():
    """Gaussian groups of 16: their error repeats with every factor of two. Integers gain little: half a step beyond the absmax."""
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    gains = []
    for form in (Float(exponent=2, mantissa=1), Int(bits=4)):
        below, above = ((dequantized(x, form, MSE(steps=s, most=m)) - x).square().mean() for s, m in ((16, 1.0), (36, 1.8)))
        gains.append(float(above / below))
    assert gains[0] < 0.85 < 0.93 < gains[1] < 1


def test_mse_search_gains_where_it_should():
    """Gaussian rows at 4 bits: clipping lowers the error by 5 % and more."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    absmax, mse = ((dequantized(x, Int(bits=4), how) - x).square().mean() for how in (AbsMax(), MSE()))
    assert mse < 0.95 * absmax


def test_finer_search_is_at_least_as_good():
    """The fractions of 33 steps contain those of 17."""
    x = rows(16, 64, seed=5)
    coarse, fine = ((dequantized(x, Int(bits=3), MSE(steps=steps)) - x).square().sum() for steps in (17, 33))
    assert fine <= coarse * (1 + 1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_zero_is_representable_with_a_zero_point(bits):
    """Padding, masks and ReLU outputs must stay exactly zero, also when the row itself has only one sign."""
    form = Int(bits=bits, symmetric=False)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(bits)) + torch.linspace(-3, 3, 64)[:, None]
    for how in (AbsMax(), MSE()):
        scale, zero = find_scale(x, form, how)
        assert torch.equal(zero, zero.round())
        assert zero.min() >= 0
        assert zero.max() <= 2**bits - 1
        assert torch.equal(decode(encode(torch.zeros(64, 3), scale, zero, form), scale, zero, form), torch.zeros(64, 3))


@pytest.mark.parametrize("form", EVERY, ids=short)
@pytest.mark.parametrize("how", [AbsMax(), MSE(), Dynamic()], ids=["absmax", "mse", "dynamic"])
def test_rows_of_zeros(form, how):
    x = torch.zeros(3, 16)
    scale, _ = find_scale(x, form, how)
    assert torch.equal(scale, torch.ones(3, 1))
    assert torch.equal(dequantized(x, form, how), x)


@pytest.mark.parametrize("form", [Int(bits=8), Int(bits=8, symmetric=False), *FLOATS[:3], nf4()], ids=short)
def test_tiny_and_huge_rows(form):
    x = torch.tensor([[1e-38, -1e-38, 0.0], [3e38, -3e38, 1.0]])
    result = dequantized(x, form, AbsMax())
    assert torch.isfinite(result[0]).all()
    assert result[0].abs().max() <= 2e-38
    if getattr(form, "symmetric", True):
        torch.testing.assert_close(result[1], x[1], rtol=1e-2, atol=3e36)


@pytest.mark.parametrize("form", EVERY, ids=short)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_not_hidden(form, wrong):
    x = torch.tensor([[1.0, wrong, 0.5], [1.0, 2.0, 0.5]])
    for how in (AbsMax(), MSE(), Dynamic()):
        scale, zero = find_scale(x, form, how)
        assert scale.isfinite().tolist() == [[False], [True]]
        y = rounded(x, scale, zero, form)
        assert not torch.isfinite(y[0]).any()
        assert torch.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [Int(bits=4), Int(bits=4, symmetric=False), *FLOATS, *UNSIGNED, nf4()], ids=short)
def test_half_precision_input_is_computed_in_float32(dtype, form):
    x = rows()[2:].to(dtype)
    for how in (AbsMax(), MSE()):
        half, full = find_scale(x, form, how), find_scale(x.float(), form, how)
        assert half[0].dtype == torch.float32
        assert torch.equal(half[0], full[0])
        a, b = encode(x, *half, form), encode(x.float(), *full, form)
        assert torch.equal(a.float(), b.float())


def test_ties_go_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert encode(x, torch.ones(1, 1), None, Int(bits=4)).tolist() == [[0, 2, 2, 0, -2, -2]]
    assert encode(x, torch.ones(1, 1), torch.full((1, 1), 5.0), Int(bits=4, symmetric=False)).tolist() == [[5, 7, 7, 5, 3, 3]]
    e2m1 = Float(exponent=2, mantissa=1)
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest_level(x, e2m1).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert nearest_level(-x, e2m1).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_integers_saturate():
    x = torch.tensor([[-100.0, 100.0, float("inf"), -float("inf")]])
    one, zero = torch.ones(1, 1), torch.full((1, 1), 8.0)
    assert encode(x, one, None, Int(bits=4)).tolist() == [[-7, 7, 7, -7]]
    assert encode(x, one, zero, Int(bits=4, symmetric=False)).tolist() == [[0, 15, 15, 0]]


def test_fp8_codes_are_torch_float8():
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 10
    one = torch.ones(4, 1)
    assert torch.equal(encode(x, one, None, Float()).view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()].float().view(1, -1)
    assert torch.equal(encode(every, one[:1], None, Float()).float(), every)


def test_fp8_saturates_instead_of_becoming_nan():
    x = torch.tensor([[449.0, 1e9, -1e9, float("inf")]])
    assert encode(x, torch.ones(1, 1), None, Float()).float().tolist() == [[448, 448, -448, 448]]


def test_fp8_relative_error():
    """Three mantissa bits: at most 1 / 16 for anything within 2^-9 of the largest."""
    x = torch.rand(8, 128, generator=torch.Generator().manual_seed(0)) + 0.01
    error = (dequantized(x, Float(), AbsMax()) - x).abs() / x
    assert error.max() <= 1 / 16 + 1e-6


def test_scale_of_range_maps_the_ends_to_the_ends():
    low, high = torch.tensor([[-1.0]]), torch.tensor([[3.0]])
    scale, zero = scale_of_range(low, high, Int(bits=8, symmetric=False))
    assert encode(torch.tensor([[-1.0, 0.0, 3.0]]), scale, zero, Int(bits=8, symmetric=False)).tolist() == [[0, 64, 255]]
    scale, zero = scale_of_range(low, high, Int(bits=8))
    assert zero is None
    assert encode(torch.tensor([[-3.0, 3.0]]), scale, None, Int(bits=8)).tolist() == [[-127, 127]]


def test_error_falls_with_every_bit():
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    families = [[Int(bits=b, symmetric=symmetric) for b in range(2, 9)] for symmetric in (True, False)]
    families += [[Float(exponent=2, mantissa=m, signed=signed) for m in range(1, 6)] for signed in (True, False)]
    families += [[log_grid(b, 4 ** (1 / 2 ** (b - 2))) for b in range(2, 7)]]
    for forms in families:
        positive = x.abs() if getattr(forms[0], "name", "").startswith("log") else x
        errors = [(dequantized(positive, form, AbsMax()) - positive).square().mean() for form in forms]
        assert errors == sorted(errors, reverse=True)


def test_non_contiguous_rows():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).T
    for form in EVERY:
        assert torch.equal(dequantized(x, form, MSE()), dequantized(x.contiguous(), form, MSE()))
