"""AdaRound: its promises, its gradient against autograd, and what it may choose."""

import pytest
import torch

from dqtk.methods.adaround import BETAS, STRENGTH, STRETCH, WARMUP, _learn, _Problem, _pull, adaround
from dqtk.methods.descent import output_error
from dqtk.methods.rtn import rtn
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.numerics.packing import dequantize
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import MSE, AdaRound, E4M3Group, E8M0Group, Float, Int, PerChannel, PerGroup, TensorSpec, TwoLevel

E2M1 = Float(exponent=2, mantissa=1)
SPECS = {
    "int4": TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8)),
    "int3 asym": TensorSpec(format=Int(bits=3, symmetric=False), granularity=PerChannel(), range=MSE()),
    "two-level": TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=8)),
    "fp4": TensorSpec(format=E2M1, granularity=PerGroup(size=8), range=MSE(most=1.3)),
    "fp8": TensorSpec(format=Float(), granularity=PerChannel()),
    "nvfp4": TensorSpec(format=E2M1, granularity=E4M3Group(size=8)),
    "mxfp4": TensorSpec(format=E2M1, granularity=E8M0Group(size=8)),
}
SHORT = AdaRound(iterations=300)


def decoded(weight, spec, inputs, solver=SHORT):
    return dequantize(adaround(weight, spec, inputs, solver), spec, weight.shape[1])


def nearest(weight, spec):
    return dequantize(rtn(weight, spec), spec, weight.shape[1])


@pytest.mark.parametrize("name", SPECS)
def test_no_row_is_worse_than_rounded_to_nearest(name, seeded, correlated, stats_of):
    """However short it is, and where there is nothing to learn from."""
    spec, weight = SPECS[name], seeded(16, 32, seed=1)
    for rows in (correlated(200, 32), seeded(200, 32), torch.zeros(4, 32), seeded(2, 32)):
        inputs = stats_of(rows)
        for iterations in (1, 60):
            values = decoded(weight, spec, inputs, AdaRound(iterations=iterations))
            error, plain = (output_error(weight, v, inputs.gram) for v in (values, nearest(weight, spec)))
            assert (error <= plain * (1 + 1e-6)).all()
            grid = fit_grid(weight, spec)
            torch.testing.assert_close(grid.round(values), values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SPECS)
def test_correlated_inputs_gain(name, seeded, correlated, stats_of):
    """On inputs that were not seen; learned rounding alone too, without the descent that follows."""
    spec, weight = SPECS[name], seeded(16, 32, seed=1)
    seen, unseen = correlated(1200, 32).split(600)
    inputs = stats_of(seen)
    low, high = fit_grid(weight, spec).neighbours(weight)
    alone = torch.where(_learn(weight, low, high, inputs.gram, SHORT), high, low)
    full, learned, plain = (
        float(((values - weight) @ unseen.T).square().sum())
        for values in (decoded(weight, spec, inputs), alone, nearest(weight, spec))
    )
    assert learned < 0.9 * plain
    assert full < 0.1 * plain


def test_only_neighbours_are_learned(seeded, correlated, stats_of):
    """Weights that lie on the grid, or beyond it, stay where they are."""
    for spec in SPECS.values():
        weight = seeded(8, 16, seed=2)
        weight[:, 3] = 0
        grid = fit_grid(weight, spec)
        weight[:, 5] *= 9  # beyond the largest point
        low, high = grid.neighbours(weight)
        up = _learn(weight, low, high, stats_of(correlated(100, 16)).gram, AdaRound(iterations=40))
        assert up.dtype == torch.bool
        assert up.any()
        assert not up.all()
        values = torch.where(up, high, low)
        torch.testing.assert_close(grid.round(values), values, rtol=1e-6, atol=0)
        assert ((values - weight).abs() <= (high - low) * (1 + 1e-5) + (weight.abs() > high.abs()) * 100).all()


@pytest.mark.parametrize("progress", [0.0, 0.1, 0.2, 0.5, 0.9, 1.0])
def test_the_pull_is_the_derivative_of_its_sum(progress):
    """Towards 0 below one half and towards 1 above; none while the error alone is learned."""
    h = torch.linspace(0.01, 0.99, 50, dtype=torch.float64).requires_grad_()
    beta = BETAS[0] + (BETAS[1] - BETAS[0]) * max(0.0, progress - WARMUP) / (1 - WARMUP)
    loss = (1 - (2 * h - 1).abs().pow(beta)).sum() * (0.0 if progress < WARMUP else 1.0)
    loss.backward()
    torch.testing.assert_close(_pull(h.detach(), progress), h.grad)
    if progress > WARMUP:
        assert (torch.sign(_pull(h.detach(), progress)) == torch.sign(0.5 - h.detach())).all()


@pytest.mark.parametrize("progress", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("name", SPECS)
def test_the_gradient_is_that_of_the_documented_loss(name, progress, seeded, correlated, stats_of):
    """Autograd in float64 of the two sums in the file's first paragraph."""
    spec, weight, gram = SPECS[name], seeded(8, 16, seed=2), stats_of(correlated(100, 16)).gram
    low, high = fit_grid(weight, spec).neighbours(weight)
    problem = _Problem.of(weight, low, high, gram)
    v = (problem.start() + problem.scale * seeded(8, 16, seed=3)).double().requires_grad_()
    h = (torch.sigmoid(v / problem.scale.double()) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
    delta = low.double() + (high - low).double() * h - weight.double()
    step = (high - low).double()
    e_row = (step.square() / 12) @ gram.diagonal()
    loss = (((delta @ gram) * delta).sum(1) / e_row).sum()
    if progress >= WARMUP:
        beta = BETAS[0] + (BETAS[1] - BETAS[0]) * (progress - WARMUP) / (1 - WARMUP)
        loss = loss + STRENGTH / 16 * (1 - (2 * h - 1).abs().pow(beta))[high > low].sum()
    loss.backward()
    torch.testing.assert_close(problem.gradient(v.detach().float(), progress).double(), v.grad, rtol=1e-3, atol=1e-5)
    assert v.grad.abs().max() > 0.01


def test_the_start_is_the_weight_itself(seeded, correlated, stats_of):
    """w' = w where the weight lies well between its neighbours, so the error begins at nothing."""
    spec, weight = SPECS["fp4"], seeded(8, 16, seed=2)
    low, high = fit_grid(weight, spec).neighbours(weight)
    problem = _Problem.of(weight, low, high, stats_of(correlated(100, 16)).gram)
    h = torch.sigmoid(problem.start() / problem.scale) * (1 + 2 * STRETCH) - STRETCH
    torch.testing.assert_close(torch.where(high > low, low + (high - low) * h, weight), weight, rtol=0, atol=2e-3)


def test_steps_of_a_float_grid_do_not_reach_the_gradient(seeded):
    """A weight with a step ten times as wide as another's, all else equal: the same gradient of v' (FP4DiT, section 3)."""
    low, high = torch.zeros(1, 2), torch.tensor([[1.0, 10.0]])
    weight = torch.tensor([[0.3, 3.0]])
    problem = _Problem.of(weight, low, high, torch.diag(torch.tensor([1.0, 0.01], dtype=torch.float64)))
    gradient = problem.gradient(problem.start() + problem.scale * 0.5, 0.0)
    assert problem.scale[0, 1] == pytest.approx(10 * float(problem.scale[0, 0]))
    # Equal errors of the output (width * h * input): each is divided by its own scale once.
    assert gradient[0, 0] == pytest.approx(10 * float(gradient[0, 1]), rel=1e-4)


def test_more_iterations_help_and_results_repeat(seeded, correlated, stats_of):
    spec, weight, inputs = SPECS["int4"], seeded(32, 32, seed=1), stats_of(correlated(300, 32))
    low, high = fit_grid(weight, spec).neighbours(weight)
    few, many = (
        output_error(
            weight, torch.where(_learn(weight, low, high, inputs.gram, AdaRound(iterations=n)), high, low), inputs.gram
        ).sum()
        for n in (5, 500)
    )
    assert many < 0.9 * few
    assert torch.equal(adaround(weight, spec, inputs, SHORT).qweight, adaround(weight, spec, inputs, SHORT).qweight)


@pytest.mark.parametrize("form", [nf4(), bitmod(4)], ids=["nf4", "bitmod"])
def test_codebooks_are_refused(form, seeded, stats_of):
    spec = TensorSpec(format=form, granularity=PerGroup(size=8))
    with pytest.raises(ValueError, match=r"neighbours: format must be Int or Float, got Codebook.*Use the solver RTN or GPTQ"):
        adaround(seeded(4, 16), spec, stats_of(seeded(10, 16)), SHORT)
