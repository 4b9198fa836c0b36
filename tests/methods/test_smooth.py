"""Smoothing: the formula, what is searched, and that the layer's function stays."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dqtk.kernels import from_matrix, to_matrix
from dqtk.methods.smooth import ALPHAS, smoothing
from dqtk.methods.solve import _smooth_error, solve
from dqtk.numerics.inputs import round_input
from dqtk.numerics.packing import Packed, dequantize
from dqtk.spec import (
    GPTQ,
    Dynamic,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerToken,
    Smooth,
    TensorSpec,
)

W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16))
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
A4 = TensorSpec(format=Int(bits=4), granularity=PerToken(), range=Dynamic())
BF16 = 2.0**-8  # the multiplier is stored in bfloat16; one rounding is half of this


def never(multiplier):
    raise AssertionError("a given alpha is not searched")


def multiplier_of(weights, inputs, transform, channels=None):
    return smoothing(weights, inputs, transform, channels or weights[0].shape[1], never)


def output_error(weight, x, spec, found):
    """Of the layer that the solution describes, against the plain product, in float64."""
    stored = dequantize(Packed(**{name: found.tensors.get(name) for name in Packed.__slots__}), spec.weight, weight.shape[1])
    z = x if "smooth" not in found.tensors else x * found.tensors["smooth"]
    z = z if spec.input is None else round_input(z, spec.input)
    return float((z.double() @ stored.double().T - x.double() @ weight.double().T).square().sum())


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_equals_smoothquants_formula(alpha, seeded, stats_of):
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), divided by its geometric mean; over all weights that share the input."""
    x, weights = seeded(50, 12) * torch.exp2(seeded(12, seed=1)), [seeded(5, 12, seed=2), 3 * seeded(4, 12, seed=3)]
    found = multiplier_of(weights, stats_of(x), Smooth(alpha=alpha)).double()
    s = x.double().abs().amax(0) ** alpha / torch.cat(weights).double().abs().amax(0) ** (1 - alpha)
    torch.testing.assert_close(1 / found, s / s.log().mean().exp(), rtol=BF16, atol=0)
    assert float(found.log().mean()) == pytest.approx(0, abs=BF16)
    assert torch.equal(found, found.bfloat16().double())


def test_the_ends_of_alpha_make_one_side_flat(seeded, stats_of):
    x, weight = seeded(50, 12) * torch.exp2(seeded(12, seed=1)), seeded(5, 12, seed=2)
    one, zero = (multiplier_of([weight], stats_of(x), Smooth(alpha=alpha)) for alpha in (1.0, 0.0))
    inputs, weights = (x * one).abs().amax(0), (weight / zero).abs().amax(0)
    torch.testing.assert_close(inputs, inputs[:1].expand(12), rtol=2 * BF16, atol=0)
    torch.testing.assert_close(weights, weights[:1].expand(12), rtol=2 * BF16, atol=0)
    half = multiplier_of([weight], stats_of(x), Smooth(alpha=0.5))
    ratio = (x * half).abs().amax(0) / (weight / half).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[:1].expand(12), rtol=4 * BF16, atol=0)


def test_empty_channels_stay_finite(seeded, stats_of):
    x, weight = seeded(50, 12), seeded(5, 12, seed=2)
    x[:, 3], weight[:, 7] = 0, 0
    for alpha in (0.0, 0.5, 1.0):
        found = multiplier_of([weight], stats_of(x), Smooth(alpha=alpha))
        assert torch.isfinite(found).all()
        assert (found > 0).all()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_shifts_are_powers_of_two_within_eight(alpha, seeded, stats_of):
    x = seeded(50, 64) * torch.exp2(4 * seeded(64, seed=1))
    found = multiplier_of([seeded(5, 64, seed=2)], stats_of(x), Smooth(alpha=alpha, power_of_two=True))
    assert torch.equal(found.log2(), found.log2().round())
    assert float(found.max() / found.min()) == 8
    largest = x.abs().amax(0)
    assert found[largest.argmax()] == found.min()  # large inputs become smaller
    assert found[largest.argmin()] == found.max()


def test_shifts_cost_a_float_weight_nothing(seeded, stats_of):
    """They go into its exponents: a weight of E4M3 numbers is stored without loss."""
    x = seeded(50, 8) * torch.tensor([1.0, 1, 1, 2, 4, 8, 8, 1])
    transform = Smooth(alpha=1.0, power_of_two=True)
    shifts = multiplier_of([torch.ones(1, 8)], stats_of(x), transform)  # with alpha 1 they do not depend on the weight
    assert shifts.unique().numel() > 2
    weight = torch.tensor([[448.0, 1.125, -15.0, 28.0, 1.25, 352.0, -7.5, 0.0625]]) * shifts
    spec = LayerSpec(weight=TensorSpec(format=Float(), granularity=PerChannel()), transforms=(transform,))
    (found,) = solve([weight], spec, stats_of(x))
    stored = dequantize(Packed(qweight=found.tensors["qweight"], scale=found.tensors["scale"]), spec.weight, 8)
    assert torch.equal(stored * found.tensors["smooth"], weight)


@pytest.mark.parametrize("given", [A8, A4], ids=["A8", "A4"])
def test_a_searched_alpha_is_the_best_of_all_and_of_none(given, seeded, stats_of):
    spec = LayerSpec(weight=W4, input=given, transforms=(Smooth(),))
    weights = [seeded(16, 32, seed=1), seeded(8, 32, seed=2)]
    for x in (seeded(200, 32), seeded(200, 32) * torch.exp2(seeded(32, seed=3))):
        inputs, rest = stats_of(x), LayerSpec(weight=W4, input=given)

        def error(multiplier, inputs=inputs, rest=rest):
            return _smooth_error(weights, inputs, rest, multiplier, 32)

        best = smoothing(weights, inputs, Smooth(), 32, error)
        every = [error(torch.ones(32)), *(error(multiplier_of(weights, inputs, Smooth(alpha=a))) for a in ALPHAS)]
        assert error(best) == min(every)
        found = solve(weights, spec, inputs)
        assert all(torch.equal(solution.tensors["smooth"], best) for solution in found)
        total = sum(output_error(w, x, spec, s) for w, s in zip(weights, found, strict=True))
        assert total == pytest.approx(min(every), rel=1e-3)


@pytest.mark.parametrize("given", [A8, A4], ids=["A8", "A4"])
@pytest.mark.parametrize("alpha", [None, 0.5])
def test_an_outlier_channel_is_what_it_is_for(alpha, given, seeded, stats_of):
    """One channel of 40 times the size of the others, as in large models; on inputs that were not seen."""
    weight, rows = seeded(32, 32, seed=1), seeded(400, 32)
    rows[:, 5] *= 40
    seen, unseen = rows.split(200)
    plain, smooth = (
        output_error(weight, unseen, spec, solve([weight], spec, stats_of(seen))[0])
        for spec in (LayerSpec(weight=W4, input=given), LayerSpec(weight=W4, input=given, transforms=(Smooth(alpha=alpha),)))
    )
    assert smooth < (0.95 if given == A8 else 0.5) * plain


def test_no_smoothing_is_found_where_it_does_harm(seeded, stats_of):
    """16-bit inputs whose sizes do not tell anything about the weights: nothing can be gained on the side of the input."""
    weight = torch.ones(8, 32)  # every weight is on the grid as it is
    rows = seeded(100, 32) * torch.exp2(seeded(32, seed=1))
    spec = LayerSpec(weight=W4, transforms=(Smooth(),))
    (found,) = solve([weight], spec, stats_of(rows))
    assert torch.equal(found.tensors["smooth"], torch.ones(32))


def test_the_search_knows_later_rotations(seeded, stats_of):
    """A rotation spreads the outlier anyway: another alpha is best with it than without."""
    weight, rows = seeded(32, 32, seed=1), seeded(200, 32)
    rows[:, 5] *= 40
    inputs = stats_of(rows)
    found = []
    for after in ((), (Hadamard(),)):
        spec = LayerSpec(weight=W4, input=A4, transforms=(Smooth(), *after))
        (solution,) = solve([weight], spec, inputs)
        found.append(solution.tensors["smooth"])
        rest = LayerSpec(weight=W4, input=A4, transforms=after)
        every = [_smooth_error([weight], inputs, rest, multiplier_of([weight], inputs, Smooth(alpha=a)), 32) for a in ALPHAS]
        assert _smooth_error([weight], inputs, rest, found[-1], 32) <= min(every)
    assert not torch.allclose(*found)


def test_the_function_is_kept(seeded, stats_of):
    """(x m)(W / m)^T in float64."""
    x, weight = seeded(50, 12).double(), seeded(5, 12, seed=2).double()
    for transform in (Smooth(alpha=0.7), Smooth(alpha=0.7, power_of_two=True)):
        m = multiplier_of([weight.float()], stats_of(x), transform).double()
        assert m.unique().numel() > 1
        torch.testing.assert_close((x * m) @ (weight / m).T, x @ weight.T, rtol=1e-12, atol=1e-12)


def test_convolutions_have_one_factor_per_channel(seeded, stats_of):
    """Taps of a window share it; the least and largest of all of them count."""
    weight, x = seeded(6, 4, 3, 2, seed=1), seeded(2, 4, 9, 8) * torch.tensor([1.0, 8.0, 0.1, 3.0]).view(1, 4, 1, 1)
    windows = F.unfold(x, (3, 2)).transpose(1, 2).reshape(-1, 4, 6).transpose(1, 2).flatten(1)  # channel innermost
    matrix = to_matrix(weight)
    found = multiplier_of([matrix], stats_of(windows), Smooth(alpha=0.5), channels=4)
    assert found.shape == (4,)
    s = (windows.view(-1, 6, 4).abs().amax((0, 1)) / matrix.view(6, 6, 4).abs().amax((0, 1))).double().sqrt()
    torch.testing.assert_close(1 / found.double(), s / s.log().mean().exp(), rtol=BF16, atol=0)
    moved = from_matrix(matrix / found.repeat(6), (3, 2))
    expected = F.conv2d(x.double(), weight.double())
    torch.testing.assert_close(F.conv2d((x * found.view(1, 4, 1, 1)).double(), moved.double()), expected, rtol=1e-5, atol=1e-5)
    spec = LayerSpec(weight=W8, transforms=(Smooth(alpha=0.5),))
    (solution,) = solve([matrix], spec, stats_of(windows), channels=4)
    torch.testing.assert_close(solution.tensors["smooth"].float(), found)
    stored = dequantize(Packed(qweight=solution.tensors["qweight"], scale=solution.tensors["scale"]), W8, 24)
    assert (stored * found.repeat(6) - matrix).norm() < 0.04 * matrix.norm()


def test_a_search_by_rounding_to_nearest_is_checked_behind_the_solver(seeded, stats_of):
    """A huge token of equal channels, cancelled by a weight's rows: learned weights keep that, unequal rounding does not."""
    x = seeded(300, 64) * torch.exp2(seeded(64, seed=1))
    x[::30] = 500.0
    weight = seeded(96, 64, seed=2)
    weight -= weight.mean(1, keepdim=True)
    plain = LayerSpec(weight=W4, input=TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic()), solver=GPTQ())
    smooth = replace(plain, transforms=(Smooth(),))
    inputs = stats_of(x)
    searched = smoothing([weight], inputs, Smooth(), 64, lambda m: _smooth_error([weight], inputs, plain, m, 64))
    assert not torch.equal(searched, torch.ones(64))  # rounding to nearest would smooth
    without, found = (output_error(weight, x, spec, solve([weight], spec, inputs)[0]) for spec in (plain, smooth))
    forced = Smooth(alpha=0.5)
    harmed = output_error(weight, x, plain, solve([weight], replace(plain, transforms=(forced,)), inputs)[0])
    assert found <= without * 1.01 < harmed
