"""Exchanges of levels between sites: a plan is changed a little, judged as a whole, and kept where that is better.

EvoPress (Sieberling et al. 2024, arXiv 2410.14649): mutations keep the budget (some sites go a level down, others up), and the best
survives. Here one offspring at a time, and of some random ones that which the losses of single sites like best: a judgement costs
far more than a guess. Knows numbers only; who judges decides on what.
"""

import math
import random
from collections.abc import Callable, Mapping

from .program import Candidates, total

MOST = 3  # sites that go down at a time; fewer are more likely
GUESSED = 4  # offspring, of which the most promising is judged


def switched(
    start: Mapping[str, int],
    candidates: Candidates,
    budget: float,
    loss: Callable[[Mapping[str, int], float], float],
    *,
    trials: int,
    seed: int = 0,
    told: Callable[[float], object] = lambda least: None,
) -> dict[str, int]:
    """A choice that the judge likes at least as well as the start.

    Args:
        start: site -> index of its candidate, within the budget.
        candidates: site -> its candidates; their losses are only a hint.
        budget: what their costs may sum to.
        loss: (choice, limit) -> its loss as a whole, or any number above the limit.
        trials: offspring to judge.
        seed: of what is drawn; equal seeds and losses give equal answers.
        told: hears the least loss after every trial.
    """
    draw = random.Random(seed)
    levels = {site: sorted(range(len(options)), key=lambda i: (options[i].cost, i)) for site, options in candidates.items()}
    best, least = dict(start), loss(start, math.inf)
    for _ in range(trials):
        offspring = [_changed(best, candidates, levels, budget, draw) for _ in range(GUESSED)]
        tried = min(offspring, key=lambda chosen: total(candidates, chosen).loss)
        if tried != best and (found := loss(tried, least)) < least:
            best, least = tried, found
        told(least)
    return best


def _changed(
    chosen: Mapping[str, int], candidates: Candidates, levels: Mapping[str, list[int]], budget: float, draw: random.Random
) -> dict[str, int]:
    """Some sites a level down, then others up, a level each, as long as the budget lasts."""
    new = dict(chosen)
    above = {site: levels[site].index(index) for site, index in new.items()}
    can = [site for site in new if above[site] > 0]
    lowered = draw.sample(can, min(draw.randint(1, MOST), draw.randint(1, MOST), len(can)))
    for site in lowered:
        new[site] = levels[site][above[site] - 1]
    room = budget - total(candidates, new).cost
    others = [site for site in new if site not in lowered and above[site] + 1 < len(levels[site])]
    for site in draw.sample(others, len(others)):
        up = levels[site][above[site] + 1]
        extra = candidates[site][up].cost - candidates[site][new[site]].cost
        if extra <= room:
            new[site], room = up, room - extra
    return new
