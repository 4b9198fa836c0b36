"""Exchanges of levels: never worse, within the budget, the same again, and better where layers work together."""

import math
import random

import pytest

from dqtk.allocate.program import Candidate, allocate, total
from dqtk.allocate.switching import switched


@pytest.fixture
def candidates():
    draw = random.Random(3)
    sizes = [draw.choice([1, 2, 4]) for _ in range(12)]
    return {
        f"site{i}": [Candidate(cost=size * b, loss=draw.uniform(0.5, 2) * 4.0**-b) for b in (2, 3, 4, 8)]
        for i, size in enumerate(sizes)
    }


@pytest.fixture
def start(candidates):
    return allocate(candidates, budget(candidates)).chosen


def budget(candidates):
    return 4 * sum(options[0].cost / 2 for options in candidates.values())


def together(candidates):
    """Losses of neighbours whose errors point the same way: (a + b)^2 in place of a^2 + b^2, which single sites cannot tell."""
    sites = list(candidates)

    def loss(chosen, limit=math.inf):
        errors = [math.sqrt(candidates[site][chosen[site]].loss) for site in sites]
        return sum((a + b) ** 2 for a, b in zip(errors[:6:2], errors[1:6:2], strict=True)) + sum(e**2 for e in errors[6:])

    return loss


def test_it_is_never_worse_and_finds_what_single_sites_cannot_tell(candidates, start):
    loss, heard = together(candidates), []
    found = switched(start, candidates, budget(candidates), loss, trials=300, told=heard.append)
    assert loss(found) < 0.9 * loss(start)
    assert total(candidates, found).cost <= budget(candidates)
    assert heard == sorted(heard, reverse=True)
    assert len(heard) == 300
    assert heard[-1] == loss(found)


def test_where_the_program_is_right_it_stays(candidates, start):
    found = switched(start, candidates, budget(candidates), lambda chosen, limit: total(candidates, chosen).loss, trials=200)
    assert total(candidates, found).loss == pytest.approx(total(candidates, start).loss, rel=1e-12)


def test_equal_seeds_give_equal_answers(candidates, start):
    def asked(seed):
        heard = []

        def loss(chosen, limit):
            heard.append((tuple(chosen.values()), limit))
            return together(candidates)(chosen)

        return switched(start, candidates, budget(candidates), loss, trials=30, seed=seed), heard

    assert asked(1) == asked(1)
    assert asked(1)[1] != asked(2)[1]


def test_a_judge_that_stops_early_decides_the_same(candidates, start):
    def early(chosen, limit):
        loss = together(candidates)(chosen)
        return loss if loss <= limit else limit * 1.5

    whole = switched(start, candidates, budget(candidates), lambda c, limit: together(candidates)(c), trials=100)
    assert switched(start, candidates, budget(candidates), early, trials=100) == whole


def test_sites_without_a_choice_and_nothing_to_change():
    one = {"a": [Candidate(cost=1, loss=1)], "b": [Candidate(cost=2, loss=1), Candidate(cost=9, loss=0)]}
    assert switched({"a": 0, "b": 0}, one, 3, lambda chosen, limit: 1.0, trials=5) == {"a": 0, "b": 0}
