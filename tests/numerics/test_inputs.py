"""Rounded inputs, for every spec that an input may have, against float64 and the integer kernels."""

import pytest
import torch

from dqtk.kernels.int8 import quantize_rows
from dqtk.numerics.affine import top_level
from dqtk.numerics.codebook import log_grid, nf4
from dqtk.numerics.floats import largest
from dqtk.numerics.inputs import round_input
from dqtk.spec import (
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    TensorSpec,
)

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
FORMATS = [
    *(Int(bits=bits, symmetric=symmetric) for bits in (2, 4, 6, 8) for symmetric in (True, False)),
    *(Float(exponent=e, mantissa=m) for e, m in ((4, 3), (5, 2), (2, 3), (3, 2), (2, 1), (1, 2))),
    *(Float(exponent=e, mantissa=m, signed=False) for e, m in ((4, 4), (2, 2), (3, 1))),
    *(nf4(), log_grid(4)),
]
GRANULARITIES = [PerTensor(), PerToken(), PerGroup(size=8), E8M0Group(size=8), E4M3Group(size=8)]
SCALE = 0.21


def is_input(spec):
    try:
        LayerSpec(weight=W8, input=spec)
    except ValueError:
        return False
    return True


def ranged(form, granularity):
    how = {} if isinstance(granularity, PerTensor) else {"range": Dynamic()}
    return TensorSpec(format=form, granularity=granularity, **how)


EVERY = [spec for spec in (ranged(form, granularity) for form in FORMATS for granularity in GRANULARITIES) if is_input(spec)]


def short(spec):
    return str(LayerSpec(weight=W8, input=spec)).partition(", ")[2]


def static(spec):
    """What a static input stores: a scale under which some numbers saturate, and a zero where the format has one."""
    if not isinstance(spec.granularity, PerTensor):
        return {}
    form = spec.format
    scale = torch.tensor([SCALE * 7 / top_level(form) if not isinstance(form, Int) else SCALE * 14 / 2**form.bits])
    if isinstance(form, Int):
        zero = 0 if form.symmetric else -(2 ** (form.bits - 1)) + 1
        return {"scale": scale, "zero": torch.tensor([zero], dtype=torch.int32)}
    return {"scale": scale, "zero": torch.tensor([0.3 / float(scale)])} if not getattr(form, "signed", True) else {"scale": scale}


def inputs(seeded, *shape):
    """Tokens of different sizes, one of zeros."""
    x = seeded(*shape)
    x = x * torch.exp2(2 * seeded(*shape[:-1], 1, seed=1))
    x[..., -1, :] = 0
    return x


def reference(x, spec, levels):
    """float64 [T, K] and the steps [T, K] of each number: the nearest of all levels, under scales found as the spec says."""
    form, granularity = spec.format, spec.granularity
    values, given = levels(form), static(spec)
    size = getattr(granularity, "size", x.shape[1])
    groups = x.unflatten(1, (-1, size))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    zero = torch.zeros(1)
    if isinstance(granularity, PerTensor):
        scale, zero = given["scale"].view(1, 1, 1), given.get("zero", zero)
        if isinstance(form, Int):
            values = torch.arange(-(2 ** (form.bits - 1)), 2 ** (form.bits - 1)).double()
    elif isinstance(granularity, E8M0Group):
        exponent = torch.frexp(groups.abs().amax(-1, keepdim=True))[1] - torch.frexp(torch.tensor(top_level(form)))[1]
        scale = torch.exp2(exponent.float())
    elif isinstance(granularity, E4M3Group):
        above = x.abs().amax(1)[:, None, None] / (top_level(form) * 448)
        above[above == 0] = 1
        plain = groups.abs().amax(-1, keepdim=True) / (top_level(form) * above)
        scale = plain.clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * above
    elif isinstance(form, Int) and not form.symmetric:
        scale = (high - low) / (2**form.bits - 1)
        zero = (-low / scale).nan_to_num(0).round()
    elif not getattr(form, "signed", True):
        scale = (high - low) / largest(form)
        zero = (-low / scale).nan_to_num(0)
    else:
        scale = torch.maximum(-low, high) / top_level(form)
    scale = torch.where(high - low == 0, torch.ones_like(scale), scale) if scale.numel() > 1 else scale
    every = (values - zero.double()[..., None]) * scale.double()[..., None]
    nearest = every.expand(*groups.shape, -1).gather(-1, (every - groups.double()[..., None]).abs().argmin(-1, keepdim=True))
    return nearest[..., 0].flatten(1), (scale * float(values.abs().max())).expand_as(groups).flatten(1)


@pytest.mark.parametrize("spec", EVERY, ids=short)
def test_every_spec_against_float64(spec, seeded, levels):
    """The same number, or one as near: where float32 and float64 fall on two sides of a tie."""
    x = inputs(seeded, 40, 24)
    y = round_input(x, spec, **static(spec))
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    expected, tops = reference(x, spec, levels)
    tolerance = 1e-6 * (tops + x.abs())
    differ = (y - expected).abs() > tolerance
    assert ((y - x).abs() <= (expected - x).abs() + tolerance).all()
    assert differ.float().mean() < 0.01


@pytest.mark.parametrize("spec", EVERY, ids=short)
def test_zeros_stay_zero(spec, seeded):
    """But where an unsigned float's range begins below 0: there 0 lies between two levels like any other number."""
    x = inputs(seeded, 4, 24)
    x[:, ::5] = 0
    given = static(spec)
    if isinstance(spec.format, Float) and not spec.format.signed:
        y = round_input(x.abs(), spec, **given | ({"zero": torch.zeros(1)} if given else {}))
    else:
        y = round_input(x, spec, **given)
    assert not y[:, ::5].any()
    assert not y[-1].any()


@pytest.mark.parametrize("spec", EVERY, ids=short)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(spec, dtype, seeded):
    x = inputs(seeded, 6, 24).to(dtype)
    y = round_input(x, spec, **static(spec))
    assert y.dtype == dtype
    assert torch.equal(y, round_input(x.float(), spec, **static(spec)).to(dtype))


@pytest.mark.parametrize("spec", EVERY, ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_straight_through(spec, dtype, seeded):
    """And the numbers are those of a forward pass without gradients, saturated ones too."""
    x = (inputs(seeded, 6, 24) * 100).to(dtype)
    leaf = x.clone().requires_grad_()
    y = round_input(leaf, spec, **static(spec))
    assert torch.equal(y, round_input(x, spec, **static(spec)))
    y.backward(seeded(6, 24, seed=5).to(dtype))
    assert torch.equal(leaf.grad, seeded(6, 24, seed=5).to(dtype))
    assert not round_input(x, spec, **static(spec)).requires_grad


@pytest.mark.parametrize("spec", EVERY, ids=short)
def test_tokens_do_not_influence_each_other(spec, seeded):
    x = inputs(seeded, 2, 5, 24)
    together = round_input(x, spec, **static(spec), rows=2)
    for b in range(2):
        for t in range(5):
            assert torch.equal(round_input(x[b, t], spec, **static(spec), rows=0), together[b, t])
            assert torch.equal(round_input(x[b, t : t + 1], spec, **static(spec)), together[b, t : t + 1])
    x[0, 1] *= 1e4
    changed = round_input(x, spec, **static(spec), rows=2)
    changed[0, 1] = together[0, 1]
    assert torch.equal(changed, together)


@pytest.mark.parametrize("spec", EVERY, ids=short)
def test_a_sample_of_a_convolution_is_one_token(spec, seeded):
    x = inputs(seeded, 3, 4, 5, 16)
    together = round_input(x, spec, **static(spec))
    for b in range(3):
        assert torch.equal(round_input(x[b : b + 1], spec, **static(spec)), together[b : b + 1])
    if isinstance(spec.granularity, PerToken):
        flat = round_input(x.flatten(1), spec, **static(spec))
        assert torch.equal(together.flatten(1), flat)


@pytest.mark.parametrize("spec", EVERY, ids=short)
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (0, 3, 4, 24)], ids=str)
def test_no_rows(spec, shape):
    for rows in (1, len(shape) - 1):
        y = round_input(torch.zeros(shape, dtype=torch.bfloat16), spec, **static(spec), rows=rows)
        assert (y.shape, y.dtype) == (shape, torch.bfloat16)


@pytest.mark.parametrize("spec", EVERY, ids=short)
def test_memory_layout_does_not_matter(spec, seeded):
    x = inputs(seeded, 6, 16)
    expected = round_input(x, spec, **static(spec))
    for same in (x.T.contiguous().T, torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(round_input(same, spec, **static(spec)), expected)
    one = inputs(seeded, 2, 16, 3, 3).movedim(1, -1)
    assert torch.equal(round_input(one, spec, **static(spec)), round_input(one.contiguous(), spec, **static(spec)))


@pytest.mark.parametrize("spec", EVERY, ids=short)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_not_hidden(spec, wrong, seeded):
    """A diverged model must not look healthy."""
    x = seeded(3, 24)
    clean = round_input(x, spec, **static(spec))
    x[1, 5] = wrong
    y = round_input(x, spec, **static(spec))
    assert not torch.isfinite(y[1, 5])
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mode", ["dynamic", "static", "static-asymmetric"])
def test_eight_bits_are_what_the_integer_kernels_round_to(bits, mode, seeded):
    """Bit for bit, saturated numbers included."""
    x = inputs(seeded, 40, 24)
    if mode == "dynamic":
        spec, given = ranged(Int(bits=8), PerToken()), (None, None)
    else:
        spec = ranged(Int(bits=8, symmetric=mode == "static"), PerTensor())
        given = torch.tensor([0.021]), torch.tensor([0 if mode == "static" else -37], dtype=torch.int32)
    codes, scale = quantize_rows(x, *given)
    expected = (codes.float() - (0 if given[1] is None else given[1])) * scale
    assert torch.equal(round_input(x, spec, *given), expected)


def test_range_beyond_which_inputs_saturate():
    spec = ranged(Float(exponent=2, mantissa=1), PerTensor())
    x = torch.tensor([[-100.0, -3.1, 0.3, 2.9, 100.0]])
    torch.testing.assert_close(round_input(x, spec, torch.tensor([0.5])), torch.tensor([[-3.0, -3.0, 0.25, 3.0, 3.0]]))
    spec = ranged(Float(exponent=2, mantissa=2, signed=False), PerTensor())  # levels 0, .25, .5 ... 7
    found = round_input(torch.tensor([[-9.0, -1.0, -0.4, 0.1, 9.0]]), spec, torch.tensor([1.0]), torch.tensor([1.0]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0, -0.5, 0.0, 6.0]]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_static_integers_have_a_code_more_below_zero(bits):
    """As stored inputs are defined: codes from -2^(b-1), with a zero point of 0 when symmetric."""
    x = torch.linspace(-1000, 1000, 11)[None]
    for zero in (0, 1):
        spec = ranged(Int(bits=bits, symmetric=zero == 0), PerTensor())
        y = round_input(x, spec, torch.tensor([1.0]), torch.tensor([zero], dtype=torch.int32))
        assert (y.min(), y.max()) == (-(2 ** (bits - 1)) - zero, 2 ** (bits - 1) - 1 - zero)


def test_finer_scales_lose_less(seeded):
    x = seeded(64, 64) * torch.exp2(2 * seeded(64, 8, seed=3)).repeat_interleave(8, 1)
    form = Float(exponent=2, mantissa=1)
    token, group, nvfp4 = (
        (round_input(x, ranged(form, granularity)) - x).square().sum()
        for granularity in (PerToken(), PerGroup(size=8), E4M3Group(size=8))
    )
    assert group < 0.7 * token
    assert nvfp4 < 1.2 * group
