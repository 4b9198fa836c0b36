"""A whole bench on an untrained pipeline, with a clock that the test turns: arithmetic, sizes, and what is left out."""

import json
import re

import pytest
import torch

import dqtk
from dqtk.bench import bench_model, bench_step, record_step, run
from dqtk.bench.memory import NotMeasured
from dqtk.bench.variants import in_dtype
from dqtk.costs import CostTable
from dqtk.nn import kept_weights
from dqtk.policy import protecting
from dqtk.recipes import recipe_named
from dqtk.report.sizes import bytes_in_memory
from dqtk.spec import ByLevel, ConstantToken, without

SECONDS = {"bfloat16": 6.0, "float32": 12.0, "w8a8": 2.0, "w4a8": 3.0, "w4a16": 8.0, "w4a16, kept": 6.5, "integers": 2.0}
INTEGERS = dqtk.Recipe(
    name="integers",
    rules=(dqtk.Rule(pattern="*.attn1.to_q", spec=recipe_named("w8a8").main_spec(), why="test"), dqtk.Rule(spec=None, why="test")),
)


@pytest.fixture
def fixed_times(monkeypatch):
    """Every variant takes the seconds of the table above, a tenth more in each round; the groups that ran."""
    groups = []

    def interleaved(methods, repeats, *, done, **how):
        groups.append(list(methods))
        for call in methods.values():
            call()
        return {name: [SECONDS[name] * (1 + i / 10) for i in range(repeats)] for name in methods}

    monkeypatch.setattr(run, "interleaved", interleaved)
    monkeypatch.setattr(run, "rise", lambda call, device: 1000)
    return groups


@pytest.fixture
def step(load_tiny):
    return record_step(load_tiny("pixart", torch.bfloat16))


def test_ratios_sizes_and_kernels(step, fixed_times):
    found = bench_step(step, ["w8a8", "w4a8"], repeats=3, model="tiny", progress=False)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["bfloat16", "float32", "w8a8", "w4a8"]
    assert fixed_times == [["bfloat16", "float32", "w8a8", "w4a8"]]
    assert rows["w8a8"].seconds.median == pytest.approx(2.2)
    assert [rows[name].over_16_bit and rows[name].over_16_bit.median for name in rows] == [None, 0.5, 3.0, 2.0]
    assert [rows[name].over_float32 and rows[name].over_float32.median for name in rows] == [2.0, None, 6.0, 4.0]
    assert all(row.paired for row in rows.values())
    plan = dqtk.plan(step.module, "w8a8")
    parameters = sum(p.numel() for p in step.module.parameters())
    assert rows["w8a8"].disk_bytes == plan.sizes("model")["bytes_after"]
    assert (rows["bfloat16"].disk_bytes, rows["float32"].disk_bytes) == (2 * parameters, 4 * parameters)
    assert rows["bfloat16"].weight_bytes == bytes_in_memory(in_dtype(step.module, torch.bfloat16))
    assert rows["w4a8"].weight_bytes < rows["w8a8"].weight_bytes < rows["bfloat16"].weight_bytes < rows["float32"].weight_bytes
    assert rows["w8a8"].memory_bytes == rows["w8a8"].weight_bytes + 1000
    assert sum(rows["w8a8"].kernels.values()) == sum(choice.spec is not None for choice in plan.choices)
    assert any(kernel.startswith("linear_int8") for kernel in rows["w8a8"].kernels)
    assert rows["bfloat16"].kernels == {}
    for row in rows.values():
        assert 0 <= row.outside < 1
        assert row.roofline > 0
    text = found.table()
    assert "w8a8      2.200 s" in text
    assert "3.00 (3.00 to 3.00)" in text
    assert "without data" in text
    assert "ceilings here: float32" in text


def test_what_does_not_fit_is_measured_one_after_another(step, fixed_times, monkeypatch):
    monkeypatch.setattr(run, "available", lambda device: 0)
    found = bench_step(step, ["w8a8", "w4a8"], repeats=2, progress=False)
    assert fixed_times == [["bfloat16", "float32"], ["bfloat16", "w8a8"], ["bfloat16", "w4a8"]]
    rows = {row.name: row for row in found.rows}
    assert rows["w8a8"].over_16_bit.median == pytest.approx(3)
    assert rows["w8a8"].over_float32.median == pytest.approx(6)  # through the 16-bit model: 3 times 2
    assert [row.paired for row in found.rows] == [True, True, False, False]
    assert "6.00 (6.00 to 6.00) *" in found.table()
    assert "*: not in the same rounds as float32" in found.table()


def test_emulated_recipes_are_never_timed(step, fixed_times):
    found = bench_step(step, ["w8a8", "fp8"], repeats=1, layers=True, progress=False)
    row = found.rows[-1]
    assert row.name == "fp8"
    assert fixed_times == [["bfloat16", "float32", "w8a8"]]
    assert row.emulated > 0
    assert (row.seconds, row.over_16_bit, row.over_float32, row.roofline, row.outside, row.memory_bytes) == (None,) * 6
    assert row.disk_bytes == dqtk.plan(step.module, "fp8").sizes("model")["bytes_after"]
    assert f"fp8: not timed: {row.emulated} of " in found.table()
    (line,) = [line for line in found.table().splitlines() if line.startswith("fp8  ")]
    assert line.split()[1] == "emulated"
    assert " to " not in line
    emulated = [cost for cost in found.costs.costs if cost.kernel.endswith("emulated in floating point")]
    assert emulated
    assert all(cost.milliseconds is None and cost.over_16_bit is None and cost.over_float32 is None for cost in emulated)
    assert any(cost.milliseconds for cost in found.costs.costs)


def test_the_cost_table_knows_every_quantized_site(step):
    found = bench_step(step, ["w8a8"], repeats=1, layers=True, progress=False)
    table = CostTable.from_json(json.loads(json.dumps(found.to_json()))["costs"])
    assert table == found.costs
    plan = dqtk.plan(run.MetaPipeline({"transformer": step.module}), "w8a8")
    for choice in plan.choices:
        if choice.spec is not None:
            assert table.milliseconds(choice.site, choice.spec) > 0
            assert table.milliseconds(choice.site, None) > 0
    assert (table.dtype, table.device) == ("bfloat16", "cpu")
    assert "kernel" in found.table().splitlines()[-len(table.costs) - 2]


def test_the_cost_table_knows_layers_that_go_without_what_was_looked_for(step):
    """w4a8 asks for a constant token, which PixArt's text does not have; allocation asks for the time of what is left."""
    found = bench_step(step, ["w4a8"], repeats=1, layers=True, progress=False)
    plan = dqtk.plan(run.MetaPipeline({"transformer": step.module}), "w4a8")
    text = [choice for choice in plan.choices if choice.spec is not None and choice.spec.looks]
    assert text
    for choice in text:
        assert found.costs.milliseconds(choice.site, without(choice.spec, ConstantToken)) > 0


def test_json_holds_what_the_table_says(step, fixed_times):
    data = json.loads(json.dumps(bench_step(step, ["w8a8"], repeats=2, model="tiny", progress=False).to_json()))
    assert (data["model"], data["component"], data["dtype"], data["repeats"]) == ("tiny", "transformer", "bfloat16", 2)
    assert data["rows"][2]["over_16_bit"]["median"] == pytest.approx(3)
    assert data["rows"][2]["memory_bytes"] == data["rows"][2]["weight_bytes"] + 1000
    assert data["costs"] is None
    assert data["ceilings"]["rates"]["int8"] > 0
    assert {"torch", "dqtk"} <= set(data["versions"])
    assert "threads" in data["hardware"]


def test_a_quantized_pipeline_is_timed_as_it_is(load_tiny, fixed_times, monkeypatch):
    pipe = load_tiny("pixart", torch.bfloat16)
    dqtk.quantize(pipe, "w8a8", progress=False)
    found = bench_model(pipe, repeats=1, progress=False)
    assert [row.name for row in found.rows] == ["bfloat16", "float32", "w8a8"]
    assert found.codes == "the model's own codes"
    assert found.rows[2].weight_bytes < found.rows[0].weight_bytes < found.rows[1].weight_bytes
    with pytest.raises(ValueError, match="layers are quantized already"):
        bench_model(pipe, ["w4a8"], repeats=1, progress=False)


def test_step_policies_are_not_timed_by_one_of_their_intervals(load_tiny, step, fixed_times):
    """Saved or still a recipe: one step would run the kernels of one interval."""
    pipe = load_tiny("pixart", torch.bfloat16)
    plan = dqtk.plan(pipe, "w8a8", policy=protecting([(0, 0.2)]))
    dqtk.quantize(pipe, plan, call_kwargs={"num_inference_steps": 5}, progress=False)
    said = r"bench: transformer:.* must have one spec for all noise levels, got a step policy: W8 per channel, A16 to 20 % / A8"
    with pytest.raises(ValueError, match=said):
        bench_model(pipe, repeats=1, progress=False)
    mine = next(choice.spec for choice in plan.choices if isinstance(choice.spec, ByLevel))
    with pytest.raises(ValueError, match=said):
        bench_step(step, [dqtk.Recipe(name="mine", rules=(dqtk.Rule(spec=mine, why="test"),))], progress=False)
    assert fixed_times == []


def test_decoded_weights_that_are_kept(step, fixed_times):
    """A row more for every recipe that decodes, with its memory; none for integer layers alone, and the other rows keep nothing."""
    found = bench_step(step, ["w4a16", INTEGERS], repeats=1, kept_decoded="1GiB", progress=False)
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["bfloat16", "float32", "w4a16", "w4a16, kept", "integers"]
    kept = rows["w4a16, kept"]
    assert kept.kept_bytes > 0
    assert kept.weight_bytes == rows["w4a16"].weight_bytes + kept.kept_bytes
    assert {row.kept_bytes for name, row in rows.items() if name != "w4a16, kept"} == {0}
    assert kept.disk_bytes == rows["w4a16"].disk_bytes
    assert any("decoded once and kept in memory" in kernel for kernel in kept.kernels)
    assert not any("kept" in kernel for kernel in rows["w4a16"].kernels)
    assert re.search(r"w4a16, kept: [\d.]+ [kM]B of its weights are decoded ones", found.table())
    assert kept_weights(step.module) == []


def test_a_budget_bounds_what_is_kept(step, fixed_times):
    found = bench_step(step, ["w4a16"], repeats=1, kept_decoded=100_000, progress=False)
    assert 0 < found.rows[3].kept_bytes <= 100_000
    with pytest.raises(ValueError, match="kept_decoded must stand with a recipe whose layers decode their weights, got none"):
        bench_step(step, [INTEGERS], kept_decoded="1GiB", progress=False)


def test_a_quantized_pipeline_keeps_nothing_behind_a_bench(load_tiny, fixed_times):
    pipe = load_tiny("pixart", torch.bfloat16)
    dqtk.quantize(pipe, "w4a16", progress=False)
    found = bench_model(pipe, repeats=1, kept_decoded="1GiB", progress=False)
    assert [row.name for row in found.rows] == ["bfloat16", "float32", "w4a16", "w4a16, kept"]
    assert found.rows[3].kept_bytes > 0 == found.rows[2].kept_bytes
    assert kept_weights(pipe.transformer) == []


def test_without_recipes_there_is_nothing_to_compare(step):
    with pytest.raises(ValueError, match="recipes must name at least one for an unquantized model, got none"):
        bench_step(step, [], progress=False)


def test_memory_that_cannot_be_measured_is_said(step, fixed_times, monkeypatch):
    def refuse(call, device):
        raise NotMeasured("no /proc")

    monkeypatch.setattr(run, "rise", refuse)
    found = bench_step(step, ["w8a8"], repeats=1, progress=False)
    assert all(row.memory_bytes is None for row in found.rows)
    assert "w8a8: memory not measured: no /proc" in found.table()


def test_nothing_of_the_pipeline_is_changed(load_tiny, fixed_times):
    pipe = load_tiny("sdxl", torch.bfloat16)
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in pipe.unet.state_dict().items()}
    bench_model(pipe, ["w8a8"], repeats=1, progress=False)
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in pipe.unet.state_dict().items()} == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in pipe.unet.modules())
