"""What other budgets would buy: the program at evenly spaced budgets, beside the best single plan that fits into each."""

import math
from dataclasses import dataclass

from dqtk.plan import Plan

from .from_plans import Made, Offers

POINTS = 17


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """budget: of all sites, in its unit's total. expected: SQNR in dB of the program's answer if noise powers add up. single: the
    same of the best single plan that costs no more; None where none does.
    """

    budget: float
    expected: float
    single: float | None


def frontier(offers: Offers) -> list[Point]:
    """From the least possible budget to that of the dearest plan; nothing where losses are no noise powers."""
    if not offers.noises:
        return []
    plans = [offers.chosen(offers.indices({choice.site.id: choice.spec for choice in plan.choices})) for plan in _whole(offers)]
    least = math.fsum(min(option.cost for option in options) for options in offers.candidates.values())
    most = max((made.cost for made in plans), default=least)
    found = []
    for index in range(POINTS):
        budget = least + (most - least) * index / (POINTS - 1)
        fitting = [_decibels(made) for made in plans if made.cost <= budget * (1 + 1e-9)]
        found.append(Point(budget=budget, expected=_decibels(offers.at(budget)), single=max(fitting, default=None)))
    return found


def _whole(offers: Offers) -> list[Plan]:
    """The plans all of whose specs are offered: a protected site is not."""
    return [plan for plan in offers.plans if all(choice.spec in offers.specs[choice.site.id] for choice in plan.choices)]


def _decibels(made: Made) -> float:
    return math.inf if made.expected is None else made.expected
