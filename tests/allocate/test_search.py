"""Ratios swept and ranked, exchanges confirmed or not."""

import re

import pytest

from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import Offers
from dqtk.allocate.probes import OutputSQNR
from dqtk.allocate.search import ONE, RATIOS, exchanged, ranked, swept, table
from dqtk.allocate.sensitivity import measure

NOISE = {"content": "noise", "quality": "noise"}


@pytest.fixture
def offers(measured, tmp_path):
    """Function (bits, losses) -> offers."""
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls)
    both = {"content": probe, "quality": probe}
    found = measure(measured.pipe, measured.plans, measured.stats, both, measured.groups, folder=tmp_path / "work")

    def make(bits, losses=NOISE):
        return Offers.of(measured.plans, found, Budget(amount=bits, unit="bits"), losses, measured.groups)

    return make


def test_the_sweep_has_every_answer_once_and_within_the_budget(offers):
    mine = offers(6)
    answers = swept(mine)
    assert ONE in answers
    assert len(answers) > 1
    assert all(made.cost <= mine.total for made in answers.values())
    plans = [made.plan.hash for made in answers.values()]
    assert len(set(plans)) == len(plans)
    unlike = swept(offers(6, {"content": "score", "quality": "noise"}))
    assert ONE not in unlike


def test_three_groups_have_two_ratios(measured, tmp_path):
    groups = {"transformer:first": "text", "transformer:last": "temporal", "transformer:faint": "spatial"}
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls)
    found = measure(
        measured.pipe, measured.plans, measured.stats, dict.fromkeys(groups.values(), probe), groups, folder=tmp_path / "work"
    )
    budget, losses = Budget(amount=7, unit="bits"), dict.fromkeys(groups.values(), "noise")
    answers = swept(Offers.of(measured.plans, found, budget, losses, groups))
    assert ONE in answers
    name, made = next((name, made) for name, made in answers.items() if name != ONE)
    assert re.fullmatch(r"text [\d.]+, temporal [\d.]+", name)
    assert list(made.groups) == ["text", "temporal", "spatial"]
    others = swept(Offers.of(measured.plans, found, budget, losses, groups, alike=False))
    assert ONE not in others
    assert all(made.expected is None for made in others.values())
    with pytest.raises(ValueError, match="groups with different metrics must have a ratio, got none"):
        Offers.of(measured.plans, found, budget, losses, groups, alike=False).allocated()


def test_ratios_that_cannot_be_met_are_left_out(offers):
    """Just above the least possible budget one program fits, and shares of it do not; below nothing does."""
    some = offers(8)
    least = sum(min(option.cost for option in options) for options in some.candidates.values()) / some.num_weights
    assert list(swept(offers(least * 1.0001))) == [ONE]
    with pytest.raises(ValueError, match="budget must be at least"):
        swept(offers(2.0))
    assert len(RATIOS) == 10


def test_ranking(offers):
    """By noise first; only the best four are painted, and the pictures decide among them."""
    answers = {str(bits): offers(bits).allocated() for bits in (3, 4, 5, 6, 8)}
    costs = {made.plan.hash: made.cost for made in answers.values()}

    def of(picked):
        return next(costs[made.plan.hash] for made in answers.values() if made.picked == picked)

    entries = ranked(answers, lambda picked: 1 / of(picked), of)
    assert [entry.name for entry in entries] == ["4", "5", "6", "8", "3"]
    assert [entry.pictures is None for entry in entries] == [False] * 4 + [True]
    text = table(entries, "psnr of 8 pictures").splitlines()
    assert text[0].endswith("psnr of 8 pictures:")
    assert len(text) == 6


def test_exchanges_must_be_confirmed(offers):
    """A judge who likes the faint layer wide takes bits from the others; another who does not says no."""
    mine = offers(5)
    start = mine.allocated()
    faint = next(site for site in mine.specs if site.endswith("faint"))

    def fond(picked, limit=1e9):
        return 1 / (16 if picked[faint] is None else picked[faint].weight.bits)

    made, said = exchanged(mine, start, fond, fond, trials=40)
    assert made.cost <= mine.total
    assert fond(made.picked) < fond(start.picked)
    assert "sites moved" in said
    assert "stays" not in said
    stays, said = exchanged(mine, start, fond, lambda picked, limit=1e9: 1 / fond(picked), trials=40)
    assert stays is start
    assert said.endswith("not confirmed: the start stays")
