"""Statistics merge in any order, survive a file, and know their ranges."""

import importlib

import pytest
import torch
from safetensors.torch import save_file

from dqtk.calibrate import InputStat, Key, Stats
from dqtk.calibrate.record import observe


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collect(parts, num_prompts=1):
    stats = Stats(num_prompts=num_prompts)
    for i, part in enumerate(parts):
        stats.add(Key(f"unet:layer{i % 2}", i % 3, "cond"), observe(part, "linear"))
    return stats


def same(a, b):
    assert (a.num_buckets, a.num_prompts) == (b.num_buckets, b.num_prompts)
    assert a.inputs.keys() == b.inputs.keys()
    for key, seen in a.inputs.items():
        other = b.inputs[key]
        assert seen.count == other.count
        for name in ("low", "high", "channel_absmax"):
            assert torch.equal(getattr(seen, name), getattr(other, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_observation_equals_brute_force(dtype):
    x = seeded(2, 5, 7).to(dtype)
    seen = observe(x, "linear")
    rows = x.float().reshape(10, 7)
    assert (float(seen.low), float(seen.high), seen.count) == (float(rows.min()), float(rows.max()), 10)
    assert seen.channel_absmax.tolist() == [float(rows[:, k].abs().max()) for k in range(7)]
    assert {t.dtype for t in (seen.low, seen.high, seen.channel_absmax)} == {torch.float32}


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 5, 6, 4), (1, 5, 3, 6, 4)], ids=str)
def test_convolutions_have_their_channels_second(shape):
    x = seeded(*shape)
    seen = observe(x, "conv")
    assert torch.equal(seen.channel_absmax, x.abs().transpose(0, 1).flatten(1).amax(1))
    assert seen.count == x.numel() // 5


def test_merging_equals_one_pass():
    """In any grouping and order, entries of a key or of several."""
    parts = [seeded(3, 4, seed=i) * (i + 1) for i in range(12)]
    key = Key("unet:a", 0, "all")
    whole = Stats()
    whole.add(key, observe(torch.cat(parts), "linear"))
    for split in (1, 5, 11):
        first, second = Stats(), Stats()
        for i, part in enumerate(parts):
            (first if i < split else second).add(key, observe(part, "linear"))
        same(first.merge(second), whole)
        same(second.merge(first), whole)


def test_merging_keeps_keys_apart_and_its_operands_as_they_are():
    a, b = collect([seeded(3, 4, seed=i) for i in range(4)]), collect([seeded(3, 4, seed=i + 9) * 5 for i in range(6)], 2)
    before = {key: (float(seen.low), seen.count) for key, seen in a.inputs.items()}
    merged = a.merge(b)
    assert merged.num_prompts == 3
    assert merged.inputs.keys() == a.inputs.keys() | b.inputs.keys()
    assert {key: (float(seen.low), seen.count) for key, seen in a.inputs.items()} == before


def test_merging_refuses_other_buckets():
    with pytest.raises(ValueError, match=r"Stats\.merge: num_buckets must be 20, got 5"):
        Stats().merge(Stats(num_buckets=5))


def test_range_of_a_site_spans_levels_and_branches():
    stats = Stats()
    stats.add(Key("unet:a", 0, "cond"), observe(torch.tensor([[-1.0, 2.0]]), "linear"))
    stats.add(Key("unet:a", 7, "uncond"), observe(torch.tensor([[-3.0, 1.0]]), "linear"))
    stats.add(Key("unet:ab", 7, "uncond"), observe(torch.tensor([[-30.0, 10.0]]), "linear"))
    low, high = stats.input_range("unet:a")
    assert (low.tolist(), high.tolist()) == ([-3.0], [2.0])
    assert len(list(stats.of("unet:a"))) == 2


def test_range_of_an_unseen_site():
    with pytest.raises(ValueError, match=r"Stats: unet:a must have been called during calibration, got no statistics"):
        Stats().input_range("unet:a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_range_of_a_broken_site(value):
    stats = Stats()
    stats.add(Key("unet:a", 0, "all"), observe(torch.tensor([[1.0, 2.0]]), "linear"))
    stats.add(Key("unet:a", 1, "all"), observe(torch.tensor([[1.0, value]]), "linear"))
    with pytest.raises(ValueError, match=r"Stats: inputs of unet:a must be finite, got .*keep the site at 16 bits"):
        stats.input_range("unet:a")


@pytest.mark.parametrize("site", ["unet:down_blocks.0.conv", "model:", "text_encoder:a|b"])
def test_file_round_trip(tmp_path, site):
    stats = collect([seeded(3, 4, seed=i) for i in range(7)], 5)
    stats.add(Key(site, -1, "all"), observe(seeded(2, 9), "linear"))
    stats.save(tmp_path / "stats.safetensors")
    same(Stats.load(tmp_path / "stats.safetensors"), stats)
    assert [path.name for path in tmp_path.iterdir()] == ["stats.safetensors"]


def test_empty_file_round_trip(tmp_path):
    Stats(num_buckets=4).save(tmp_path / "s")
    same(Stats.load(tmp_path / "s"), Stats(num_buckets=4))


def test_keys_are_text_both_ways():
    for key in (Key("unet:a.b", 3, "cond"), Key("text_encoder:x|y", -1, "all")):
        assert Key.parse(str(key)) == key


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"Stats\.load: .*other must be a file written by Stats\.save"):
        Stats.load(tmp_path / "other")
    collect([seeded(3, 4)]).save(tmp_path / "cut")
    content = (tmp_path / "cut").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"Stats\.load: .*cut must be a complete file, got: .*Remove it and calibrate again"):
        Stats.load(tmp_path / "cut")


def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    old = collect([seeded(3, 4)])
    old.save(tmp_path / "s")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(importlib.import_module("dqtk.calibrate.stats"), "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        collect([seeded(3, 4) * 2], 2).save(tmp_path / "s")
    monkeypatch.undo()
    same(Stats.load(tmp_path / "s"), old)


def test_observations_merge_by_hand():
    one = torch.ones(1)
    merged = InputStat(-one, one, torch.tensor([1.0, 5.0]), 2).merge(InputStat(-3 * one, one / 2, torch.tensor([4.0, 2.0]), 3))
    assert (merged.low.item(), merged.high.item(), merged.channel_absmax.tolist(), merged.count) == (-3.0, 1.0, [4.0, 5.0], 5)
