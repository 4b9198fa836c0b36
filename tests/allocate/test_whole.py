"""Whole plans: layers go in and come out, what is judged is what quantizing makes, and nothing is judged twice."""

import math
from dataclasses import replace

import pytest
from torch import nn

import dqtk
from dqtk.allocate.probes import OutputSQNR
from dqtk.allocate.whole import Judged, Layers, OutputNoise, decibels, key_of


@pytest.fixture
def layers(measured):
    made = Layers(measured.pipe.components)
    made.complete(measured.plans, measured.stats)
    return made


@pytest.fixture
def noise(measured):
    return OutputNoise(measured.pipe.components, measured.stats.calls)


def mixed(measured):
    """2, 8 and 16 bits."""
    two, _, eight = measured.plans
    return dict(zip((c.site.id for c in two.choices), (two.choices[0].spec, eight.choices[1].spec, None), strict=True))


def test_it_is_judged_as_it_would_be_quantized(measured, layers, noise):
    originals = dict(measured.pipe.components["transformer"].named_children())
    picked = mixed(measured)
    with layers.put(picked):
        found = noise()
    assert dict(measured.pipe.components["transformer"].named_children()) == originals
    probe = OutputSQNR(measured.pipe.components, measured.stats.calls)
    plan = replace(measured.plans[0], choices=tuple(replace(c, spec=picked[c.site.id]) for c in measured.plans[0].choices))
    dqtk.quantize(measured.pipe, plan, progress=False)
    assert decibels(found) == pytest.approx(probe("transformer"), abs=1e-9)
    assert decibels(0.0) == math.inf


def test_layers_come_out_when_judging_fails(measured, layers):
    with pytest.raises(RuntimeError, match="stop"), layers.put(mixed(measured)):
        raise RuntimeError("stop")
    assert all(type(layer) is nn.Linear for layer in measured.pipe.components["transformer"].children())


def test_what_is_there_is_not_made_again(measured):
    layers, told = Layers(measured.pipe.components), []
    layers.complete(measured.plans[:1], None, told=told.append)
    first = dict(layers.made)
    layers.complete(measured.plans, None, told=told.append)
    assert len(told) == len(layers.made) == 9
    assert all(layers.made[key] is layer for key, layer in first.items())


def test_it_stops_above_the_limit(measured, layers, noise):
    """Noise powers only add up: what is above the limit after some calls is above it after all."""
    with layers.put(mixed(measured)):
        whole = noise()
        seen = []
        measured.pipe.components["transformer"].register_forward_pre_hook(lambda *args: seen.append(1))
        early = noise(whole / 10)
        assert whole / 10 < early < whole
        assert len(seen) < len(measured.stats.calls)
        assert noise(whole) == whole


def test_overflow_is_the_worst(measured, layers, noise):
    measured.pipe.components["transformer"].last.bias.data[0] = math.inf
    assert noise() == math.inf


def test_without_calls_nothing_can_be_judged(measured):
    with pytest.raises(ValueError, match="calls of a denoiser must have been kept, got none"):
        OutputNoise(measured.pipe.components, [])


class Counted:
    name = "counted"

    def __init__(self, judge):
        self.judge, self.num = judge, 0

    def __call__(self, limit=math.inf):
        self.num += 1
        return self.judge(limit)


def test_judgements_are_kept(measured, layers, noise, tmp_path):
    counted, picked = Counted(noise), mixed(measured)
    judged = Judged(layers, counted, tmp_path / "work", {"run": "a"})
    loss = judged(picked)
    again = Judged(layers, counted, tmp_path / "work", {"run": "a"})
    assert again(picked) == again(dict(reversed(picked.items())), 1e-9) == loss
    assert counted.num == 1
    with pytest.raises(ValueError, match=r"different: run\)"):
        Judged(layers, counted, tmp_path / "work", {"run": "b"})


def test_a_bound_is_no_loss(measured, layers, noise, tmp_path):
    """What was only known to be above a low limit is judged again for a higher one, and not for a lower."""
    counted, picked = Counted(noise), mixed(measured)
    judged = Judged(layers, counted, tmp_path / "work", {})
    bound = judged(picked, 1e-9)
    assert judged(picked, 1e-10) == bound > 1e-9
    assert counted.num == 1
    assert judged(picked) > bound
    assert counted.num == 2


def test_keys_tell_plans_apart(measured):
    picked = mixed(measured)
    site = next(iter(picked))
    assert key_of(picked) == key_of(dict(reversed(picked.items())))
    assert key_of(picked) != key_of(picked | {site: None})
