"""The rows of the cost table: shapes, kernels, and no time for what is emulated. Never how fast."""

import pytest
import torch

from dqtk.bench import layers
from dqtk.bench.layers import half_of, is_emulated, measure_costs, plain_layer
from dqtk.costs import LayerShape
from dqtk.recipes import recipe_named

CPU = torch.device("cpu")
WIDE = LayerShape(weight=(48, 64), input=(33, 64), bias=True)
CONV = LayerShape(weight=(16, 32, 3, 3), input=(1, 32, 6, 5), bias=False, stride=(1, 1), padding=(1, 1), dilation=(1, 1))
W8A8, W4A8, FP8 = (recipe_named(name).main_spec() for name in ("w8a8", "w4a8", "fp8"))


def test_a_row_per_spec_and_one_for_16_bits():
    told = []
    costs = measure_costs({WIDE: [W8A8, W4A8], CONV: [W8A8]}, torch.bfloat16, CPU, 2, lambda: told.append(1))
    assert [(cost.shape, cost.spec) for cost in costs] == [(WIDE, None), (WIDE, W8A8), (WIDE, W4A8), (CONV, None), (CONV, W8A8)]
    assert len(told) == 2
    for cost in costs:
        assert 0 < cost.low <= cost.milliseconds <= cost.high
        assert cost.over_float32 > 0
        assert (cost.over_16_bit is None) == (cost.spec is None)
    assert costs[0].kernel == "torch, bfloat16"
    assert costs[1].kernel.startswith("linear_int8: integer matmul")
    assert costs[4].kernel.startswith("conv_int8: integer matmul")


def test_emulated_layers_are_not_run(monkeypatch):
    """Nothing is built, nothing is timed, and there is no speed-up to show."""
    made = []
    build = layers.data_free
    monkeypatch.setattr(layers, "data_free", lambda layer, spec: made.append(spec) or build(layer, spec))
    half, real, emulated = measure_costs({WIDE: [W8A8, FP8]}, torch.bfloat16, CPU, 1)
    assert made == [W8A8]
    assert real.over_16_bit is not None
    assert emulated.emulated
    assert (emulated.milliseconds, emulated.over_16_bit, emulated.over_float32) == (None, None, None)
    assert emulated.kernel == "linear_fp8: emulated in floating point"
    assert not half.emulated


@pytest.mark.parametrize(
    ("name", "kind", "emulated"),
    [
        ("w8a8", "linear", False),
        ("w4a16", "conv", False),
        ("fp8", "linear", True),
        ("fp8", "conv", True),
        ("mxfp4", "linear", True),
    ],
)
def test_what_is_emulated_on_the_cpu(name, kind, emulated):
    assert is_emulated(recipe_named(name).main_spec(), kind, CPU) is emulated


def test_float32_is_measured_against_bfloat16():
    assert [half_of(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)] == [
        torch.bfloat16,
        torch.float16,
        torch.bfloat16,
    ]
    seen = []
    costs = measure_costs({WIDE: [W8A8]}, torch.float32, CPU, 1, lambda: seen.append(1))
    assert costs[0].kernel == "torch, bfloat16"


def test_layers_are_built_as_the_model_has_them():
    layer = plain_layer(CONV, torch.bfloat16, CPU)
    assert (tuple(layer.weight.shape), layer.bias, layer.padding, layer.weight.dtype) == (CONV.weight, None, (1, 1), torch.bfloat16)
    shape = LayerShape(weight=(4, 8, 3), input=(1, 8, 9), bias=True, stride=(2,), padding=(0,), dilation=(1,))
    layer = plain_layer(shape, torch.float32, CPU)
    assert layer(torch.zeros(shape.input)).shape == (1, 4, shape.rows)
    assert plain_layer(WIDE, torch.float32, CPU).bias is not None
