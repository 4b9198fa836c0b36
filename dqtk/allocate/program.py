"""The integer program: one candidate per site, least total loss within a budget.

A multiple-choice knapsack, as in MixDQ (arXiv 2405.17873, section 4.3), which maximises a sum of scores; a loss is a score with its
sign turned. SciPy's HiGHS solves it with gap 0. Its tolerances are absolute numbers that SciPy does not let one choose, so costs
and losses are shifted and scaled before, and what comes back is added up again exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

_SCALE = 1e3  # the largest cost and loss that the solver sees: its tolerances are 1e-6
_ROUNDING = 1e-12  # of the budget: sums of floats that are equal on paper


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One way to treat a site. cost: at least 0, in the unit of the budget. loss: any finite number, less is better."""

    cost: float
    loss: float

    def __post_init__(self) -> None:
        for name, value in (("cost", self.cost), ("loss", self.loss)):
            if not math.isfinite(value):
                raise ValueError(f"allocate: {name} of a candidate must be finite, got {value}. Measure this site again.")
        if self.cost < 0:
            raise ValueError(f"allocate: cost of a candidate must be at least 0, got {self.cost}. Count what the site takes.")


Candidates = Mapping[str, Sequence[Candidate]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """chosen: site -> index of its candidate. cost and loss: their exact sums."""

    chosen: dict[str, int]
    cost: float
    loss: float


def allocate(candidates: Candidates, budget: float, said: Callable[[float], str] = "{:.6g}".format) -> Allocation:
    """The candidates of least total loss whose costs sum to at most the budget.

    Args:
        candidates: site -> at least one way to treat it.
        budget: in the unit of the costs.
        said: a cost in words, for errors.
    Returns:
        The optimum. Of several with the same loss, one.
    Raises:
        ValueError: a budget below the cheapest choice (the error names the least possible one), a site without candidates.
    """
    empty = next((site for site, options in candidates.items() if not options), None)
    if empty is not None or not candidates:
        raise ValueError(f"allocate: every site must have a candidate, got none for {empty or 'no site at all'}. Offer 16 bits.")
    least = math.fsum(min(option.cost for option in options) for options in candidates.values())
    if not budget >= least * (1 - _ROUNDING):
        allowed = f"at least {said(least)}, the cheapest choice everywhere"
        raise ValueError(f"allocate: budget must be {allowed}, got {said(budget)}. Raise it.")
    kept = {site: _undominated(options) for site, options in candidates.items()}
    open_sites = {site: indices for site, indices in kept.items() if len(indices) > 1}
    chosen = {site: indices[0] for site, indices in kept.items()}  # the cheapest
    if open_sites:
        chosen |= _solve(candidates, open_sites, budget - least, budget * _ROUNDING)
    return total(candidates, chosen)


def total(candidates: Candidates, chosen: Mapping[str, int]) -> Allocation:
    """An allocation from its choices."""
    picked = [candidates[site][index] for site, index in chosen.items()]
    return Allocation(
        chosen={site: chosen[site] for site in candidates},
        cost=math.fsum(option.cost for option in picked),
        loss=math.fsum(option.loss for option in picked),
    )


def protected(candidates: Candidates, threshold: float) -> list[str]:
    """Sites whose every candidate loses more than the threshold: those to keep at 16 bits, as MixDQ does with 1 % of them."""
    return [site for site, options in candidates.items() if min(option.loss for option in options) > threshold]


def _undominated(options: Sequence[Candidate]) -> list[int]:
    """Indices in order of cost, each with less loss than all cheaper ones."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss)):
        if not kept or options[index].loss < options[kept[-1]].loss:
            kept.append(index)
    return kept


def _solve(candidates: Candidates, sites: Mapping[str, Sequence[int]], room: float, rounding: float) -> dict[str, int]:
    """The program over sites with a choice left. ``room``: what the budget leaves above the cheapest choice of each."""
    pairs = [(site, index) for site, indices in sites.items() for index in indices]
    first = {site: candidates[site][indices[0]] for site, indices in sites.items()}
    extra = np.array([candidates[site][index].cost - first[site].cost for site, index in pairs])
    gained = np.array([candidates[site][index].loss - first[site].loss for site, index in pairs])
    rows = np.repeat(np.arange(len(sites)), [len(indices) for indices in sites.values()])
    one_each = csr_array((np.ones(len(pairs)), (rows, np.arange(len(pairs)))), shape=(len(sites), len(pairs)))
    unit, worth = extra.max() / _SCALE, np.abs(gained).max() / _SCALE
    limit = room
    while True:
        within = LinearConstraint(csr_array(extra[None] / unit), -np.inf, max(limit, 0.0) / unit)
        found: Any = milp(
            gained / worth,
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), within],
            options={"mip_rel_gap": 0.0},
        )
        if not found.success:  # the cheapest choice is feasible
            raise RuntimeError(f"allocate: HiGHS must find the optimum of a feasible program, got: {found.message}")
        picked = np.flatnonzero(found.x > 0.5)
        over = math.fsum(extra[picked]) - room
        if over <= rounding:
            return dict(pairs[i] for i in picked)
        limit -= 2 * over  # within the solver's tolerance, but not within the budget
