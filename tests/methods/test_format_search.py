"""Which split of a float is found, and that it is the best of all."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dqtk.methods.format_search import ROWS, concrete, concrete_input
from dqtk.methods.solve import solve
from dqtk.numerics.affine import rounded
from dqtk.numerics.codebook import adaptive_log, log_grid
from dqtk.numerics.inputs import round_input
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import MSE, AbsMax, BestFloat, Float, Int, LayerSpec, PerChannel, PerGroup, PerTensor, TensorSpec

SEARCH = MSE(steps=20, least=0.3, most=1.3)


def spec_of(bits, signed=True, how=SEARCH):
    return TensorSpec(format=BestFloat(bits=bits, signed=signed), granularity=PerChannel(), range=how)


def uniform(seeded, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def heavy(seeded, *shape):
    return seeded(*shape) * torch.exp2(2.5 * seeded(*shape, seed=1))


def lost(values, spec):
    return float((fit_grid(values, spec).round(values) - values).square().sum())


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_even_data_take_mantissa_bits_and_heavy_tails_exponents(bits, seeded):
    flat, tailed = (concrete(make(seeded, 32, 256), spec_of(bits)).format for make in (uniform, heavy))
    assert flat == Float(exponent=1, mantissa=bits - 2)
    assert tailed.exponent > flat.exponent
    assert tailed.bits == flat.bits == bits


def test_normal_weights_lie_between(seeded):
    """Two exponent bits in a byte of four, as E2M1 has (and three or so in eight: Kuzmin et al., figure 2)."""
    assert concrete(seeded(64, 512), spec_of(4)).format == Float(exponent=2, mantissa=1)
    assert concrete(seeded(64, 512), spec_of(8)).format.exponent in (2, 3)


@pytest.mark.parametrize("how", [AbsMax(), SEARCH], ids=["absmax", "mse"])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
@pytest.mark.parametrize("make", [uniform, heavy], ids=["uniform", "heavy"])
def test_no_split_loses_less(make, bits, how, seeded):
    weight, spec = make(seeded, 16, 64), spec_of(bits, how=how)
    found = concrete(weight, spec)
    assert replace(found, format=spec.format) == spec
    every = {form: lost(weight, replace(spec, format=form)) for form in spec.format.splits}
    assert len(every) == min(bits - 1, 5)
    assert every[found.format] == min(every.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_scale_of_a_weight_does_not_matter(bits, seeded):
    for make in (uniform, heavy):
        weight = make(seeded, 16, 64)
        found = [concrete(weight * by, spec_of(bits)).format for by in (1.0, 1000.0, 1e-3, 1e-12)]
        assert len(set(found)) == 1
        found = [
            concrete_input(weight * by, replace(spec_of(bits), granularity=PerTensor()))[0].format for by in (1.0, 1000.0, 1e-3)
        ]
        assert len(set(found)) == 1


def test_large_weights_are_judged_by_some_rows(seeded):
    """Rows from the whole of it, not its beginning."""
    weight = torch.cat([uniform(seeded, ROWS, 64), heavy(seeded, 3 * ROWS, 64)])
    assert concrete(weight, spec_of(4)).format.exponent > 1
    assert concrete(weight[:ROWS], spec_of(4)).format.exponent == 1


def test_a_given_format_is_left_alone(seeded):
    for form in (Float(), Int(bits=4)):
        spec = TensorSpec(format=form, granularity=PerGroup(size=8))
        assert concrete(seeded(4, 16), spec) is spec


def test_a_static_input_is_rounded_as_it_was_judged(seeded):
    """Scale and zero are those of the split that is returned."""
    sample = F.silu(seeded(64, 32))
    for form in (BestFloat(bits=6, signed=False), BestFloat(bits=6), Float(), Int(bits=8, symmetric=False), Int(bits=8)):
        spec = TensorSpec(format=form, granularity=PerTensor(), range=SEARCH)
        found, scale, zero = concrete_input(sample, spec)
        assert scale.shape == (1, 1)
        assert (zero is None) == (getattr(found.format, "symmetric", getattr(found.format, "signed", None)))
        error = (rounded(sample, scale, zero, found.format) - sample).square().mean() / sample.square().mean()
        assert error < 2e-3


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_unsigned_floats_suit_what_silu_leaves(bits, seeded):
    """Outputs begin at -0.28, so half of the codes of a signed format would lie idle."""
    sample = F.silu(2 * seeded(256, 64))
    errors = []
    for signed in (False, True):
        spec = TensorSpec(format=BestFloat(bits=bits, signed=signed), granularity=PerTensor(), range=SEARCH)
        found, scale, zero = concrete_input(sample, spec)
        assert found.format.bits == bits
        errors.append(float((rounded(sample, scale, zero, found.format) - sample).square().sum()))
    assert errors[0] < 0.7 * errors[1]
    normal = seeded(256, 64)
    spec = TensorSpec(format=BestFloat(bits=bits, signed=False), granularity=PerTensor(), range=SEARCH)
    assert concrete_input(normal, spec)[2] > 0  # a range below 0 is reached through the zero


def attention_probabilities(seeded, sharp):
    return (sharp * seeded(64, 128)).softmax(-1)


@pytest.mark.parametrize("sharp", [0.5, 3.0])
def test_a_calibrated_input_takes_the_table_that_loses_least(sharp, seeded):
    """AdaLog's search over bases; what is stored has the one table."""
    sample = attention_probabilities(seeded, sharp)
    several = adaptive_log(4)
    found, _, zero = concrete_input(sample, TensorSpec(format=several, granularity=PerTensor(), range=SEARCH))
    assert zero is None
    assert len(found.format.tables) == 1
    assert found.format.tables[0] in several.tables

    def loss(form):
        tried, scale, _ = concrete_input(sample, TensorSpec(format=form, granularity=PerTensor(), range=SEARCH))
        return float((rounded(sample, scale, None, tried.format) - sample).square().sum())

    alone = [loss(replace(several, tables=(values,))) for values in several.tables]
    assert loss(found.format) == min(alone)
    assert min(alone) < loss(log_grid(4))  # base 2 is not what these inputs want


def test_layers_calibrate_an_input_with_several_tables(seeded, stats_of):
    """From the spec to a layer's numbers: the stored spec names one table, the layer rounds to it."""
    sample = attention_probabilities(seeded, 2.0)
    given = TensorSpec(format=adaptive_log(4), granularity=PerTensor(), range=SEARCH)
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()), input=given)
    assert spec.needs_stats
    assert spec.searches_input
    (solution,) = solve([seeded(8, 128, seed=2)], spec, stats_of(sample))
    assert len(solution.spec.input.format.tables) == 1
    x = round_input(sample, solution.spec.input, solution.tensors["input_scale"], None)
    assert (x - sample).norm() < 0.2 * sample.norm()
    assert len(x.unique()) <= 16


def test_the_order_of_channels_does_not_matter(seeded):
    """A per-tensor format of an input wider than what is looked at: no stride falls into step with the channels."""
    sample = seeded(1024, 192) * torch.exp2(2 * seeded(192, seed=1))
    spec = TensorSpec(format=BestFloat(bits=4), granularity=PerTensor(), range=SEARCH)
    found, scale, _ = concrete_input(sample, spec)
    for shift in (1, 63, 100):
        moved, moved_scale, _ = concrete_input(sample.roll(shift, dims=1), spec)
        assert moved.format == found.format
        assert moved_scale == pytest.approx(float(scale), rel=0.1)


def test_ends_that_the_sample_misses_are_in_the_range(seeded):
    sample = seeded(64, 32)
    spec = TensorSpec(format=Int(bits=8), granularity=PerTensor())
    _, scale, _ = concrete_input(sample, spec, (torch.tensor(-9.0), torch.tensor(20.0)))
    assert float(scale) == pytest.approx(20 / 127)
