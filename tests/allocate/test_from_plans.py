"""A plan from plans: what is chosen, what it costs, and that quantizing takes it."""

import re
from dataclasses import replace

import pytest

import dqtk
from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import allocate_plans
from dqtk.allocate.prices import price, shapes_of_a_step
from dqtk.allocate.probes import OutputSQNR
from dqtk.allocate.sensitivity import Sensitivity, measure
from dqtk.costs import Cost, CostTable
from dqtk.plan import Plan
from dqtk.spec import canonical

NOISE = {"content": "noise", "quality": "noise"}


@pytest.fixture
def found(measured, tmp_path):
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls)
    both = {"content": probe, "quality": probe}
    return measure(measured.pipe, measured.plans, measured.stats, both, measured.groups, folder=tmp_path / "work")


@pytest.fixture
def make(measured, found):
    """Function (amount, unit, **changes) -> what is made of the budget."""

    def go(amount, unit="bits", losses=NOISE, **changes):
        how = {"plans": measured.plans, "found": found, "groups": measured.groups, "losses": losses} | changes
        return allocate_plans(budget=Budget(amount=amount, unit=unit), **how)

    return go


def spent(plan, unit, **how):
    return sum(price(choice.site, choice.spec, unit, **how) for choice in plan.choices)


def widths(made):
    return {choice.site.path: 16 if choice.spec is None else choice.spec.weight.bits for choice in made.plan.choices}


def test_the_budget_is_kept_and_used(make, measured):
    num_weights = sum(choice.site.num_weights for choice in measured.plans[0].choices)
    noise = []
    for bits in (2.6, 3.5, 4.5, 6, 9, 16):
        made = make(bits)
        assert spent(made.plan, "bits") <= bits * num_weights
        assert spent(made.plan, "bits") == made.groups["all"].allocation.cost
        noise.append(made.groups["all"].allocation.loss)
    assert noise == sorted(noise, reverse=True)
    assert set(widths(make(16)).values()) == {16}
    with pytest.raises(ValueError, match=r"budget must be at least 2\.\d+ bits per weight, .* got 2 bits per weight"):
        make(2.0)


def test_bits_go_where_they_are_heard(make):
    """The faint layer is a fifth of the weights and a thousandth of the output: it pays for 8 bits elsewhere."""
    assert widths(make(7.4)) == {"first": 8, "last": 8, "faint": 2}


def test_better_than_every_uniform_plan_of_its_size(make, measured, found):
    """The optimum of noise over what is chosen among, so no worse than the 4-bit plan at the 4-bit plan's bytes."""
    four = measured.plans[1]
    uniform = sum(10 ** (-found.of(c.site, c.spec) / 10) for c in four.choices)
    made = make(spent(four, "bytes"), "bytes")
    assert made.groups["all"].allocation.loss <= uniform
    assert spent(made.plan, "bytes") <= spent(four, "bytes")
    more = make(1.3 * spent(four, "bytes"), "bytes")
    assert more.groups["all"].allocation.loss < 0.8 * uniform


def test_the_expected_sqnr_is_near_the_true_one(make, measured):
    """Errors of layers are nearly independent: the sum of noises predicts what quantizing them together gives."""
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls)
    made = make(4.5)
    dqtk.quantize(measured.pipe, made.plan, progress=False)
    assert probe("transformer") == pytest.approx(made.expected, abs=1.0)
    assert f"{made.expected:.1f} dB" in made.table()


def test_around_a_plan_changes_add_up_from_there(make, measured, tmp_path):
    """Where nothing changes, what is expected is the base itself; where little does, it is close to what comes out."""
    probe, four = OutputSQNR(measured.pipe.components, measured.stats.calls), measured.plans[1]
    both = {"content": probe, "quality": probe}
    how = {"folder": tmp_path / "around", "around": four}
    near = measure(measured.pipe, measured.plans, measured.stats, both, measured.groups, **how)
    same = make(1.0001 * spent(four, "bytes"), "bytes", plans=[four], found=near)
    assert same.plan.choices[0].spec == four.choices[0].spec
    assert same.expected == pytest.approx(near.base["transformer"])
    assert same.plan.choices[0].why.endswith("around a plan")
    made = make(5.5, found=near)
    assert made.plan.hash != four.hash
    assert set(widths(make(16, found=near)).values()) <= {8, 16}  # beside 4-bit layers 8 bits may err to the better
    dqtk.quantize(measured.pipe, made.plan, progress=False)
    assert probe("transformer") == pytest.approx(made.expected, abs=1.0)


def test_it_is_a_plan_like_others(make):
    plan = make(4.5).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.recipe == "allocated 4.5 bits"
    assert all(re.fullmatch(r"allocated 4\.5 bits: score \d+\.\d alone", choice.why) for choice in plan.choices)
    assert plan.hash != make(7.2).plan.hash


def test_kept_sites_stay_and_are_paid_for(measured, found):
    kept = [replace(p, choices=(replace(p.choices[0], spec=None, why="kept: first"), *p.choices[1:])) for p in measured.plans]
    made = allocate_plans(kept, found, Budget(amount=9, unit="bits"), NOISE, measured.groups)
    assert widths(made)["first"] == 16
    assert made.plan.choices[0].why == "kept: first"
    assert spent(made.plan, "bits") == made.groups["all"].allocation.cost


def test_protected_sites(make, measured, found):
    best = {choice.site.path: found.of(choice.site, choice.spec) for choice in measured.plans[2].choices}
    made = make(9, protect=min(best["first"], best["last"]) + 0.01)
    assert sorted(widths(made).values())[-1] == 16
    assert widths(made)[min(("first", "last"), key=best.get)] == 16


def test_groups_with_other_metrics_need_a_ratio(make):
    losses = {"content": "score", "quality": "noise"}
    with pytest.raises(ValueError, match=r"groups with different metrics must have a ratio, got none\. Their losses do not add up"):
        make(6, losses=losses)
    made = make(6, losses=losses, ratio=1.0)
    assert set(made.groups) == {"content", "quality"}
    assert made.expected is None
    for group in made.groups.values():
        assert group.allocation.cost <= group.budget
    assert widths(made)["faint"] == 4  # 6 bits of its own, which nobody else may have


def test_scores_do_not_offer_16_bits(make):
    """A sum of dB would buy 16 bits for the least important layer before all else."""
    assert set(widths(make(16, losses={"content": "score", "quality": "score"})).values()) == {8}


def test_bops(make, measured):
    parts, sites = measured.pipe.components, [choice.site for choice in measured.plans[0].choices]
    calls = shapes_of_a_step(parts, measured.stats.calls, sites)
    assert {name: [str(shape) for shape in shapes] for name, shapes in calls.items()} == {
        "transformer:first": ["12 x 64 -> 128"],
        "transformer:last": ["12 x 128 -> 64"],
        "transformer:faint": ["12 x 64 -> 64"],
    }
    products = 12 * (64 * 128 + 128 * 64 + 64 * 64)
    made = make(products * 8 * 4, "bops", calls=calls)
    assert made.groups["all"].allocation.cost == spent(made.plan, "bops", calls=calls) <= products * 8 * 4
    assert 16 not in widths(made).values()


def test_milliseconds(make, measured):
    """Times by which 2 bits are slow and 8 bits fast: nobody would take 2."""
    sites = [choice.site for choice in measured.plans[0].choices]
    calls = {
        name: tuple(shapes) for name, shapes in shapes_of_a_step(measured.pipe.components, measured.stats.calls, sites).items()
    }
    time_of = {2: 9.0, 4: 2.0, 8: 3.0}
    specs = [(plan.choices[0].spec, time_of[plan.choices[0].spec.weight.bits]) for plan in measured.plans] + [(None, 10.0)]
    costs = tuple(Cost(shape=shape, spec=spec, kernel="", milliseconds=ms) for (shape,) in calls.values() for spec, ms in specs)
    table = CostTable(dtype="float32", device="cpu", hardware={}, versions={}, costs=costs, calls=calls)
    assert widths(make(8.0, "ms", table=table)) == {"first": 8, "last": 8, "faint": 4}
    assert set(widths(make(30.0, "ms", table=table)).values()) == {16}
    with pytest.raises(ValueError, match="budget must be at least 6 ms, "):
        make(5.9, "ms", table=table)
    kept = [replace(p, choices=(replace(p.choices[0], spec=None, why="kept"), *p.choices[1:])) for p in measured.plans]
    shorter = replace(table, calls={name: shapes for name, shapes in calls.items() if name != "transformer:first"})
    assert widths(make(6.0, "ms", table=shorter, plans=kept)) == {"first": 16, "last": 8, "faint": 8}  # benches do not time it


def test_plans_of_other_sites(measured, make):
    short = replace(measured.plans[0], choices=measured.plans[0].choices[:2])
    with pytest.raises(ValueError, match="plans must be of the same sites, got others"):
        make(8, plans=[measured.plans[0], short])


def test_equal_specs_are_offered_once(measured, found):
    """Two recipes that treat a site alike (modulation, say) are one candidate."""
    same = allocate_plans([*measured.plans, measured.plans[1]], found, Budget(amount=4.5, unit="bits"), NOISE, measured.groups)
    assert same.plan == allocate_plans(measured.plans, found, Budget(amount=4.5, unit="bits"), NOISE, measured.groups).plan
    assert len(found.scores) == len({canonical(c.spec) for p in measured.plans for c in p.choices}) * 3


def test_sensitivity_of_an_unmeasured_spec_is_a_mistake_of_ours(measured):
    with pytest.raises(KeyError):
        allocate_plans(measured.plans, Sensitivity(scores={}, floors={}), Budget(amount=4, unit="bits"), NOISE, measured.groups)
