"""Scales that are small numbers themselves, against searches in float64."""

import math

import pytest
import torch

from dqtk.numerics.affine import top_level
from dqtk.numerics.group_scales import e4m3_scale, e8m0_scale, round_groups, tensor_scale
from dqtk.spec import MSE, AbsMax, Dynamic, E4M3Group, E8M0Group, Float, Int

E2M1, E3M2, E2M3, E4M3, E5M2 = (Float(exponent=e, mantissa=m) for e, m in ((2, 1), (3, 2), (2, 3), (4, 3), (5, 2)))
EMAX = {E2M1: 2, E3M2: 4, E2M3: 2, E4M3: 8, E5M2: 15}  # OCP MX 1.0, table 1
FORMS = [*EMAX, Int(bits=4), Int(bits=8), Float(exponent=3, mantissa=0)]
FLOOR, CEIL, BEST = (
    (E8M0Group(size=16), AbsMax()),
    (E8M0Group(size=16, saturate=False), AbsMax()),
    (E8M0Group(size=16), MSE()),
)


def groups(seeded, size=16):
    """Groups of very different sizes, some with their largest on or beside a power of two, where the exponent changes."""
    x = seeded(300, size) * torch.exp2(8 * seeded(300, 1, seed=1))
    edge = torch.exp2(torch.arange(-10.0, 10)[:, None])
    on = torch.cat([edge * top for top in (1, 6, 7, 0.75, 448 / 256, 127)])
    on = torch.cat([on, on.nextafter(torch.tensor(0.0)), on.nextafter(torch.tensor(torch.inf))])
    return torch.cat([x, torch.cat([on, on * seeded(len(on), size - 1, seed=2).clamp(-1, 1)], dim=1)])


def exponent(x, form, how):
    code = e8m0_scale(x, form, *how)
    assert code.dtype == torch.uint8
    assert code.shape == (len(x), 1)
    return code[:, 0].double() - 127


def error(x, step, levels):
    """float64 squared error of each row [R, L] with these steps [R, 1], by trying every level."""
    values = levels * step.double()[..., None]
    return (x.double()[..., None] - values).abs().amin(-1).square().sum(1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_exponent_that_mx_prescribes(form, seeded):
    """floor(log2 absmax) - emax."""
    x = groups(seeded)
    emax = EMAX.get(form, math.floor(math.log2(top_level(form))))
    floor = torch.tensor([math.frexp(a)[1] - 1 for a in x.abs().amax(1).tolist()], dtype=torch.float64)  # exactly floor(log2)
    assert torch.equal(exponent(x, form, FLOOR), floor - emax)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_least_exponent_under_which_nothing_saturates(form, seeded):
    x = groups(seeded)
    found, amax = exponent(x, form, CEIL), x.abs().amax(1).double()
    assert (amax <= torch.exp2(found) * top_level(form)).all()
    assert (amax > torch.exp2(found - 1) * top_level(form)).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_best_of_three_exponents(form, seeded, levels):
    x = groups(seeded)
    floor = exponent(x, form, FLOOR)
    errors = torch.stack([error(x, torch.exp2(floor + offset)[:, None], levels(form)) for offset in (-1, 0, 1)])
    found = error(x, torch.exp2(exponent(x, form, BEST))[:, None], levels(form))
    torch.testing.assert_close(found, errors.amin(0), rtol=1e-5, atol=0)
    assert ((exponent(x, form, BEST) - floor).abs() <= 1).all()
    assert (exponent(x, form, BEST) != floor).any()


@pytest.mark.parametrize("how", [FLOOR, CEIL, BEST], ids=["floor", "ceil", "best"])
def test_groups_of_zeros_tiny_and_huge_values(how):
    x = torch.stack([torch.full((16,), v) for v in (0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e30, 2e38)])
    code = e8m0_scale(x, E2M1, *how)
    assert code[:2].tolist() == [[127], [127]]  # step 1
    assert code.max() < 255
    y = round_groups(x, E2M1, how[0], None, how[1])
    assert torch.isfinite(y).all()
    assert not y[:2].any()
    torch.testing.assert_close(y[3:], x[3:], rtol=0.25, atol=0)


def test_a_search_that_float32_cannot_make_keeps_the_prescribed_exponent():
    """Squares of such numbers are infinite, or zero."""
    for value in (3e38, 1e25, 1e-25):
        x = value * torch.linspace(-1, 1, 16)[None]
        assert torch.equal(e8m0_scale(x, E2M1, *BEST), e8m0_scale(x, E2M1, *FLOOR))


@pytest.mark.parametrize("how", [FLOOR, CEIL, BEST], ids=["floor", "ceil", "best"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_not_hidden(how, wrong, seeded):
    x = seeded(3, 16)
    clean = round_groups(x, E2M1, how[0], None, how[1])
    x[1, 5] = wrong
    y = round_groups(x, E2M1, how[0], None, how[1])
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    above = tensor_scale(x.abs().amax(1, keepdim=True), E2M1)  # a token's own, as inputs have it
    y = round_groups(x, E2M1, E4M3Group(size=16), above, how[1])
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_largest_group_has_the_largest_e4m3_scale(form, seeded):
    x = seeded(40, 16)
    above = tensor_scale(x.abs().amax().view(1, 1), form)
    assert above.dtype == torch.float32
    scale = e4m3_scale(x, above, form, AbsMax())
    assert (scale.dtype, scale.shape) == (torch.float8_e4m3fn, (40, 1))
    assert scale[x.abs().amax(1).argmax()].float() == 448
    plain = x.abs().amax(1, keepdim=True) / (top_level(form) * above)
    assert torch.equal(scale.float(), plain.clamp(2**-9, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("how", [AbsMax(), Dynamic(), MSE()], ids=["absmax", "dynamic", "mse"])
def test_e4m3_scales_are_never_zero(how):
    """Nor above 448, whatever the float scale above them."""
    x = torch.stack([torch.full((16,), v) for v in (0.0, 1e-45, 1e-20, 1.0, 1e20)])
    for above in (1e-25, 1.0, 1e25):
        scale = e4m3_scale(x, torch.tensor([[above]]), E2M1, how).float()
        assert (scale >= 2**-9).all()
        assert (scale <= 448).all()
    assert tensor_scale(torch.zeros(1, 1), E2M1) == 1
    assert torch.equal(round_groups(torch.zeros(2, 16), E2M1, E4M3Group(), torch.ones(1, 1), how), torch.zeros(2, 16))


EVERY_E4M3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("distribution", ["gauss", "laplace", "t4"])
@pytest.mark.parametrize(
    ("form", "size"),
    [
        (E2M1, 8),
        (E2M1, 16),
        (E2M1, 32),
        (Int(bits=4), 8),
        (Int(bits=4), 32),
        (Float(exponent=3, mantissa=0), 16),
        (Int(bits=3), 16),
    ],
    ids=str,
)
def test_the_sweep_is_as_good_as_all_126_scales(distribution, form, size, sample, levels):
    x = sample(distribution, 512 * size).view(-1, size)
    above = tensor_scale(x.abs().amax().view(1, 1), form)
    found = error(x, e4m3_scale(x, above, form, MSE()).float() * above, levels(form))
    best = torch.stack([error(x, (scale * above).expand(len(x), 1), levels(form)) for scale in EVERY_E4M3]).amin(0)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)
    plain = error(x, e4m3_scale(x, above, form, AbsMax()).float() * above, levels(form))
    assert found.sum() < 0.95 * plain.sum()


def test_small_groups_beside_a_huge_one_get_their_best_scale_too(seeded, levels):
    """Their scales are among E4M3's subnormals, where codes are no longer evenly spaced in the logarithm."""
    x = seeded(512, 16) * torch.logspace(0, -5, 512)[:, None]
    above = tensor_scale(x.abs().amax().view(1, 1), E2M1)
    found = error(x, e4m3_scale(x, above, E2M1, MSE()).float() * above, levels(E2M1))
    best = torch.stack([error(x, (scale * above).expand(512, 1), levels(E2M1)) for scale in EVERY_E4M3]).amin(0)
    torch.testing.assert_close(found, best, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("form", "size"), [(E2M1, 16), (E2M1, 128), (Int(bits=4), 128), (Int(bits=3), 64)], ids=str)
def test_outliers_that_are_better_cut_off_are(form, size, levels):
    """One number above many equal ones: the worst case for a scale that hangs on the absmax."""
    x = torch.ones(40, size)
    x[:, 0] = torch.linspace(1.5, 30, 40)
    above = torch.tensor([[0.05]])
    scale = e4m3_scale(x, above, form, MSE()).float()
    best = torch.stack([error(x, (other * above).expand(40, 1), levels(form)) for other in EVERY_E4M3]).amin(0)
    torch.testing.assert_close(error(x, scale * above, levels(form)), best, rtol=1e-5, atol=1e-6)
    if form == Int(bits=3):
        assert (scale < 0.6 * e4m3_scale(x, above, form, AbsMax()).float()).any()
