"""The low-rank branch: what it takes off the weight, what it is for, and that it touches nothing else."""

from itertools import pairwise

import pytest
import torch

from dqtk.methods.low_rank import _factors, low_rank
from dqtk.methods.solve import solve
from dqtk.numerics.inputs import round_input
from dqtk.numerics.packing import Packed, dequantize
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import GPTQ, Dynamic, Int, LayerSpec, LowRank, PerGroup, Smooth, TensorSpec

W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16))
A4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16), range=Dynamic())


@pytest.fixture
def strong(seeded):
    """A weight with a strong part of rank 4, and outliers."""
    weight = 3 * seeded(48, 4, seed=5) @ seeded(4, 64, seed=6) / 2 + 0.3 * seeded(48, 64, seed=7)
    weight[:, 9] *= 6
    return weight


def stored_of(found, spec, k):
    return dequantize(Packed(**{name: found.tensors.get(name) for name in Packed.__slots__}), spec.weight, k)


def output_error(weight, x, spec, found):
    """Of the layer that the solution describes, against the plain product, in float64."""
    z = x * found.tensors["smooth"] if "smooth" in found.tensors else x
    y = round_input(z, spec.input).double() @ stored_of(found, spec, weight.shape[1]).double().T
    if "down" in found.tensors:
        y = y + z.double() @ (found.tensors["up"].double() @ found.tensors["down"].double()).T
    return float((y - x.double() @ weight.double().T).square().sum())


def test_the_branch_is_the_best_of_its_rank(strong, seeded):
    """Against the singular values in float64, which no approximation of the rank can beat (Eckart and Young)."""
    values = torch.linalg.svdvals(strong.double())
    before = float("inf")
    for rank in (1, 2, 4, 8, 16, 32):
        down, up = _factors(strong, rank)
        assert (down.shape, up.shape) == ((rank, 64), (48, rank))
        assert down.dtype == up.dtype == torch.bfloat16
        rest = float((strong.double() - up.double() @ down.double()).norm())
        least = float(values[rank:].norm())
        assert least <= rest < least + 0.01 * float(strong.norm())  # bfloat16
        assert rest < before
        before = rest


@pytest.mark.parametrize("rank", [48, 64, 1000])
def test_full_rank_leaves_next_to_nothing(strong, rank):
    down, up = _factors(strong, rank)
    assert down.shape == (48, 64)
    assert (strong - up.float() @ down.float()).norm() < 0.01 * strong.norm()


def test_small_and_empty_weights(seeded):
    for weight in (seeded(1, 8), seeded(8, 1), torch.zeros(4, 8)):
        down, up = _factors(weight, 2)
        assert torch.isfinite(up.float() @ down.float()).all()
        assert (weight - up.float() @ down.float()).abs().max() < 0.02 * weight.abs().max() + 1e-6


@pytest.mark.parametrize("solver", [None, GPTQ()], ids=["RTN", "GPTQ"])
@pytest.mark.parametrize("transforms", [(), (Smooth(),)], ids=["", "smooth"])
def test_it_lowers_the_output_error_of_four_bits(solver, transforms, strong, correlated, stats_of):
    """On inputs that were not seen, and more with more rank."""
    seen, unseen = correlated(600, 64).split(300)
    inputs = stats_of(seen)
    options = {"transforms": transforms} | ({} if solver is None else {"solver": solver})
    errors = []
    for rank in (None, 2, 8, 24):
        branch = None if rank is None else LowRank(rank=rank)
        spec = LayerSpec(weight=W4, input=A4, low_rank=branch, **options)
        errors.append(output_error(strong, unseen, spec, solve([strong], spec, inputs)[0]))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.7 * errors[0]


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
def test_alternating_is_never_worse_and_the_best_is_kept(noise, strong, seeded, stats_of):
    """The error that is minimized: rounded rest on the inputs, and rounded inputs on the rest, which alternating may raise."""
    first = 0.0
    for seed in range(4):
        weight, inputs = strong + 0.3 * seeded(48, 64, seed=seed), stats_of(seeded(300, 64, seed=seed + 20))
        sizes = noise * seeded(64, seed=seed + 10).square()

        def error(iterations, weight=weight, inputs=inputs, sizes=sizes):
            down, up = low_rank(weight, W4, inputs, LowRank(rank=4, iterations=iterations), sizes if noise else None)
            rest = weight - up.float() @ down.float()
            rounded = fit_grid(rest, W4).round(rest)
            delta = (rounded - rest).double()
            return float(((delta @ inputs.gram) * delta).sum() + (rounded.square() * sizes).sum())

        errors = [error(n) for n in (1, 2, 3, 4, 6, 10)]
        assert all(after <= before for before, after in pairwise(errors))
        first += errors[0] - errors[-1]
    assert first > 0
    down, _ = low_rank(strong, W4, inputs, LowRank(rank=4, iterations=1), None)
    assert torch.equal(down, _factors(strong, 4)[0])


def test_sites_that_share_an_input_share_down(strong, seeded, correlated, stats_of):
    """One branch of the stacked weights; every layer has rows of its own in ``up``, and memory of its own, as files need."""
    weights = [strong, 0.5 * strong[:20] + seeded(20, 64, seed=8), seeded(7, 64, seed=9)]
    spec, inputs = (
        LayerSpec(weight=W4, input=A4, low_rank=LowRank(rank=8, shared=True), transforms=(Smooth(),)),
        stats_of(correlated(300, 64)),
    )
    found = solve(weights, spec, inputs)
    tensors = [solution.tensors for solution in found]
    assert [t["up"].shape for t in tensors] == [(48, 8), (20, 8), (7, 8)]
    for name in ("down", "smooth"):
        assert torch.equal(tensors[0][name], tensors[1][name])
        assert torch.equal(tensors[0][name], tensors[2][name])
    memory = [t.untyped_storage().data_ptr() for part in tensors for t in part.values()]
    assert len(set(memory)) == len(memory)
    for weight, part, solution in zip(weights, tensors, found, strict=True):
        whole = stored_of(solution, spec, 64) + part["up"].float() @ part["down"].float()
        assert (whole * part["smooth"] - weight).norm() < 0.12 * weight.norm()


def test_a_branch_of_ones_own_loses_less_than_a_shared_one(strong, seeded, correlated, stats_of):
    """At equal bytes, as every layer stores its factors."""
    weights = [strong, 0.5 * strong[:20] + seeded(20, 64, seed=8)]
    inputs, lost = stats_of(correlated(300, 64)), {}
    for shared in (False, True):
        spec = LayerSpec(weight=W4, input=A4, low_rank=LowRank(rank=8, shared=shared))
        found = solve(weights, spec, inputs)
        whole = [stored_of(s, spec, 64) + s.tensors["up"].float() @ s.tensors["down"].float() for s in found]
        lost[shared] = sum(float((((q - w).double() @ inputs.gram) * (q - w)).sum()) for w, q in zip(weights, whole, strict=True))
    assert lost[False] < lost[True]


def test_the_rest_makes_up_for_rounded_factors(strong, correlated, stats_of):
    """The rest is taken from the factors as stored: with many bits the whole is the weight, not the weight in bfloat16."""
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerGroup(size=8)), low_rank=LowRank(rank=8, iterations=1))
    (found,) = solve([strong], spec, stats_of(correlated(100, 64)))
    branch = found.tensors["up"].float() @ found.tensors["down"].float()
    assert (stored_of(found, spec, 64) + branch - strong).norm() < 0.002 * strong.norm()


def test_the_same_twice_and_no_random_state_is_touched(strong, correlated, stats_of):
    spec, inputs = LayerSpec(weight=W4, low_rank=LowRank(rank=4)), stats_of(correlated(100, 64))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = solve([strong], spec, inputs)[0].tensors
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = solve([strong], spec, inputs)[0].tensors
    assert torch.initial_seed() == 2
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
