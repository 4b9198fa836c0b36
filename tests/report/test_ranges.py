"""Ranges over the noise level: bits that one range for all levels leaves unused, as seen on a run and as calibration has them."""

import xml.etree.ElementTree as ET

import pytest
import torch

import dqtk
from dqtk.calibrate import Stats
from dqtk.calibrate.levels import bucket_of
from dqtk.calibrate.stats import InputStat, Key
from dqtk.report.notebook import Ranges
from dqtk.report.ranges import range_curves, ranges_seen, widths_of
from dqtk.sites import Site, find_sites


def site(path, role, shared=None):
    return Site(id=f"unet:{path}", kind="linear", role=role, shape=(4, 4), bias=True, shared_input=shared)


SITES = [
    site("a.to_q", "self_attn.q", "unet:a.qkv"),
    site("a.to_k", "self_attn.k", "unet:a.qkv"),
    site("b", "ff.up"),
    site("c", "ff.up"),
    site("d", "conv"),
    site("e", "other"),
]


def test_unused_bits_are_those_between_a_level_and_the_widest():
    widths = {("unet:a.to_q", 0.9): 8.0, ("unet:a.to_q", 0.1): 1.0, ("unet:a.to_k", 0.9): 8.0, ("unet:a.to_k", 0.1): 1.0}
    widths |= {("unet:b", 0.9): 1.0, ("unet:b", 0.1): 4.0, ("unet:c", 0.9): 4.0, ("unet:c", 0.1): 4.0}
    widths |= {("unet:d", 0.5): 3.0, ("unet:e", 0.9): 0.0, ("unet:e", 0.1): 0.0}
    first, second = range_curves(widths, SITES)
    assert (first.role, first.num_layers, first.levels, first.unused) == ("self_attn.q, k, v", 1, (0.9, 0.1), (0.0, 3.0))
    assert (second.role, second.num_layers, second.unused) == ("ff.up", 2, (1.0, 0.0))  # the median of 2 bits and none


def test_what_a_run_shows_is_what_calibration_saw(pixart):
    plan = dqtk.plan(pixart, "w8a8-static")
    sites = [c.site for c in plan.choices if c.spec is not None and c.spec.needs_ranges and c.site.component == "transformer"]
    kwargs = {"num_inference_steps": 3}
    with ranges_seen(pixart) as widths:
        stats = dqtk.calibrate(pixart, ["a red disc"], plan, call_kwargs=kwargs, progress=False)
    levels = sorted({level for _, level in widths}, reverse=True)
    assert len(levels) == 3
    assert len({bucket_of(level, stats.num_buckets) for level in levels}) == 3  # each in a bucket of its own
    for one in sites:
        for level in levels:
            mine = [e for key, e in stats.inputs.items() if (key.site, key.bucket) == (one.id, bucket_of(level, stats.num_buckets))]
            low, high = min(float(e.low) for e in mine), max(float(e.high) for e in mine)
            assert widths[one.id, level] == max(high, 0) - min(low, 0)
    assert not any(part._forward_pre_hooks for part in pixart.transformer.modules())
    known = {curve.role: curve.unused for curve in range_curves(widths_of(stats), sites)}
    assert {c.role: c.unused for c in range_curves(widths, sites)} == known
    assert len(known) > 3


def test_infinite_inputs_and_unknown_levels_are_left_out(pixart):
    module = pixart.transformer
    sites = find_sites(module, "transformer")
    layer = module.get_submodule(sites[-1].path)
    with ranges_seen(pixart) as widths:
        layer(torch.full((1, layer.in_features), torch.inf))  # no denoiser call: no level
    assert widths == {}


def test_a_picture_for_notebooks():
    stats = Stats()
    for bucket, end in ((2, 1.0), (9, 4.0)):
        stats.add(Key("unet:b", bucket, "all"), InputStat(torch.tensor([-end]), torch.tensor([end]), torch.ones(4), 1))
    root = ET.fromstring(Ranges(stats, SITES)._repr_svg_())
    assert "ff.up (1 layer)" in {part.text for part in root.iter("{http://www.w3.org/2000/svg}text")}
    with pytest.raises(
        ValueError, match=r"^Ranges: stats must hold ranges at two noise levels at least, got none\. Calibrate a static"
    ):
        Ranges(Stats(), SITES)._repr_svg_()
