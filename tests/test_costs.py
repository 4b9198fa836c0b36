"""The cost table as data: keys, round trip, what it refuses."""

import json
from dataclasses import replace

import pytest

from dqtk.costs import Cost, CostTable, LayerShape, timed_as
from dqtk.recipes import recipe_named
from dqtk.sites import Site
from dqtk.spec import GPTQ, MSE, RTN, Hadamard, Int, LayerSpec, LowRank, PerChannel, PerGroup, Smooth, TensorSpec, VectorCodebook

W8A8, W4A8, RTN4 = (recipe_named(name).main_spec() for name in ("w8a8", "w4a8", "w4a8-rtn"))
FP8 = recipe_named("fp8").main_spec()
WIDE = LayerShape(weight=(96, 64), input=(300, 64), bias=True)
CONV = LayerShape(weight=(32, 16, 3, 3), input=(2, 16, 9, 12), bias=False, stride=(2, 1), padding=(1, 0), dilation=(1, 2))
SITE = Site(id="transformer:blocks.0.to_q", kind="linear", role="self_attn.q", shape=(96, 64), bias=True)


def cost(shape, spec, milliseconds, **more):
    return Cost(shape=shape, spec=spec, kernel="k", milliseconds=milliseconds, **more)


@pytest.fixture
def table():
    costs = (
        cost(WIDE, None, 4.0, low=3.5, high=4.25, over_float32=2.5),
        cost(WIDE, W8A8, 2.0, over_16_bit=2.0, over_float32=5.0),
        cost(WIDE, W4A8, 2.5),
        cost(WIDE, FP8, None),
        cost(CONV, None, 7.0),
    )
    calls = {SITE.id: (WIDE, WIDE), "transformer:conv": (CONV,)}
    return CostTable(
        dtype="bfloat16",
        device="cpu",
        hardware={"processor": "x", "threads": "2"},
        versions={"torch": "1"},
        costs=costs,
        calls=calls,
    )


def test_a_site_costs_all_of_its_calls(table):
    assert table.milliseconds(SITE, None) == 8.0
    assert table.milliseconds(SITE, W8A8) == 4.0


def test_what_cannot_change_speed_is_no_part_of_the_key(table):
    other = replace(W4A8, solver=GPTQ(sweeps=7), transforms=(Smooth(alpha=0.3),), correct_bias=True)
    other = replace(other, weight=replace(other.weight, range=MSE()))
    assert table.milliseconds(SITE, other) == 5.0
    with pytest.raises(ValueError, match="must have been measured at 300 x 64 -> 96"):
        table.milliseconds(SITE, RTN4)  # without the multiplication of its inputs


def test_what_can_change_speed_is():
    base = timed_as(W8A8)
    int4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32))
    changed = [
        replace(W8A8, weight=int4),
        replace(W8A8, weight=replace(int4, granularity=PerGroup(size=64))),
        replace(W8A8, input=None),
        replace(W8A8, transforms=(Hadamard(),)),
        replace(W8A8, transforms=(Hadamard(block=64),)),
        replace(W8A8, low_rank=LowRank(rank=8)),
        replace(W8A8, low_rank=LowRank(rank=16)),
        recipe_named("w8a8-static").main_spec(),
    ]
    keys = [timed_as(spec) for spec in changed]
    assert len({base, *keys}) == len(changed) + 1
    assert timed_as(replace(changed[3], transforms=(Hadamard(seed=5),))) == keys[3]
    assert timed_as(replace(changed[5], low_rank=LowRank(rank=8, iterations=3, shared=True))) == keys[5]
    assert timed_as(None) is None


def test_smoothed_vectors_have_one_key_whatever_the_strength():
    """Their smoothing cannot be searched, so the key has a strength."""
    weight = TensorSpec(format=VectorCodebook(books=2), granularity=PerChannel())
    keys = {timed_as(LayerSpec(weight=weight, solver=s, transforms=(Smooth(alpha=a),))) for s, a in ((RTN(), 0.2), (GPTQ(), 0.7))}
    assert len(keys) == 1


def test_words_cost_the_same_whoever_holds_them():
    own, shared = (
        LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2, group=group), granularity=PerChannel()))
        for group in (None, "all")
    )
    assert timed_as(shared) == timed_as(own) == own


def test_emulated_layers_have_no_time(table):
    with pytest.raises(ValueError, match=r"must have a kernel on cpu, got: k\. Emulated layers have no time"):
        table.milliseconds(SITE, FP8)


def test_sites_that_it_does_not_know(table):
    with pytest.raises(ValueError, match=r"one of the 2 that a step reached, got transformer:other"):
        table.milliseconds(replace(SITE, id="transformer:other"), None)
    with pytest.raises(ValueError, match=r"must have weight \[96, 64\], got \[96, 32\]"):
        table.milliseconds(replace(SITE, shape=(96, 32)), None)


def test_round_trip(table, tmp_path):
    data = json.loads(json.dumps(table.to_json()))
    assert CostTable.from_json(data) == table
    (tmp_path / "costs.json").write_text(json.dumps(data))
    (tmp_path / "bench.json").write_text(json.dumps({"rows": [], "costs": data}))
    assert CostTable.load(tmp_path / "costs.json") == CostTable.load(tmp_path / "bench.json") == table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2"),
        ({"shapes": [{"size": 3}]}, "must have the fields that to_json writes, got: TypeError"),
        ({"shapes": []}, "must have the fields that to_json writes, got: IndexError"),
        ({"specs": {"s0": {"type": "Layer"}}}, r"specs\.s0: type must be one of"),
    ],
)
def test_files_that_are_no_table(table, change, said):
    with pytest.raises(ValueError, match=said):
        CostTable.from_json(table.to_json() | change)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json must be a readable JSON file"):
        CostTable.load(tmp_path / "nowhere.json")
    (tmp_path / "bench.json").write_text('{"rows": [], "costs": null}')
    with pytest.raises(ValueError, match=r"got a bench without one\. Add --layers"):
        CostTable.load(tmp_path / "bench.json")


def test_merging_adds_and_newer_times_win(table):
    other = replace(table, costs=(cost(WIDE, W8A8, 1.0), cost(WIDE, RTN4, 3.0)), calls={"transformer:x": (WIDE,)})
    both = table.merged(other)
    assert both.milliseconds(SITE, W8A8) == 2.0
    assert both.milliseconds(SITE, RTN4) == 6.0
    assert both.milliseconds(SITE, None) == 8.0
    assert len(both.costs) == len(table.costs) + 1
    assert set(both.calls) == {*table.calls, "transformer:x"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cuda"}, "device must be cpu in both tables, got cuda"),
        ({"dtype": "float16"}, "dtype must be bfloat16 in both tables, got float16"),
        ({"hardware": {"processor": "x", "threads": "1"}}, "hardware must be .*'threads': '2'.*, got .*'threads': '1'"),
        ({"calls": {SITE.id: (replace(WIDE, input=(5, 64)),)}}, "to_q must be called in the same shapes in both tables"),
    ],
)
def test_tables_of_two_places_do_not_merge(table, change, said):
    with pytest.raises(ValueError, match=said):
        table.merged(replace(table, **change))


def test_shapes_count_like_torch():
    import torch

    layer = torch.nn.Conv2d(16, 32, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    y = layer(torch.zeros(CONV.input))
    assert CONV.rows == y.numel() // y.shape[1]
    assert CONV.operations == 2 * CONV.rows * 32 * 16 * 9
    assert (WIDE.kind, CONV.kind, WIDE.rows, WIDE.operations) == ("linear", "conv", 300, 2 * 300 * 64 * 96)
    assert (str(WIDE), str(CONV)) == ("300 x 64 -> 96", "2 x 16 x 9x12 -> 32, kernel 3x3")


def test_a_spec_of_ones_own():
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=3), granularity=PerGroup(size=8)))
    assert timed_as(spec) == spec
