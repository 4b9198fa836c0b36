"""One site at a time: what is scored, that the model comes back, resuming, and whether scores can be believed."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.allocate.probes import LARGEST, OutputSQNR
from dqtk.allocate.reliability import describe_reliability, monotone
from dqtk.allocate.sensitivity import Sensitivity, _key, _todo, measure
from dqtk.calibrate.gather import input_name
from dqtk.nn import Quantized
from dqtk.plan import Plan
from dqtk.processes import ALONE, Processes
from dqtk.recipes import of_width
from dqtk.spec import LayerSpec, PerTensor, TensorSpec, VectorCodebook, canonical


class Counted:
    """A probe that counts its calls, and may stop in the middle of the work."""

    def __init__(self, probe, most=None):
        self.probe, self.most, self.num = probe, most, 0
        self.name, self.unit, self.loss = probe.name, probe.unit, probe.loss

    def __call__(self, component, module=None):
        if self.num == self.most:
            raise KeyboardInterrupt
        self.num += 1
        return self.probe(component, module)

    def floor(self, component):
        return self.probe.floor(component)


@pytest.fixture
def probe(measured):
    return Counted(OutputSQNR(measured.pipe.components, measured.stats.calls))


@pytest.fixture
def run(measured, probe, tmp_path):
    """Function (**changes) -> the sensitivity of everything."""

    def go(**changes):
        how = {"target": measured.pipe, "plans": measured.plans, "stats": measured.stats, "groups": measured.groups}
        how |= {"probes": {"content": probe, "quality": probe}, "folder": tmp_path / "work"}
        return measure(**(how | changes))

    return go


def only(plan: Plan, path):
    """The plan of one site."""
    return replace(plan, choices=tuple(replace(c, spec=c.spec if c.site.path == path else None) for c in plan.choices))


def test_scores_are_those_of_really_quantizing_one_layer(measured, run, probe):
    found = run()
    assert len(found.scores) == 9
    assert probe.num == 9
    for plan in measured.plans:
        for choice in plan.choices:
            dqtk.quantize(measured.pipe, only(plan, choice.site.path), progress=False)
            module = measured.pipe.components["transformer"]
            assert [isinstance(layer, Quantized) for layer in (module.first, module.last, module.faint)].count(True) == 1
            assert found.of(choice.site, choice.spec) == probe("transformer")
            setattr(module, choice.site.path, measured.originals[choice.site.path])
            assert probe("transformer") == LARGEST


@pytest.fixture(autouse=True)
def originals(measured):
    measured.originals = dict(measured.pipe.components["transformer"].named_children())
    return measured.originals


def test_the_model_comes_back(measured, run, originals):
    run()
    now = dict(measured.pipe.components["transformer"].named_children())
    assert all(now[name] is layer for name, layer in originals.items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in now.values())


def test_the_model_comes_back_when_the_probe_fails(measured, run, originals):
    with pytest.raises(KeyboardInterrupt):
        run(probes=dict.fromkeys(("content", "quality"), Counted(OutputSQNR(measured.pipe.components, measured.stats.calls), 4)))
    now = dict(measured.pipe.components["transformer"].named_children())
    assert all(now[name] is layer for name, layer in originals.items())


def test_an_interrupted_measurement_goes_on(measured, run, probe, tmp_path):
    whole = run(folder=tmp_path / "whole")
    stopped = Counted(OutputSQNR(measured.pipe.components, measured.stats.calls), 4)
    with pytest.raises(KeyboardInterrupt):
        run(probes={"content": stopped, "quality": stopped})
    probe.num = 0
    told = []
    assert run(told=told.append) == whole
    assert probe.num == len(told) == 9 - 4
    run(told=told.append)
    assert probe.num == 5  # all is there


def test_more_plans_are_measured_into_the_same_folder(measured, run, probe):
    run(plans=measured.plans[:2])
    assert run() == run(plans=measured.plans)
    assert probe.num == 9


@pytest.mark.parametrize(
    ("change", "different"),
    [
        (lambda m: {"stats": replace(m.stats, run={"seed": "1"})}, "run"),
        (lambda m: {"target": (m.pipe.components["transformer"].double(), m.pipe)[1]}, "dtypes"),
    ],
)
def test_a_folder_of_another_measurement(measured, run, change, different):
    run()
    with pytest.raises(ValueError, match=rf"^allocate: .*work must be the unfinished work .* \(different: {different}\)"):
        run(**change(measured))


def test_plans_of_another_model(measured, run, bare):
    with pytest.raises(ValueError, match="plan must be for components"):
        run(plans=[dqtk.plan(bare, "w8a8")])


def test_groups_may_have_probes_of_their_own(measured, run, probe):
    class Constant:
        name, unit, loss = "constant", "", "score"

        def __call__(self, component, module=None):
            return 7.0

        def floor(self, component):
            return None

    found = run(probes={"content": Constant(), "quality": probe})
    assert {score for (site, _), score in found.scores.items() if site == "transformer:faint"} == {7.0}
    assert probe.num == 6
    assert "transformer:faint" not in found.floors
    assert 35 < found.floors["transformer:first"] < 60


def test_wider_is_better_and_faint_is_easier(measured, run):
    found = run()
    assert monotone(measured.plans, found) == (3, 3)
    by_path = {choice.site.path: found.of(choice.site, choice.spec) for choice in measured.plans[1].choices}
    assert by_path["faint"] > by_path["last"] + 30
    text = describe_reliability(measured.plans, found)
    assert "scores rise with the bits of the weight at 3 of 3 sites" in text
    assert "in another float dtype scores" in text


def test_scores_out_of_order_are_seen(measured):
    two, four, eight = measured.plans
    scores = {(c.site.id, canonical(c.spec)): bits for bits, plan in ((2, two), (4, four), (8, eight)) for c in plan.choices}
    first = two.choices[0]
    for worse in (4, 5):  # equal is not better
        found = Sensitivity(
            scores=scores | {(first.site.id, canonical(first.spec)): worse}, floors=dict.fromkeys(measured.groups, 8.0)
        )
        assert monotone(measured.plans, found) == monotone(measured.plans, found, to_the_floor=True) == (2, 3)
    text = describe_reliability(measured.plans, found)
    assert "of 3 sites\n" in text
    assert text.endswith("transformer in another float dtype scores 8.0; 3 of 9 scores are no worse than that")


def test_scores_above_the_floor_may_stand_in_any_order(measured):
    two, four, eight = measured.plans
    scores = {(c.site.id, canonical(c.spec)): bits for bits, plan in ((2, two), (4, four), (8, eight)) for c in plan.choices}
    scores[two.choices[0].site.id, canonical(eight.choices[0].spec)] = 3.5  # below the 4 of 4 bits
    above, below = (Sensitivity(scores=scores, floors=dict.fromkeys(measured.groups, floor)) for floor in (3.5, 3.6))
    assert monotone(measured.plans, above) == (2, 3)
    assert monotone(measured.plans, above, to_the_floor=True) == (3, 3)
    assert monotone(measured.plans, below, to_the_floor=True) == (2, 3)
    said = "at 2 of 3 sites, and at 1 more but for scores above rounding in another float dtype"
    assert said in describe_reliability(measured.plans, above)


def test_wider_inputs_are_better_too(measured, run, tmp_path):
    """Weights and inputs are two axes: each is compared at an equal width of the other."""
    plans = [dqtk.plan(measured.pipe, of_width(bits, given)) for bits in (2, 8) for given in (3, 8)]
    found = run(plans=plans, folder=tmp_path / "both")
    assert len(found.scores) == 3 * 4
    assert monotone(plans, found) == (3, 3)
    assert "rise with the bits of weight and input at 3 of 3 sites" in describe_reliability(plans, found)
    crossed = [plans[1], plans[2]]  # W2A8 and W8A3: neither is the wider
    assert monotone(crossed, found) == (0, 0)


def test_around_a_plan_the_rest_is_as_it_says(measured, run, probe, originals, tmp_path):
    """Scores are those of the whole plan with one layer changed; 16 bits have one too; the model is as it was throughout."""
    four = measured.plans[1]
    found = run(around=four, folder=tmp_path / "around")
    assert dict(measured.pipe.components["transformer"].named_children()) == originals
    assert len(found.scores) == 3 * 4
    module = measured.pipe.components["transformer"]
    for index, choice in enumerate(four.choices):
        for spec in (None, *(plan.choices[index].spec for plan in measured.plans)):
            changed = replace(four, choices=tuple(replace(c, spec=spec) if c is choice else c for c in four.choices))
            dqtk.quantize(measured.pipe, changed, progress=False)
            assert found.of(choice.site, spec) == probe("transformer")
            if spec == choice.spec:
                assert found.base == {"transformer": probe("transformer")}
            for name, layer in originals.items():
                setattr(module, name, layer)
    with pytest.raises(ValueError, match=r"different: around\)"):
        run(folder=tmp_path / "around")
    alone = run()
    assert alone.base == {}
    assert alone.of(four.choices[0].site, None) == math.inf


def test_the_journal_is_readable(run, tmp_path):
    run()
    rows = [json.loads(line) for line in (tmp_path / "work" / "done-0.jsonl").read_text().splitlines()]
    assert rows[0]["layer"] == "floor transformer"
    assert all(set(row) == {"layer", "sqnr"} for row in rows)


def test_a_solver_that_learns_is_measured_too(run, measured):
    """Whatever a spec holds is in the score: GPTQ at 4 bits is no worse than rounding on most layers."""
    learned = dqtk.plan(measured.pipe, "w4a8")
    found = run(plans=[measured.plans[1], learned])
    gains = [
        found.of(a.site, a.spec) - found.of(b.site, b.spec) for a, b in zip(learned.choices, measured.plans[1].choices, strict=True)
    ]
    assert len(gains) == 3
    assert sorted(gains)[1] > 0
    assert all(type(layer) is nn.Linear for layer in measured.pipe.components["transformer"].children())
    assert torch.isfinite(torch.tensor(gains)).all()


# --- who does what ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learning(load_tiny):
    """Plans whose layers learn together with others of the same input, one of them with queries alone."""
    pipe = load_tiny("pixart")
    alone = dqtk.plan(pipe, "w4a8", overrides={"*.attn1.to_k": None, "*.attn1.to_v": None})
    return [alone, dqtk.plan(pipe, "w4a8"), dqtk.plan(pipe, "w8a8")]


@pytest.mark.parametrize("num", [1, 2, 3])
def test_every_score_is_one_process_s_and_layers_of_an_input_are_solved_together(learning, num):
    shares = [_todo(learning, {}, Processes(rank, num, torch.device("cpu"), lambda: None), unquantized=True) for rank in range(num)]
    keys = [key for _, mine in shares for key in mine]
    everything = {_key(c) for plan in learning for c in plan.choices if c.spec} | {
        _key(replace(c, spec=None)) for c in learning[1].choices if c.spec
    }
    assert sorted(keys) == sorted(everything)  # each once
    for todo, mine in shares:
        solved = [_key(choice) for work in todo for choice in work]
        assert mine <= set(solved)
        for plan, work in zip(learning, todo, strict=False):
            for choice in work:
                together = [c for c in plan.choices if c.spec == choice.spec and input_name(c.site) == input_name(choice.site)]
                assert all(c in work for c in together)


def test_stopped_between_layers_of_one_input_they_are_solved_together_again(learning):
    plan = learning[1]
    query = next(choice for choice in plan.choices if choice.site.path.endswith("attn1.to_q"))
    todo, mine = _todo([plan], {_key(query): {}}, ALONE, unquantized=False)
    assert query in todo[0]
    assert _key(query) not in mine
    assert len(mine) == sum(choice.spec is not None for choice in plan.choices) - 1


def test_layers_that_share_books_have_no_price_of_their_own(measured, run):
    words = TensorSpec(format=VectorCodebook(words=16, length=1, group="all"), granularity=PerTensor())
    recipe = dqtk.Recipe(name="shared", rules=(dqtk.Rule(spec=LayerSpec(weight=words), why="test"),))
    plans = [dqtk.plan(measured.pipe, recipe)]
    with pytest.raises(
        ValueError, match=r"allocate: layers of recipe 'shared' must have books of their own, got books that group 'all'"
    ):
        run(plans=plans)
