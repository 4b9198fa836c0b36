"""The integer program against brute force, at its edges, and at the size of SDXL."""

import itertools
import math
import random

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from dqtk.allocate.program import Candidate, allocate, protected, total


def drawn(seed, num_sites, num_options, cost=1.0, loss=1.0):
    """Random sites; losses mostly fall with cost, not always; some costs and losses are equal."""
    draw = random.Random(seed)
    return {
        f"site{i}": [
            Candidate(cost=cost * draw.randint(0, 9), loss=loss * round(draw.gauss(-j, 1.5), 2))
            for j in range(draw.randint(1, num_options))
        ]
        for i in range(num_sites)
    }


def best_by_trying(candidates, budget):
    """Least loss over all combinations within the budget; None if there is none."""
    losses = [
        math.fsum(option.loss for option in picked)
        for picked in itertools.product(*candidates.values())
        if math.fsum(option.cost for option in picked) <= budget
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize(("cost", "loss"), [(1, 1), (1e9, 1e-7), (1e-6, 1e6)])
def test_it_is_the_optimum(seed, cost, loss):
    """Also for bytes by the billion and for losses far below the solver's absolute tolerances."""
    candidates = drawn(seed, 6, 4, cost, loss)
    bounds = [f(option.cost for option in options) for options in candidates.values() for f in (min, max)]
    least, most = math.fsum(bounds[::2]), math.fsum(bounds[1::2])
    for share in (0, 0.3, 0.5, 0.9, 1):
        budget = least + share * (most - least)
        found = allocate(candidates, budget)
        assert found.cost <= budget * (1 + 1e-12)
        assert found == total(candidates, found.chosen)
        assert found.loss == pytest.approx(best_by_trying(candidates, budget * (1 + 1e-12)), abs=1e-9 * loss)


def test_a_budget_that_is_met_exactly_or_missed_by_a_byte():
    """A byte of a billion is below the tolerance of the solver, and not below ours."""
    candidates = {"a": [Candidate(cost=0, loss=1), Candidate(cost=10**9, loss=0)], "b": [Candidate(cost=7, loss=0)]}
    assert allocate(candidates, 10**9 + 7).chosen == {"a": 1, "b": 0}
    short = allocate(candidates, 10**9 + 6)
    assert (short.chosen, short.cost, short.loss) == ({"a": 0, "b": 0}, 7, 1)


def as_large_as_sdxl(seed=0):
    """794 sites of the sizes of SDXL with 2, 4, 8 and 16 bits; scores of about 6 dB a bit."""
    draw, candidates = random.Random(seed), {}
    for i in range(794):
        size, ease = draw.choice([320**2, 640**2, 1280**2, 1280 * 5120, 10240 * 1280]), draw.lognormvariate(0, 1.5)
        candidates[f"site{i}"] = [Candidate(cost=b * size, loss=ease - 6 * b + draw.gauss(0, 2)) for b in (2, 4, 8, 16)]
    return candidates


@pytest.mark.parametrize("bits", [2.5, 4.0, 6.0])
def test_794_sites(bits):
    """The optimum by another road: dynamic programming over the budget, in units that divide all costs."""
    candidates = as_large_as_sdxl()
    budget = bits * math.fsum(options[0].cost / 2 for options in candidates.values())
    found = allocate(candidates, budget)
    assert found.cost <= budget
    unit = 2 * 320**2
    least = np.zeros(int(budget // unit) + 1)  # by how much may be spent on the sites so far
    for options in candidates.values():
        ways = []
        for option in options:
            spent = int(option.cost // unit)
            assert spent * unit == option.cost
            ways.append(np.concatenate([np.full(spent, np.inf), least])[: len(least)] + option.loss)
        least = np.min(ways, axis=0)
    assert found.loss == pytest.approx(least[-1], abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_another_solver_finds_no_better(seed, share):
    """Costs without a common unit, against HiGHS: 60 sites, four candidates each."""
    draw = random.Random(seed)
    sizes = [draw.uniform(1, 100) for _ in range(60)]
    candidates = {
        f"site{i}": [Candidate(cost=size * b, loss=draw.lognormvariate(0, 1) * 4.0**-b) for b in (2, 3, 4, 8)]
        for i, size in enumerate(sizes)
    }
    budget = sum(sizes) * (2 + 6 * share)
    found = allocate(candidates, budget)
    flat = [option for options in candidates.values() for option in options]
    one_each = LinearConstraint(np.kron(np.eye(60), np.ones(4)), 1, 1)
    within = LinearConstraint(np.array([[option.cost for option in flat]]), -np.inf, budget)
    losses = np.array([option.loss for option in flat])
    other = milp(
        losses, integrality=np.ones(240), bounds=Bounds(0, 1), constraints=[one_each, within], options={"mip_rel_gap": 0.0}
    )
    assert found.cost <= budget * (1 + 1e-12)
    assert found.loss <= other.fun * (1 + 1e-4)


def test_more_budget_is_never_worse():
    candidates = as_large_as_sdxl(1)
    unit = math.fsum(options[0].cost / 2 for options in candidates.values())
    losses = [allocate(candidates, bits * unit).loss for bits in (2, 3, 5, 9, 16, 20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-2] == losses[-1] == pytest.approx(math.fsum(min(o.loss for o in options) for options in candidates.values()))


def test_an_impossible_budget_names_the_least_possible():
    candidates = {"a": [Candidate(cost=3, loss=0), Candidate(cost=2, loss=1)], "b": [Candidate(cost=4, loss=0)]}
    with pytest.raises(ValueError, match=r"budget must be at least 6, the cheapest choice everywhere, got 5\. Raise it\."):
        allocate(candidates, 5)
    with pytest.raises(ValueError, match=r"budget must be at least 6, .* got nan"):
        allocate(candidates, math.nan)
    assert allocate(candidates, 6).chosen == {"a": 1, "b": 0}


def test_a_site_without_candidates():
    with pytest.raises(ValueError, match=r"every site must have a candidate, got none for b\. Offer 16 bits\."):
        allocate({"a": [Candidate(cost=1, loss=1)], "b": []}, 10)
    with pytest.raises(ValueError, match="got none for no site at all"):
        allocate({}, 10)


@pytest.mark.parametrize(
    ("cost", "loss", "said"),
    [
        (math.nan, 0, "cost of a candidate must be finite, got nan"),
        (1, math.inf, "loss of a candidate must be finite, got inf"),
        (-1, 0, "cost of a candidate must be at least 0, got -1"),
    ],
)
def test_numbers_that_are_none(cost, loss, said):
    with pytest.raises(ValueError, match=said):
        Candidate(cost=cost, loss=loss)


def test_protected_sites_are_those_that_nothing_helps():
    candidates = {
        "hard": [Candidate(cost=2, loss=9), Candidate(cost=8, loss=0.6)],
        "helped": [Candidate(cost=2, loss=9), Candidate(cost=8, loss=0.5)],
        "easy": [Candidate(cost=2, loss=0.1)],
    }
    assert protected(candidates, 0.5) == ["hard"]
    assert protected(candidates, 0.0) == ["hard", "helped", "easy"]
