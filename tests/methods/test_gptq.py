"""GPTQ against a naive one in float64, its promises on every format, and inputs that break inverses."""

from itertools import pairwise

import pytest
import torch

from dqtk.methods.descent import descended, output_error, ridge
from dqtk.methods.gptq import Factor, _sweep, gptq
from dqtk.methods.rtn import rtn
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.numerics.packing import dequantize
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import (
    GPTQ,
    MSE,
    E4M3Group,
    E8M0Group,
    Float,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
    TwoLevel,
)

E2M1 = Float(exponent=2, mantissa=1)
SPECS = {
    "int4 group": TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8)),
    "int4 two-level": TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=8)),
    "fp4": TensorSpec(format=E2M1, granularity=PerGroup(size=8), range=MSE(most=1.3)),
    "nvfp4": TensorSpec(format=E2M1, granularity=E4M3Group(size=8)),
    "nf4": TensorSpec(format=nf4(), granularity=PerGroup(size=8)),
}
MORE = SPECS | {
    "int3 asym": TensorSpec(format=Int(bits=3, symmetric=False), granularity=PerGroup(size=8), range=MSE()),
    "int4 tensor": TensorSpec(format=Int(bits=4), granularity=PerTensor()),
    "int4 channel": TensorSpec(format=Int(bits=4), granularity=PerChannel()),
    "int8": TensorSpec(format=Int(bits=8), granularity=PerChannel()),
    "fp8": TensorSpec(format=Float(), granularity=PerChannel()),
    "mxfp4": TensorSpec(format=E2M1, granularity=E8M0Group(size=8)),
    "bitmod": TensorSpec(format=bitmod(4), granularity=PerGroup(size=8)),
}


def naive(weight, grid, gram, solver):
    """Equation 2 and 3 of the paper in float64: the inverse of what is left, one column after the other; no Cholesky, no blocks."""
    w, h = weight.double().clone(), gram.double().clone()
    h.diagonal().add_(solver.damping * h.diagonal().mean())
    k = len(h)
    order = gram.diagonal().argsort(descending=True, stable=True).tolist() if solver.act_order else list(range(k))
    values = torch.empty_like(w)
    while order:
        inverse = torch.linalg.inv(h[order][:, order])
        j, later = order[0], order[1:]
        values[:, j : j + 1] = grid.round(w[:, j : j + 1].float(), torch.tensor([j])).double()
        error = (w[:, j : j + 1] - values[:, j : j + 1]) / inverse[0, 0]
        w[:, later] -= error * inverse[:1, 1:]
        order = later
    return values


def decoded(weight, spec, inputs, solver=None):
    return dequantize(gptq(weight, spec, inputs, solver or GPTQ()), spec, weight.shape[1])


def nearest(weight, spec):
    return dequantize(rtn(weight, spec), spec, weight.shape[1])


def on_grid(values, spec, weight):
    grid = fit_grid(weight, spec)
    return torch.allclose(grid.round(values), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "large first"])
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_naive_form(name, act_order, seeded, correlated):
    """Over the border of the blocks of 128 columns. A column in the middle between two points may go either way in float32, and
    takes what follows with it: rows where that happens are few, and as good."""
    spec, solver, k = SPECS[name], GPTQ(sweeps=0, act_order=act_order), 136
    weight, x = seeded(12, k, seed=5), correlated(400, k)
    gram = (x.T @ x).double() / len(x)
    grid = fit_grid(weight, spec)
    expected = naive(weight, grid, gram, solver)
    got = _sweep(weight, grid, Factor.of(gram, solver)).double()
    equal = torch.isclose(got, expected, rtol=1e-5, atol=1e-6).all(dim=1)
    assert equal.sum() >= 10
    errors, wanted = (output_error(weight, v, gram) for v in (got, expected))
    torch.testing.assert_close(errors, wanted, rtol=0.05, atol=0)
    assert not torch.allclose(got, grid.round(weight).double(), atol=1e-3)


@pytest.mark.parametrize("name", MORE)
def test_no_row_is_worse_than_rounded_to_nearest(name, seeded, correlated, stats_of):
    spec, weight = MORE[name], seeded(24, 64, seed=1)
    for solver in (GPTQ(), GPTQ(sweeps=0, act_order=False), GPTQ(damping=1.0, sweeps=0)):
        for rows in (correlated(200, 64), seeded(200, 64)):
            inputs = stats_of(rows)
            best, plain = (
                output_error(weight, v, inputs.gram) for v in (decoded(weight, spec, inputs, solver), nearest(weight, spec))
            )
            assert (best <= plain * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", MORE)
def test_correlated_inputs_gain(name, seeded, correlated, stats_of):
    """On inputs that were not seen, from the same source, not only on those of the statistics."""
    spec, weight = MORE[name], seeded(16, 64, seed=1)
    seen, unseen = correlated(1200, 64).split(600)
    errors = [
        float(((values - weight) @ unseen.T).square().sum())
        for values in (
            decoded(weight, spec, stats_of(seen)),
            decoded(weight, spec, stats_of(seen), GPTQ(sweeps=0)),
            nearest(weight, spec),
        )
    ]
    assert errors[1] < 0.6 * errors[2]
    assert errors[0] < 1.02 * errors[1]  # the descent may gain nothing, but does not overfit


def test_independent_inputs_leave_nothing_to_make_up_for(seeded, stats_of):
    """With a diagonal Gram matrix every column stands alone: the answer is rounding to nearest."""
    spec, weight = SPECS["int4 group"], seeded(8, 24)
    inputs = stats_of(torch.eye(24) * torch.exp2(seeded(24, seed=1)))
    assert torch.equal(decoded(weight, spec, inputs), nearest(weight, spec))


@pytest.mark.parametrize("name", MORE)
def test_coordinate_descent_never_raises_the_error(name, seeded, correlated, stats_of):
    """From any start on the grid, round by round."""
    spec, weight, gram = MORE[name], seeded(16, 40, seed=1), stats_of(correlated(300, 40)).gram
    grid = fit_grid(weight, spec)
    values = grid.round(weight + 0.5 * seeded(16, 40, seed=2))
    for _ in range(3):
        better = descended(weight, values, grid, gram, 1)
        assert (output_error(weight, better, gram) <= output_error(weight, values, gram) * (1 + 1e-5)).all()
        assert on_grid(better, spec, weight)
        values = better
    assert torch.equal(descended(weight, values, grid, gram, 0), values)


def test_coordinate_descent_ends_where_no_single_column_gains(seeded, correlated, stats_of):
    """Every other point of the grid, one at a time, in float64."""
    spec, weight, gram = SPECS["int4 group"], seeded(4, 16, seed=1), stats_of(correlated(300, 16)).gram
    grid = fit_grid(weight, spec)
    values = descended(weight, grid.round(weight), grid, gram, 50)
    least = output_error(weight, values, gram)
    for j in range(16):
        for code in range(-7, 8):
            other = values.clone()
            other[:, j] = grid.step[:, j // 8] * code
            assert (output_error(weight, other, gram) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", SPECS)
def test_more_sweeps_are_not_worse(name, seeded, correlated, stats_of):
    spec, weight, inputs = SPECS[name], seeded(32, 64, seed=3), stats_of(correlated(300, 64))
    damped = inputs.gram + ridge(inputs.gram, GPTQ().damping) * torch.eye(64)
    errors = [output_error(weight, decoded(weight, spec, inputs, GPTQ(sweeps=n)), damped) for n in (0, 1, 2, 4)]
    for before, after in pairwise(errors):
        assert (after <= before * (1 + 1e-5)).all()
    assert errors[2].sum() < 0.99 * errors[0].sum()


def rows_of_rank_three(seeded):
    return seeded(50, 3) @ seeded(3, 32, seed=1)


def silent_columns(seeded):
    x = seeded(50, 32)
    x[:, ::3] = 0
    return x


BROKEN = {
    "rank 3": rows_of_rank_three,
    "one row": lambda seeded: seeded(1, 32),
    "zeros": lambda seeded: torch.zeros(20, 32),
    "silent columns": silent_columns,
    "equal columns": lambda seeded: seeded(50, 16).repeat(1, 2),
    "tiny": lambda seeded: seeded(50, 32) * 1e-12,
    "huge": lambda seeded: seeded(50, 32) * 1e8,
    "one huge column": lambda seeded: seeded(50, 32) * torch.tensor([1e6] + [1e-3] * 31),
}


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "large first"])
@pytest.mark.parametrize("name", ["int4 group", "nvfp4", "nf4"])
@pytest.mark.parametrize("kind", BROKEN)
def test_inputs_that_have_no_inverse(kind, name, act_order, seeded, stats_of):
    spec, weight, inputs = SPECS[name], seeded(8, 32, seed=4), stats_of(BROKEN[kind](seeded))
    values = decoded(weight, spec, inputs, GPTQ(act_order=act_order))
    assert torch.isfinite(values).all()
    assert on_grid(values, spec, weight)
    assert (
        output_error(weight, values, inputs.gram) <= output_error(weight, nearest(weight, spec), inputs.gram) * (1 + 1e-6)
    ).all()


def test_silent_columns_are_rounded_to_nearest(seeded, stats_of):
    spec, weight = SPECS["int4 group"], seeded(8, 32, seed=4)
    inputs = stats_of(silent_columns(seeded))
    values, plain = decoded(weight, spec, inputs), nearest(weight, spec)
    assert torch.equal(values[:, ::3], plain[:, ::3])
    assert output_error(weight, values, inputs.gram).sum() < 0.9 * output_error(weight, plain, inputs.gram).sum()


def test_inputs_of_low_rank_are_met_much_better(seeded, stats_of):
    """Three directions and 32 columns: nearly every output can be had."""
    spec, weight, inputs = SPECS["int4 group"], seeded(8, 32, seed=4), stats_of(rows_of_rank_three(seeded))
    best, plain = (output_error(weight, v, inputs.gram).sum() for v in (decoded(weight, spec, inputs), nearest(weight, spec)))
    assert best < 0.1 * plain


def test_a_gram_matrix_with_a_negative_eigenvalue(seeded, stats_of):
    """By rounding, or worse: damping grows until there is a factor."""
    spec, weight, inputs = SPECS["int4 group"], seeded(8, 32, seed=4), stats_of(rows_of_rank_three(seeded))
    inputs.gram.diagonal().sub_(0.5 * inputs.gram.diagonal().mean())
    factor = Factor.of(inputs.gram, GPTQ())
    assert torch.isfinite(factor.upper).all()
    assert torch.isfinite(decoded(weight, spec, inputs)).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 13), (3, 129)], ids=str)
def test_odd_shapes(shape, seeded, stats_of):
    spec = TensorSpec(format=Int(bits=4), granularity=PerChannel())
    weight, inputs = seeded(*shape), stats_of(seeded(40, shape[1], seed=1))
    values = decoded(weight, spec, inputs)
    assert values.shape == shape
    assert on_grid(values, spec, weight)
    if shape[1] == 1:
        assert torch.equal(values, nearest(weight, spec))


@pytest.mark.parametrize("name", MORE)
def test_what_is_stored_lies_on_the_grid(name, seeded, correlated, stats_of):
    """The grid is that of rounding to nearest: everything but the codes is equal."""
    spec, weight, inputs = MORE[name], seeded(8, 64, seed=1), stats_of(correlated(100, 64))
    packed, plain = gptq(weight, spec, inputs, GPTQ()), rtn(weight, spec)
    assert on_grid(dequantize(packed, spec, 64), spec, weight)
    assert packed.tensors().keys() == plain.tensors().keys()
    for part, tensor in plain.tensors().items():
        same = torch.equal(tensor.view(torch.uint8), packed.tensors()[part].view(torch.uint8))
        assert same == (part != "qweight"), part


def test_same_twice_and_with_a_given_factor(seeded, correlated, stats_of):
    """q, k and v share one factor; nothing is changed in place. bfloat16 weights are solved in float32."""
    spec, weight, inputs = SPECS["fp4"], seeded(16, 64), stats_of(correlated(100, 64))
    before, gram = weight.clone(), inputs.gram.clone()
    first = gptq(weight, spec, inputs, GPTQ()).qweight
    assert torch.equal(first, gptq(weight, spec, inputs, GPTQ()).qweight)
    assert torch.equal(first, gptq(weight, spec, inputs, GPTQ(), Factor.of(inputs.gram, GPTQ())).qweight)
    assert torch.equal(weight, before)
    assert torch.equal(inputs.gram, gram)
    half = weight.bfloat16()
    assert torch.equal(gptq(half, spec, inputs, GPTQ()).qweight, gptq(half.float(), spec, inputs, GPTQ()).qweight)


def test_output_error_is_that_of_the_outputs(seeded, correlated, stats_of):
    weight, x = seeded(6, 16), correlated(30, 16)
    values = weight + 0.1 * seeded(6, 16, seed=1)
    expected = ((values - weight).double() @ x.double().T).square().mean(dim=1)
    torch.testing.assert_close(output_error(weight, values, stats_of(x).gram), expected)
