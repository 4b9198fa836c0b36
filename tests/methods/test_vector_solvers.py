"""Solvers of weights of vectors: promises on their own objective, the sweep against a naive one in float64, unseen inputs."""

from dataclasses import replace

import pytest
import torch

from dqtk.methods.beam_search import beam_search
from dqtk.methods.descent import output_error, ridge
from dqtk.methods.gptq import Factor
from dqtk.methods.solve import solve
from dqtk.methods.vectors import _sweep, better_codes, descended_vectors, nearest_vectors, rescaled, swept_vectors, vector_grid
from dqtk.numerics.packing import dequantize
from dqtk.numerics.storage import layer_layout
from dqtk.spec import (
    GPTQ,
    RTN,
    BeamSearch,
    Hadamard,
    LayerSpec,
    PerChannel,
    PerTensor,
    ShortcutSplit,
    TensorSpec,
    Trellis,
    VectorCodebook,
)

FORMS = {
    "2 bit, one book": VectorCodebook(words=16, length=2),
    "2 bit, two books": VectorCodebook(words=16, length=4, books=2),
    "3 bit, three books": VectorCodebook(words=16, length=4, books=3),
    "3 bit scalars": VectorCodebook(words=8, length=1),
    "2 bit trellis": Trellis(bits=2),
}
SEARCHED = [name for name, form in FORMS.items() if isinstance(form, VectorCodebook)]  # words, not rings


def spec_of(name, granularity=None):
    return TensorSpec(format=FORMS[name], granularity=granularity or PerChannel())


def error_of(weight, packed, spec, gram):
    return output_error(weight, dequantize(packed, spec, weight.shape[1]), gram)


def naive(weight, grid, gram, solver):
    """The inverse of what is left, one vector after the other, in float64."""
    w, h, width = weight.double().clone(), gram.double().clone(), grid.width
    h.diagonal().add_(solver.damping * h.diagonal().mean())
    left, codes = list(range(0, len(h), width)), {}
    while left:
        columns = [start + i for start in left for i in range(width)]
        inverse = torch.linalg.inv(h[columns][:, columns])
        j, later = columns[:width], columns[width:]
        corner = torch.linalg.inv(inverse[:width, :width])
        codes[left[0]] = grid.encode(w[:, j].float(), torch.linalg.cholesky(corner).float())
        w[:, later] -= (w[:, j] - grid.decode(codes[left[0]]).double()) @ corner @ inverse[:width, width:]
        left = left[1:]
    return torch.cat([codes[start] for start in sorted(codes)], dim=1)


@pytest.mark.parametrize("name", SEARCHED)
def test_the_sweep_equals_the_naive_form(name, seeded, correlated):
    """A vector in the middle between two words may go either way in float32, and takes what follows with it."""
    spec, solver = spec_of(name), GPTQ(sweeps=0, act_order=False)
    weight, x = seeded(24, 32, seed=5), correlated(400, 32)
    gram = (x.T @ x).double() / len(x)
    grid = vector_grid(weight, spec, gram)
    codes = _sweep(weight, grid, Factor.of(gram, solver, grid.width))
    expected = naive(weight, grid, gram, solver)
    assert (codes == expected).flatten(1).all(dim=1).sum() >= 20
    errors, wanted = (float(output_error(weight, grid.decode(c), gram).sum()) for c in (codes, expected))
    assert errors == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize("name", SEARCHED)
def test_no_solver_is_worse_than_the_nearest_words(name, granularity, seeded, correlated, stats_of):
    spec, weight = spec_of(name, granularity), seeded(24, 32, seed=1)
    for rows in (correlated(200, 32), seeded(200, 32)):
        inputs = stats_of(rows)
        grid = vector_grid(weight, spec, inputs.gram)
        plain = output_error(weight, grid.decode(grid.encode(weight)), inputs.gram)
        swept = error_of(weight, swept_vectors(weight, spec, inputs, GPTQ()), spec, inputs.gram)
        assert swept.sum() <= plain.sum()
        assert granularity == PerTensor() or (swept <= plain * (1 + 1e-6)).all()
        searched = error_of(weight, beam_search(weight, spec, inputs, BeamSearch()), spec, inputs.gram)
        assert searched.sum() <= swept.sum() * 1.1
        assert searched.sum() <= plain.sum()


@pytest.mark.parametrize("num", [24, 70, 128])
def test_trellis_codes_are_swept_too(num, seeded, correlated, stats_of):
    """Rows that fill no tile, one and more, and two; each group of rows takes the better codes."""
    spec, weight = spec_of("2 bit trellis"), seeded(num, 32, seed=1)
    seen, unseen = correlated(1200, 32).split(600)
    inputs = stats_of(seen)
    grid = vector_grid(weight, spec)
    plain = grid.decode(grid.encode(weight))
    assert 0.06 < float((plain - weight).square().mean()) < 0.09  # the bound is 0.0625, scalars lose 0.1175
    packed = swept_vectors(weight, spec, inputs, GPTQ())
    error, before = error_of(weight, packed, spec, inputs.gram), output_error(weight, plain, inputs.gram)
    for rows in range(0, num, grid.rows):
        assert error[rows : rows + grid.rows].sum() <= before[rows : rows + grid.rows].sum()
    lost = [float(((v - weight) @ unseen.T).square().sum()) for v in (dequantize(packed, spec, 32), plain)]
    assert lost[0] < 0.6 * lost[1]


@pytest.mark.parametrize("name", SEARCHED)
def test_each_gains_on_inputs_that_were_not_seen(name, seeded, correlated, stats_of):
    spec, weight = spec_of(name), seeded(48, 32, seed=1)
    seen, unseen = correlated(1200, 32).split(600)
    found = (
        nearest_vectors(weight, spec),
        swept_vectors(weight, spec, stats_of(seen), GPTQ(sweeps=0)),
        beam_search(weight, spec, stats_of(seen), BeamSearch()),
    )
    errors = [float(((dequantize(packed, spec, 32) - weight) @ unseen.T).square().sum()) for packed in found]
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < (1 if FORMS[name].length == 1 else 0.95) * errors[1]


def test_no_step_of_the_descent_makes_the_error_larger(seeded, correlated):
    spec, weight, x = spec_of("3 bit, three books"), seeded(16, 32, seed=2), correlated(300, 32)
    gram = (x.T @ x).double() / len(x)
    damping = ridge(gram, 0.01)
    damped = gram + damping * torch.eye(32)
    grid = vector_grid(weight, spec, gram)
    codes = grid.encode(weight)
    errors = [output_error(weight, grid.decode(codes), damped)]
    for _ in range(3):
        codes = descended_vectors(weight, codes, grid, gram, 1, damping)
        errors.append(output_error(weight, grid.decode(codes), damped))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    assert errors[1].sum() < 0.7 * errors[0].sum()


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
def test_scales_are_fitted_to_the_codes(granularity, seeded, correlated):
    """The error's derivative to every scale is zero."""
    spec, weight, x = spec_of("3 bit scalars", granularity), seeded(6, 16, seed=2), correlated(300, 16).double()
    gram = x.T @ x / len(x)
    grid = vector_grid(weight, spec)
    codes = grid.encode(weight)
    found = rescaled(weight, grid, codes, gram)
    assert found.scale.shape == grid.scale.shape
    scale = found.scale.double().requires_grad_()
    delta = grid.decode(codes).double() / grid.scale * scale - weight
    ((delta @ gram) * delta).sum().backward()
    assert scale.grad.abs().max() < 1e-4 * float(((weight.double() @ gram) * weight).sum())
    assert output_error(weight, found.decode(codes), gram).sum() < output_error(weight, grid.decode(codes), gram).sum()


def test_better_codes_are_chosen_row_by_row(seeded):
    spec, weight = spec_of("2 bit, one book"), seeded(6, 8, seed=3)
    grid, gram = vector_grid(weight, spec), torch.eye(8).double()
    good, bad = grid.encode(weight), grid.encode(-weight)
    mixed = torch.where((torch.arange(6) % 2 == 0)[:, None, None], good, bad)
    assert torch.equal(better_codes(weight, mixed, good, grid, gram), good)
    assert torch.equal(better_codes(weight, good, mixed, grid, gram), good)


def test_more_beams_and_rounds_lose_less(seeded, correlated, stats_of):
    spec, weight, inputs = spec_of("3 bit, three books"), seeded(32, 32, seed=4), stats_of(correlated(600, 32))
    solvers = (BeamSearch(beam=1, rounds=1), BeamSearch(beam=8, rounds=1), BeamSearch(beam=8, rounds=12, tolerance=1e-3))
    errors = [float(error_of(weight, beam_search(weight, spec, inputs, s), spec, inputs.gram).sum()) for s in solvers]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("name", ["2 bit, two books", "2 bit trellis"])
@pytest.mark.parametrize("solver", [RTN(), GPTQ(), BeamSearch(rounds=2)], ids=str)
def test_solve_stores_what_the_layer_has_and_answers_alone_or_together(name, solver, seeded, correlated, stats_of):
    """Layers that share an input share its factor; parts of a split input have books of their own."""
    if name not in SEARCHED and isinstance(solver, BeamSearch):
        return
    spec = LayerSpec(weight=spec_of(name), solver=solver, transforms=(Hadamard(block=16),), correct_bias=True)
    weights, inputs = [seeded(8, 32, seed=1).bfloat16(), seeded(5, 32, seed=2).bfloat16()], stats_of(correlated(300, 32))
    together = solve(weights, spec, inputs)
    for weight, found in zip(weights, together, strict=True):
        (alone,) = solve([weight], spec, inputs)
        assert {n: (tuple(t.shape), t.dtype) for n, t in found.tensors.items()} == layer_layout(spec, len(weight), 32, 32)
        assert all(torch.equal(alone.tensors[n], t) for n, t in found.tensors.items())
        assert found.bias_shift is not None
    split = replace(spec, transforms=(ShortcutSplit(at=(8,)),))
    (found,) = solve(weights[:1], split, inputs)
    assert {n: (tuple(t.shape), t.dtype) for n, t in found.tensors.items()} == layer_layout(split, 8, 32, 32)


@pytest.mark.parametrize(
    ("name", "solver"), [("2 bit, two books", GPTQ()), ("2 bit, two books", BeamSearch()), ("2 bit trellis", GPTQ())], ids=str
)
def test_degenerate_inputs_and_weights(name, solver, seeded, stats_of):
    spec, x = spec_of(name), seeded(20, 32)
    x[:, :5] = 0
    x[:, 6] = x[:, 7]
    for weight in (seeded(4, 32, seed=1), torch.zeros(4, 32), seeded(4, 32).index_fill_(0, torch.tensor([2]), 0.0)):
        for rows in (x, torch.zeros(20, 32)):
            (found,) = solve([weight], LayerSpec(weight=spec, solver=solver), stats_of(rows))
            assert all(t.isfinite().all() for t in found.tensors.values())
            zero = ~weight.any(dim=1)
            assert not dequantize_of(found, spec)[zero].any()


@pytest.mark.parametrize("solver", [RTN(), GPTQ(), BeamSearch()], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_a_row_of_zeros_stays_zero_and_leaves_the_others_alone(name, solver, seeded, correlated, stats_of):
    """Rows are small, as in real layers, and a zero row counts nothing: neither in books nor in the rings that it is a part of."""
    spec = spec_of(name)
    if isinstance(spec.format, Trellis) and isinstance(solver, BeamSearch):
        return  # there is no such layer
    x = correlated(400, 32)
    weight = seeded(65, 32, seed=3) * 0.02
    weight[[5, 40, 64]] = 0
    (found,) = solve([weight], LayerSpec(weight=spec, solver=solver), stats_of(x))
    got = dequantize_of(found, spec)
    assert not got[[5, 40, 64]].any()
    live = weight.any(dim=1)
    rest = [row for row in range(65) if live[row]]
    if isinstance(spec.format, Trellis):  # a full ring is as good as one whose numbers all count
        error = float((got[rest] - weight[rest]).square().mean() / weight[rest].square().mean())
        full = seeded(65, 32, seed=3) * 0.02
        (whole,) = solve([full], LayerSpec(weight=spec, solver=solver), stats_of(x))
        wanted = float((dequantize_of(whole, spec) - full).square().mean() / full.square().mean())
        assert error < 1.05 * wanted
        return
    (alone,) = solve([weight[rest]], LayerSpec(weight=spec, solver=solver), stats_of(x))
    torch.testing.assert_close(got[rest], dequantize_of(alone, spec), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_a_weight_of_zeros_is_zero(name, granularity):
    if name not in SEARCHED and granularity == PerTensor():
        return  # there is no such layer
    spec = spec_of(name, granularity)
    packed = nearest_vectors(torch.zeros(5, 32), spec)
    assert not dequantize(packed, spec, 32).any()
    assert packed.scale is not None
    assert not packed.scale.any()


def test_a_row_whose_codes_point_away_becomes_zero(seeded):
    weight = seeded(4, 32, seed=1)
    grid = vector_grid(weight, spec_of("2 bit, one book"))
    codes = grid.encode(torch.cat([weight[:2], -weight[2:]]))
    scale = rescaled(weight, grid, codes).scale[:, 0]
    assert (scale > 0).tolist() == [True, True, False, False]
    assert not scale[2:].any()


def dequantize_of(found, spec):
    from dqtk.numerics.packing import Packed

    return dequantize(Packed(**found.tensors), spec, 32)
