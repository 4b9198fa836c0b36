"""The grid of a weight, for every format and granularity, against brute force in float64."""

import pytest
import torch

from dqtk.methods.rtn import rtn
from dqtk.numerics.codebook import nf4
from dqtk.numerics.packing import dequantize
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import MSE, AbsMax, Codebook, Float, Int, PerChannel, PerGroup, PerTensor, TensorSpec, TwoLevel

N, K = 5, 24
ULP = 2.0**-23  # relative distance of float32 numbers


def weight(seeded):
    """Rows and groups of different sizes, an outlier, exact zeros, a row and a group of zeros."""
    w = seeded(N, K) * torch.exp2(seeded(N, K // 8, seed=1)).repeat_interleave(8, 1)
    w[1, 3] = 12.0
    w[2, 4:7] = 0.0
    w[3, 8:16] = 0.0
    w[4] = 0.0
    return w


def spread(per_group):
    """float64 [N, K] of what is kept per group, per row or once."""
    return per_group.double().repeat_interleave(K // per_group.shape[1], 1).expand(N, K)


def points(grid, levels):
    """Every point of the grid for every weight, ascending, float64 [N, K, L]."""
    form = grid.spec.format
    tables = torch.stack([levels(form, which) for which in range(len(getattr(form, "tables", [0])))])
    which = torch.zeros(N, K, dtype=torch.int64) if grid.which is None else spread(grid.which).long()
    zero = torch.zeros(N, K) if grid.zero is None else spread(grid.zero)
    return (tables[which] - zero[..., None]) * spread(grid.step)[..., None]


def distances(values, every):
    """float64 [N, K]: from each value to the nearest point of its grid."""
    return (every - values.double()[..., None]).abs().amin(-1)


def slack(grid, w):
    """float32's own rounding, far below a step."""
    return 8 * ULP * (w.abs().double() + spread(grid.step))


def test_rounding_is_to_the_nearest_of_all_points(weight_spec, seeded, levels):
    w = weight(seeded)
    grid = fit_grid(w, weight_spec)
    every = points(grid, levels)
    y = grid.round(w)
    assert (y.dtype, y.shape) == (torch.float32, w.shape)
    assert (distances(y, every) <= slack(grid, w)).all()  # on the grid
    assert ((y.double() - w).abs() <= distances(w, every) + slack(grid, w)).all()  # and nothing is nearer
    assert not y[w == 0].any()
    assert torch.equal(grid.round(y), y)


def test_what_is_packed_decodes_to_the_same_weight(weight_spec, seeded):
    """Stored codes are the rounded weight, exactly; two-level scales multiply in another order, exact to float32."""
    w = weight(seeded)
    grid = fit_grid(w, weight_spec)
    y = grid.round(w)
    packed = grid.pack(y)
    decoded = dequantize(packed, weight_spec, K)
    if isinstance(weight_spec.granularity, TwoLevel):
        torch.testing.assert_close(decoded, y, rtol=2 * ULP, atol=0)
    else:
        assert torch.equal(decoded, y)
    for name, stored in grid.pack(decoded).tensors().items():  # packing what was decoded changes no byte
        assert torch.equal(stored.view(torch.uint8), packed.tensors()[name].view(torch.uint8)), name
    for name, stored in rtn(w, weight_spec).tensors().items():  # round to nearest is the grid and its rounding, no more
        assert torch.equal(stored.view(torch.uint8), packed.tensors()[name].view(torch.uint8)), name


def test_any_columns_round_as_among_all(weight_spec, seeded):
    """GPTQ rounds some columns at a time, of weights that have changed meanwhile, in any order."""
    w = weight(seeded)
    grid = fit_grid(w, weight_spec)
    w = w * 1.3
    columns = torch.tensor([23, 0, 7, 8, 9, 15, 16, 3])
    assert torch.equal(grid.round(w[:, columns], columns), grid.round(w)[:, columns])
    one = torch.tensor([11])
    assert torch.equal(grid.round(w[:, one], one), grid.round(w)[:, one])


def test_neighbours_enclose_the_weight(weight_spec, seeded, levels):
    w = weight(seeded)
    grid = fit_grid(w, weight_spec)
    on_grid = grid.round(w)
    if isinstance(weight_spec.format, Codebook):
        with pytest.raises(ValueError, match=r"neighbours: format must be Int or Float, got Codebook.*RTN or GPTQ"):
            grid.neighbours(w)
        return
    every = points(grid, levels)
    for given in (w, w * 1.3, on_grid, -w):
        low, high = grid.neighbours(given)
        tiny, v = slack(grid, given), given.double()
        assert (distances(low, every) <= tiny).all()  # both lie on the grid
        assert (distances(high, every) <= tiny).all()
        below, above = ((every - edge.double()[..., None]).abs().argmin(-1) for edge in (low, high))
        inside = (every[..., 0] + tiny < v) & (v < every[..., -1] - tiny)
        assert ((low - tiny <= v) & (v <= high + tiny))[inside].all()  # around the weight
        assert (above - below == 1)[inside].all()  # with nothing in between
        end = torch.where(v < 0, 0, every.shape[-1] - 1)
        beyond = (v < every[..., 0] - tiny) | (v > every[..., -1] + tiny)
        assert ((below == end) & (above == end))[beyond].all()
        nearest = torch.where((given - low).abs() <= (high - given).abs(), low, high)
        assert ((nearest - given).abs() <= (grid.round(given) - given).abs() + tiny).all()


def test_neighbours_of_powers_of_two_and_of_zero_are_adjacent():
    """The step is another one below a power of two than above it, and least around zero."""
    w = torch.tensor([[0.0, -0.0, 4.0, -4.0, 5.0, -5.0, 6.0, -6.0, 0.25, -0.25, 2.0, -2.0, 1.0, -1.0, 9.0, -9.0]])
    grid = fit_grid(w.clamp(-6, 6), TensorSpec(format=Float(exponent=2, mantissa=1), granularity=PerChannel()))
    low, high = grid.neighbours(w)
    assert low.tolist() == [[0, 0, 4, -6, 4, -6, 6, -6, 0, -0.5, 2, -3, 1, -1.5, 6, -6]]
    assert high.tolist() == [[0.5, 0.5, 6, -4, 6, -4, 6, -6, 0.5, 0, 3, -2, 1.5, -1, 6, -6]]
    grid = fit_grid(torch.tensor([[448.0, 0.0]]), TensorSpec(format=Float(), granularity=PerChannel()))
    assert [edge.tolist() for edge in grid.neighbours(torch.zeros(1, 2))] == [[[0, 0]], [[2**-9, 2**-9]]]


def test_the_range_search_never_loses(weight_spec, seeded):
    w = seeded(16, 64) * torch.exp2(seeded(16, 8, seed=1)).repeat_interleave(8, 1)
    search = TensorSpec(format=weight_spec.format, granularity=weight_spec.granularity, range=MSE(steps=6, least=0.5, most=1.2))
    plain, searched = (float((fit_grid(w, spec).round(w).double() - w).square().sum()) for spec in (weight_spec, search))
    if isinstance(weight_spec.granularity, TwoLevel):  # group scales are searched anyway; what they hang on may move a little
        assert searched <= 1.02 * plain
    else:
        assert searched <= plain * (1 + 1e-6)


def test_a_group_influences_no_other(weight_spec, seeded):
    """Only what shares its scale: its row per channel and in two levels; elsewhere nothing, as long as it is not the largest."""
    w = seeded(N, K).clamp(-2, 2)
    w[0, :2] = torch.tensor([-3.0, 3.0])
    before = fit_grid(w, weight_spec).round(w)
    w[2, 8:16] *= 1e-2
    same = fit_grid(w, weight_spec).round(w) == before
    if isinstance(weight_spec.granularity, PerChannel | TwoLevel):
        same[2] = True
    same[2, 8:16] = True
    assert same.all()


@pytest.mark.parametrize("how", [AbsMax(), MSE()], ids=["absmax", "mse"])
def test_some_rows_have_the_grid_of_all(weight_spec, seeded, how):
    """With the absmax of the whole weight, blocks of rows can be fitted on their own."""
    spec = TensorSpec(format=weight_spec.format, granularity=weight_spec.granularity, range=how)
    w = weight(seeded)
    whole, part = fit_grid(w, spec), fit_grid(w[2:4], spec, w.abs().amax())
    if isinstance(spec.granularity, PerTensor):
        assert whole.step.shape == (1, 1)  # one scale, which two rows alone cannot know
        return
    assert torch.equal(whole.step[2:4], part.step)
    assert torch.equal(whole.round(w)[2:4], part.round(w[2:4]))


def test_bfloat16_weights_are_fitted_in_float32(weight_spec, seeded):
    w = weight(seeded).bfloat16()
    half, full = fit_grid(w, weight_spec), fit_grid(w.float(), weight_spec)
    assert half.step.dtype == torch.float32
    assert torch.equal(half.step, full.step)
    assert torch.equal(half.round(w), full.round(w.float()))


def test_group_size_must_divide():
    for form in (Int(bits=4), nf4()):
        with pytest.raises(ValueError, match="group size must divide the 20 inputs, got 8"):
            fit_grid(torch.ones(2, 20), TensorSpec(format=form, granularity=PerGroup(size=8)))
