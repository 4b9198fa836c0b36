"""Scales per interval from rows that know their time: each interval's own rows decide, and rounding follows the row's interval."""

from dataclasses import replace

import pytest
import torch

from dqtk.methods.format_search import concrete_input
from dqtk.methods.level_tables import intervals_of, tables
from dqtk.methods.solve import solve
from dqtk.spec import (
    GPTQ,
    MSE,
    BestFloat,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerLevel,
    PerTensor,
    Smooth,
    TensorSpec,
)

EDGES = (250.0, 500.0)
PER_LEVEL = PerLevel(edges=EDGES)
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())


def given(form, how=None):
    return TensorSpec(format=form, granularity=PER_LEVEL, **({} if how is None else {"range": how}))


@pytest.fixture
def inputs(correlated, stats_of):
    """300 rows whose size grows tenfold from interval to interval."""
    rows = correlated(300, 32)
    times = torch.arange(300) % 3 * 250.0 + 100
    rows = rows * 10.0 ** (torch.arange(300) % 3)[:, None]
    return replace(stats_of(rows), times=times, peak_times=times[:0])


def test_a_time_at_an_edge_lies_above_it():
    assert intervals_of(torch.tensor([0.0, 250, 499, 500, 999]), EDGES).tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("form", [Int(bits=8), Int(bits=8, symmetric=False), Float(), Float(exponent=4, mantissa=4, signed=False)])
@pytest.mark.parametrize("how", [None, MSE()])
def test_every_interval_has_the_scale_of_its_own_rows(inputs, form, how):
    spec = given(form, how)
    found, scale, zero = tables(inputs.sample, inputs.times, spec)
    assert found == spec
    alone = [concrete_input(inputs.sample[i::3], spec)[1:] for i in range(3)]
    assert torch.equal(scale, torch.cat([s for s, _ in alone]))
    assert (zero is None) == (alone[0][1] is None)
    if zero is not None:
        assert torch.equal(zero, torch.cat([z for _, z in alone]))
    assert bool((scale[1:] > 5 * scale[:-1]).all())


def test_one_format_for_all_intervals(inputs):
    found, scale, _ = tables(inputs.sample, inputs.times, given(BestFloat(bits=6), MSE()))
    assert isinstance(found.format, Float)
    assert scale.shape == (3, 1)


def test_an_interval_without_rows_takes_those_nearest_in_time(inputs):
    keep = inputs.times != 350
    _, scale, _ = tables(inputs.sample[keep], inputs.times[keep], given(Int(bits=8)))
    _, whole, _ = tables(inputs.sample, inputs.times, given(Int(bits=8)))
    # 100 and 600 are equally far from 250 .. 500 at 150 and 100: the nearer is 600
    assert scale[1] == scale[2] == whole[2]


def test_rows_with_the_largest_numbers_count_in_their_interval(inputs):
    peak = torch.zeros(1, 32)
    peak[0, 0] = 1e4
    more = replace(inputs, peaks=peak, peak_times=torch.tensor([100.0]))
    _, scale, _ = tables(inputs.sample, inputs.times, given(Int(bits=8)), more)
    assert float(scale[0]) == pytest.approx(1e4 / 127)
    assert torch.equal(scale[1:], tables(inputs.sample, inputs.times, given(Int(bits=8)))[1][1:])


COMPOSITIONS = {
    "rtn": {},
    "bias": {"correct_bias": True},
    "smooth": {"transforms": (Smooth(),)},
    "rotate": {"transforms": (Hadamard(),)},
    "smooth, rotate, gptq": {"transforms": (Smooth(alpha=0.5), Hadamard()), "solver": GPTQ()},
    "branch": {"low_rank": LowRank(rank=2), "solver": GPTQ()},
}


@pytest.mark.parametrize("fields", COMPOSITIONS.values(), ids=COMPOSITIONS)
def test_composes_and_beats_one_scale(inputs, seeded, fields):
    """Output error on the rows, each rounded with its interval's scale, against one scale for all: the small intervals gain."""
    weight = seeded(24, 32, seed=9)
    errors = {}
    for name, granularity in {"levels": PER_LEVEL, "one": PerTensor()}.items():
        spec = LayerSpec(weight=W8, input=TensorSpec(format=Int(bits=8, symmetric=False), granularity=granularity), **fields)
        ranges = [(inputs.sample[i::3].amin(), inputs.sample[i::3].amax()) for i in range(3)]
        ends = torch.stack([low for low, _ in ranges]), torch.stack([high for _, high in ranges])
        if name == "one":
            ends = ends[0].amin().view(1), ends[1].amax().view(1)
        (solution,) = solve([weight], spec, inputs, input_range=ends)
        assert solution.tensors["input_scale"].shape == solution.tensors["input_zero"].shape == ((3,) if name == "levels" else (1,))
        errors[name] = layer_errors(solution, weight, inputs)
    assert errors["levels"][0] < 0.1 * errors["one"][0]
    assert errors["levels"][2] == pytest.approx(errors["one"][2], rel=0.5)


def layer_errors(solution, weight, inputs):
    """Squared output error of every third of the rows, by a runtime layer that is told the time."""
    from torch import nn

    from dqtk.nn.layers import QuantLinear

    class Denoiser(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            layer.follow(self)

        def forward(self, sample, timestep):
            return self.layer(sample)

    layer = QuantLinear(32, 24, True, solution.spec)
    shift = torch.zeros(24) if solution.bias_shift is None else solution.bias_shift
    layer.fill(solution.tensors, shift)
    model = Denoiser(layer)
    found = []
    for i, time in enumerate((100.0, 350.0, 600.0)):
        x = inputs.sample[i::3]
        found.append(float((model(x, torch.tensor(time)) - x @ weight.T).square().sum()))
    return found
