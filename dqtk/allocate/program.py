"""The integer program: one candidate per site, least total loss within a budget.

A multiple-choice knapsack, as in MixDQ (arXiv 2405.17873, section 4.3), which maximises a sum of scores; a loss is a score with its
sign turned. Solved exactly: a price per unit of the budget gives a bound on what any choice loses, a known choice is near it, and
what the gap between them leaves open is enumerated site by site, of equal or greater cost only what loses less (Pisinger, A minimal
algorithm for the multiple-choice knapsack problem, EJOR 83, 1995). A general solver does not see this structure: HiGHS
on what the bound left took 0.1 s for most programs of 794 sites, and seconds for some (notebooks/LOG.md).

In the code: S sites, J candidates of a site in order of cost (filled up with infinite losses).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_PAIRED = 500  # candidates that are tried two at a time: those nearest to being worth their price
_ROUNDING = 5e-13  # of the budget: sums of floats that are equal on paper


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
    cost_SJ, loss_SJ = (np.full((len(kept), max(map(len, kept.values()))), np.inf) for _ in range(2))
    for row, (site, indices) in enumerate(kept.items()):
        cost_SJ[row, : len(indices)] = [candidates[site][index].cost for index in indices]
        loss_SJ[row, : len(indices)] = [candidates[site][index].loss for index in indices]
    picked = _solve(cost_SJ, loss_SJ, budget * (1 + _ROUNDING))
    chosen = {site: indices[at] for (site, indices), at in zip(kept.items(), picked.tolist(), strict=True)}
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


def _solve(cost_SJ: np.ndarray, loss_SJ: np.ndarray, budget: float) -> np.ndarray:
    """Index of the candidate of every site [S]. The cheapest of all sites must fit.

    Lagrange's bound: at a price p of a unit of cost no choice within the budget loses less than sum_i min_j (loss_ij + p cost_ij)
    - p budget, and one that takes j at site i no less than that plus what j is dearer at this price than the site's best.
    """
    cost_SJ = np.where(np.isfinite(loss_SJ), cost_SJ, 0.0)
    each, price = np.arange(len(cost_SJ)), _price(cost_SJ, loss_SJ, budget)
    paid_SJ = loss_SJ + price * cost_SJ
    best = _cheapest_best(paid_SJ)
    room = budget - math.fsum(cost_SJ[each, best])
    dearer_SJ, extra_SJ = paid_SJ - paid_SJ[each, best][:, None], cost_SJ - cost_SJ[each, best][:, None]
    slack = 1e-12 * math.fsum(np.abs(paid_SJ[each, best]))  # of rounding
    known = _improved(best, dearer_SJ, extra_SJ, price, room)
    gap = math.fsum(dearer_SJ[each, known]) + price * (room - math.fsum(extra_SJ[each, known]))
    return _enumerated(best, dearer_SJ, extra_SJ, price, room, gap, slack)


def _price(cost_SJ: np.ndarray, loss_SJ: np.ndarray, budget: float) -> float:
    """The least price, as near as floats tell, at which the best candidates of all sites fit into the budget together."""
    each = np.arange(len(cost_SJ))

    def fits(price: float) -> bool:
        return math.fsum(cost_SJ[each, _cheapest_best(loss_SJ + price * cost_SJ)]) <= budget

    if fits(0.0):
        return 0.0
    gains = (loss_SJ[:, :1] - loss_SJ[:, 1:])[np.isfinite(loss_SJ[:, 1:])]
    steps = (cost_SJ[:, 1:] - cost_SJ[:, :1])[np.isfinite(loss_SJ[:, 1:])]
    low, high = 0.0, 2.0 * float((gains[steps > 0] / steps[steps > 0]).max())  # above every gain per cost: the cheapest everywhere
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _cheapest_best(paid_SJ: np.ndarray) -> np.ndarray:
    """Per site the first, so the cheapest, of the candidates that cost least at a price, up to rounding."""
    least = paid_SJ.min(1, keepdims=True)
    return (paid_SJ <= least + 1e-15 * np.abs(least)).argmax(1)


def _improved(best: np.ndarray, dearer_SJ: np.ndarray, extra_SJ: np.ndarray, price: float, room: float) -> np.ndarray:
    """A good choice: from each site's best at the price, one or two sites change, as long as that loses less and fits."""
    known, each = best.copy(), np.arange(len(best))
    while True:
        change_SJ = dearer_SJ - dearer_SJ[each, known][:, None]
        change_SJ[each, known] = np.inf
        order = np.argsort(change_SJ, axis=None)[: min(_PAIRED, int(np.isfinite(change_SJ).sum()))]
        site, index = np.unravel_index(order, change_SJ.shape)
        extra = np.append(extra_SJ[site, index] - extra_SJ[site, known[site]], 0.0)  # the last changes nothing
        loss = np.append(change_SJ[site, index], 0.0) - price * extra
        both = loss[:, None] + loss
        both[extra[:, None] + extra > room - math.fsum(extra_SJ[each, known])] = np.inf
        both[:-1, :-1][site[:, None] == site] = np.inf
        found = np.unravel_index(both.argmin(), both.shape)
        if not both[found] < -1e-9 * (1e-300 + np.abs(loss).max()):
            return known
        for change in found:
            if change < len(site):
                known[site[change]] = index[change]


def _enumerated(
    best: np.ndarray, dearer_SJ: np.ndarray, extra_SJ: np.ndarray, price: float, room: float, gap: float, slack: float
) -> np.ndarray:
    """The optimum among choices that are dearer than ``best`` by at most the gap, at this price.

    States are what may have been chosen at the sites so far: in order of cost, each losing less than all that cost less. Sites at
    which a change is nearly free come first; the rest keeps its best in every state, so states that fit are choices too and
    narrow the gap.
    """
    dearer_SJ = dearer_SJ.copy()
    dearer_SJ[np.arange(len(best)), best] = np.inf
    nearest = dearer_SJ.min(1)
    cost, dearer, steps = np.zeros(1), np.zeros(1), []
    for site in np.argsort(nearest, kind="stable"):
        if nearest[site] > gap + slack:
            break
        others = np.flatnonzero(dearer_SJ[site] <= gap + slack)
        costs = np.concatenate([cost, *(cost + extra_SJ[site, j] for j in others)])
        dearers = np.concatenate([dearer, *(dearer + dearer_SJ[site, j] for j in others)])
        stay = np.flatnonzero(dearers <= gap + slack)
        losses = (dearers - price * costs)[stay]
        order = np.lexsort((losses, costs[stay]))
        lower = np.append(np.inf, np.minimum.accumulate(losses[order])[:-1])
        stay = stay[order[losses[order] < lower]]
        steps.append((site, stay % len(cost), np.append(best[site], others)[stay // len(cost)]))
        cost, dearer = costs[stay], dearers[stay]
        fit = cost <= room
        gap = min(gap, (dearer + price * (room - cost))[fit].min(initial=gap))
    ends = np.flatnonzero(cost <= room)
    state = ends[(dearer - price * cost)[ends].argmin()]
    chosen = best.copy()
    for site, before, index in reversed(steps):
        chosen[site], state = index[state], before[state]
    return chosen
