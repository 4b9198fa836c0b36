"""What other budgets would buy, and the page that shows it."""

import math
import re

import pytest

from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import Offers
from dqtk.allocate.frontier import POINTS, frontier
from dqtk.allocate.probes import OutputSQNR
from dqtk.allocate.sensitivity import measure
from dqtk.report.allocation import write_allocation


@pytest.fixture
def offers(measured, tmp_path):
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls)
    both = {"content": probe, "quality": probe}
    found = measure(measured.pipe, measured.plans, measured.stats, both, measured.groups, folder=tmp_path / "work")
    return Offers.of(measured.plans, found, Budget(amount=5, unit="bits"), dict.fromkeys(both, "noise"), measured.groups)


def test_more_budget_is_never_worse_and_no_single_plan_is_better(offers):
    points = frontier(offers)
    assert len(points) == POINTS
    expected = [point.expected for point in points]
    assert expected == sorted(expected)
    assert all(math.isfinite(value) for value in expected)
    singles = [point.single for point in points]
    assert singles[0] is not None  # 2 bits everywhere is the least
    assert all(single <= value + 1e-9 for single, value in zip(singles, expected, strict=True))
    assert singles == sorted(singles)
    assert len(set(singles)) == 3


def test_scores_have_no_front(measured, offers):
    budget = Budget(amount=5, unit="bits")
    other = Offers.of(measured.plans, offers.found, budget, dict.fromkeys(("content", "quality"), "score"), measured.groups)
    assert frontier(other) == []


def test_the_page(offers, tmp_path):
    made = offers.allocated()
    page = write_allocation(made, tmp_path / "new" / "page.html", "a <b> model", "dqtk allocate x --budget 5bits").read_text()
    assert "a &lt;b&gt; model: allocated 5 bits" in page
    assert "dqtk allocate x --budget 5bits" in page
    assert page.count("<polyline") == 2
    assert len(re.findall(r'<th scope="row">[\d.]+ bits per weight</th>', page)) == POINTS
    assert f"expected SQNR of the output {made.expected:.1f} dB" in page
    assert page.count('class="slot"') == 3
