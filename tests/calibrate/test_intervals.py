"""Intervals of the noise level: the cuts are the best there are, ranges are those of the calls in them, no drift means no table."""

import math
from itertools import combinations, pairwise

import pytest
import torch

from dqtk.calibrate.intervals import _cuts, by_drift, drift, edges_of, ranges_at, settled
from dqtk.calibrate.stats import InputStat, Key, Stats
from dqtk.plan import Choice
from dqtk.sites import Site
from dqtk.spec import Int, LayerSpec, PerChannel, PerLevel, PerTensor, TensorSpec

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
LEVELS = LayerSpec(weight=W8, input=TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerLevel(most=3)))


def stats_of(ranges, times=None):
    """Site -> a (low, high) per bucket; the denoiser was called at time 100 * bucket there, or at the times given."""
    stats = Stats()
    for site, ends in ranges.items():
        for bucket, (low, high) in enumerate(ends):
            for branch in ("uncond", "cond"):
                end = torch.tensor([float(low)]), torch.tensor([float(high)])
                stats.add(Key(f"unet:{site}", bucket, branch), InputStat(*end, torch.ones(4), 10))
            time = 100.0 * bucket if times is None else times[bucket]
            stats.saw("unet", bucket, time, time)
    return stats


def choice(path, spec=LEVELS):
    site = Site(id=f"unet:{path}", kind="linear", role="ff.up", shape=(8, 4), bias=True)
    return Choice(site=site, spec=spec, why="test")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [1, 2, 3, 7, 20])
def test_cuts_are_the_best_there_are(seed, most):
    num = 2 + seed
    draw = torch.Generator().manual_seed(seed)
    cost = torch.rand(num, num, generator=draw, dtype=torch.float64)
    cost = torch.where(torch.ones(num, num).triu() > 0, cost, torch.inf)

    def total(cuts):
        bounds = [0, *cuts, num]
        return float(sum(cost[a, b - 1] for a, b in pairwise(bounds)))

    everything = [cuts for parts in range(min(most, num)) for cuts in combinations(range(1, num), parts)]
    assert total(_cuts(cost, most)) == pytest.approx(min(map(total, everything)))


def test_edges_lie_where_ranges_jump_midway_between_times_seen():
    stats = stats_of({"a": [(-1, 1)] * 3 + [(-8, 8)] * 2 + [(-64, 64)] * 2})
    assert edges_of(stats, "unet", ["unet:a"], 3) == (250.0, 450.0)
    assert edges_of(stats, "unet", ["unet:a"], 2) == (250.0,)
    low, high = ranges_at(stats, "unet:a", (250.0, 450.0))
    assert (low.tolist(), high.tolist()) == ([-1, -8, -64], [1, 8, 64])


def test_time_may_run_against_the_level():
    """Some denoisers are given 1 - sigma: edges ascend in time all the same."""
    stats = stats_of({"a": [(0, 1), (0, 1), (0, 9)]}, times=[0.9, 0.5, 0.1])
    assert edges_of(stats, "unet", ["unet:a"], 2) == (pytest.approx(0.3),)
    assert ranges_at(stats, "unet:a", (0.3,))[1].tolist() == [9, 1]


def test_a_site_that_was_not_called_in_an_interval_has_its_whole_range_there():
    stats = stats_of({"a": [(0, 1), (0, 5), (0, 7)]})
    del stats.inputs[Key("unet:a", 0, "cond")], stats.inputs[Key("unet:a", 0, "uncond")]
    assert ranges_at(stats, "unet:a", (50.0, 150.0))[1].tolist() == [7, 5, 7]


def test_layers_without_drift_have_no_table():
    moves, stays = [(-1, 1), (-1, 1), (-10, 10), (-10, 10)], [(-3, 3)] * 4
    stats = stats_of({"moves": moves, "stays": stays})
    assert drift(stats, ["unet:stays", "unet:moves"], (150.0,)).tolist() == [1, pytest.approx((1 + 100) / 2)]
    found = settled([choice("moves"), choice("stays"), choice("other", None)], stats)
    granularities = [c.spec and c.spec.input.granularity for c in found]
    assert granularities[0].edges
    assert granularities[1:] == [PerTensor(), None]
    assert settled(found, stats) == found  # what is found stays


def test_one_level_only_makes_one_range():
    (found,) = settled([choice("a")], stats_of({"a": [(-1, 2)]}))
    assert found.spec.input.granularity == PerTensor()


def test_an_input_of_zeros_does_not_disturb():
    stats = stats_of({"zeros": [(0, 0)] * 3, "a": [(0, 1), (0, 1), (0, 4)]})
    assert edges_of(stats, "unet", ["unet:zeros", "unet:a"], 2) == (150.0,)
    assert drift(stats, ["unet:zeros"], (150.0,)).tolist() == [1]


def test_statistics_without_times_are_refused():
    stats = stats_of({"a": [(0, 1)]})
    stats.times.clear()
    with pytest.raises(ValueError, match=r"statistics must say at which times unet was called, got none\. .* or use PerTensor"):
        settled([choice("a")], stats)


def test_times_are_kept_in_files_and_merged(tmp_path):
    stats = stats_of({"a": [(0, 1), (0, 2)]})
    stats.save(tmp_path / "s")
    assert Stats.load(tmp_path / "s").times == stats.times == {("unet", 0): (0.0, 0.0), ("unet", 1): (100.0, 100.0)}
    other = Stats()
    other.saw("unet", 1, 90.0, 95.0)
    assert stats.merge(other).times == {("unet", 0): (0.0, 0.0), ("unet", 1): (90.0, 100.0)}


def test_a_bucket_that_an_edge_lies_in_counts_on_both_sides():
    stats = stats_of({"a": [(-50, 50), (-1, 1)]}, times=[0.0, 500.0])
    stats.saw("unet", 0, 0.0, 400.0)
    assert ranges_at(stats, "unet:a", (300.0,))[1].tolist() == [50, 50]
    assert ranges_at(stats, "unet:a", (450.0,))[1].tolist() == [50, 1]


def test_each_wish_for_a_number_of_intervals_is_kept():
    stats = stats_of({"a": [(-(4**i), 4**i) for i in range(4)], "b": [(-(4**i), 4**i) for i in range(4)]})
    two = LayerSpec(weight=W8, input=TensorSpec(format=Int(bits=8), granularity=PerLevel(most=2)))
    a, b = settled([choice("a"), choice("b", two)], stats)
    assert (len(a.spec.input.granularity.edges), len(b.spec.input.granularity.edges)) == (2, 1)


def test_spans_of_merged_statistics_that_overlap():
    stats = stats_of({"a": [(-(8**i), 8**i) for i in range(3)]}, times=[10.0, 20.0, 40.0])
    for bucket, high in enumerate((50.0, 30.0, 60.0)):
        stats.saw("unet", bucket, stats.times["unet", bucket][0], high)
    edges = edges_of(stats, "unet", ["unet:a"], 3)
    assert list(edges) == sorted(set(edges))


def test_drift_lies_where_ranges_move():
    """A range that doubles between two buckets moves by log 2, half of it in each; unseen buckets share what lies between."""
    stats = stats_of({"a": [(-1, 1)] * 3 + [(-2, 2)] * 2})
    moved = by_drift(stats).moved
    assert len(moved) == stats.num_buckets
    assert moved[2] == moved[3] == pytest.approx(math.log(2) / 2)
    assert sum(moved) == pytest.approx(math.log(2))

    gap = Stats()
    for bucket, end in ((0, 1.0), (4, 16.0)):
        gap.add(Key("unet:a", bucket, "all"), InputStat(torch.tensor([-end]), torch.tensor([end]), torch.ones(4), 10))
        gap.saw("unet", bucket, 100.0 * bucket, 100.0 * bucket)
    assert by_drift(gap).moved[:5] == pytest.approx([math.log(2) / 2, *[math.log(2)] * 3, math.log(2) / 2])


def test_drift_of_one_level_is_refused():
    with pytest.raises(ValueError, match=r"ranges at two noise levels at least, got none\. Calibrate a static recipe"):
        by_drift(stats_of({"a": [(-1, 1)]}))
