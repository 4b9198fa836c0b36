"""Grids against brute force in float64."""

import pytest
import torch

from dqtk.numerics.affine import FP8_MAX, code_range, decode, dequantized, encode, find_scale, scale_of_range
from dqtk.spec import MSE, AbsMax, Dynamic, Float, Int

FORMS = [Int(bits=bits, symmetric=symmetric) for bits in range(2, 9) for symmetric in (True, False)]


def rows(n=6, length=40, seed=0):
    x = torch.randn(n, length, generator=torch.Generator().manual_seed(seed))
    x[0] *= 100
    x[1] += 3
    x[2] = -x[2].abs() * 1e-3
    return x


def nearest_on_grid(x, scale, zero, form):
    """The nearest of all representable numbers, by trying every one, float64."""
    least, most = code_range(form)
    codes = torch.arange(least, most + 1, dtype=torch.float64)
    offset = 0 if zero is None else zero.double()
    grid = (codes - offset) * scale.double()
    distance = (x.double()[..., None] - grid[:, None, :]).abs()
    return distance.amin(-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("how", [AbsMax(), MSE()], ids=["absmax", "mse"])
def test_codes_are_the_nearest_of_all(form, how):
    x = rows()
    scale, zero = find_scale(x, form, how)
    codes = encode(x, scale, zero, form)
    assert codes.dtype == (torch.int8 if form.symmetric else torch.uint8)
    least, most = code_range(form)
    assert codes.min() >= least
    assert codes.max() <= most
    error = (decode(codes, scale, zero).double() - x.double()).abs()
    best = nearest_on_grid(x, scale, zero, form)
    assert (error <= best + 1e-6 * scale * (most - least)).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_absmax_covers_the_row(form):
    """Nothing is clipped, so no error exceeds half a step (a whole one at the ends of an asymmetric range)."""
    x = rows()
    scale, zero = find_scale(x, form, AbsMax())
    error = (decode(encode(x, scale, zero, form), scale, zero) - x).abs()
    assert (error <= scale * (0.5 if form.symmetric else 1.0) * 1.001).all()


def test_absmax_scale_is_the_textbook_one():
    x = torch.tensor([[-2.0, 1.0, 0.5], [0.0, 1.0, 3.0]])
    scale, zero = find_scale(x, Int(bits=4), AbsMax())
    assert zero is None
    torch.testing.assert_close(scale, torch.tensor([[2 / 7], [3 / 7]]))
    scale, zero = find_scale(x, Int(bits=4, symmetric=False), AbsMax())
    torch.testing.assert_close(scale, torch.tensor([[3 / 15], [3 / 15]]))
    assert zero.tolist() == [[10.0], [0.0]]


@pytest.mark.parametrize("form", [*FORMS, Float()], ids=str)
def test_mse_search_is_never_worse_than_absmax(form):
    x = rows(32, 64, seed=3)
    x[5, 0] = 50.0  # one outlier
    errors = [(dequantized(x, form, how) - x).double().square().sum(1) for how in (AbsMax(), MSE())]
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()


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
        assert torch.equal(decode(encode(torch.zeros(64, 3), scale, zero, form), scale, zero), torch.zeros(64, 3))


@pytest.mark.parametrize("form", [*FORMS, Float()], ids=str)
@pytest.mark.parametrize("how", [AbsMax(), MSE(), Dynamic()], ids=["absmax", "mse", "dynamic"])
def test_rows_of_zeros(form, how):
    x = torch.zeros(3, 16)
    scale, _ = find_scale(x, form, how)
    assert torch.equal(scale, torch.ones(3, 1))
    assert torch.equal(dequantized(x, form, how), x)


@pytest.mark.parametrize("form", [Int(bits=8), Int(bits=8, symmetric=False), Float()], ids=str)
def test_tiny_and_huge_rows(form):
    x = torch.tensor([[1e-38, -1e-38, 0.0], [3e38, -3e38, 1.0]])
    result = dequantized(x, form, AbsMax())
    assert torch.isfinite(result[0]).all()
    assert result[0].abs().max() <= 2e-38
    if isinstance(form, Float) or form.symmetric:
        torch.testing.assert_close(result[1], x[1], rtol=1e-2, atol=3e36)


def test_nan_is_not_hidden():
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    scale, _ = find_scale(x, Int(bits=8), AbsMax())
    assert scale.isnan().tolist() == [[True], [False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [Int(bits=4), Int(bits=4, symmetric=False), Float()], ids=str)
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
    assert encode(x, torch.ones(1, 1), None, Float()).float().tolist() == [[FP8_MAX, FP8_MAX, -FP8_MAX, FP8_MAX]]


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
    for symmetric in (True, False):
        errors = [(dequantized(x, Int(bits=b, symmetric=symmetric), AbsMax()) - x).square().mean() for b in range(2, 9)]
        assert errors == sorted(errors, reverse=True)


def test_non_contiguous_rows():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).T
    for form in (Int(bits=4), Int(bits=4, symmetric=False), Float()):
        assert torch.equal(dequantized(x, form, MSE()), dequantized(x.contiguous(), form, MSE()))
