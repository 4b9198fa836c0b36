"""What the machine can do at best, and the least time of a layer under it."""

import pytest
import torch

from dqtk.bench import ceilings
from dqtk.bench.ceilings import Ceilings, measure_ceilings
from dqtk.costs import LayerShape
from dqtk.recipes import recipe_named

SHAPE = LayerShape(weight=(200, 100), input=(1000, 100), bias=True)
KNOWN = Ceilings(rates={"float32": 1e9, "bfloat16": 2e9, "int8": 4e9}, bandwidth=1e9, by={})


def test_measured_ceilings_are_positive():
    found = measure_ceilings(torch.device("cpu"), side=128, repeats=2)
    assert set(found.rates) == {"float32", "bfloat16", "int8"}
    assert all(rate > 0 for rate in found.rates.values())
    assert found.bandwidth > 0
    assert set(found.by) == {*found.rates, "bandwidth"}
    assert set(measure_ceilings(torch.device("cpu"), torch.float16, side=64, repeats=1).rates) == {"float32", "float16", "int8"}


def test_operations_at_the_rate_of_the_op():
    """4e7 operations; weights 20,000, inputs 1e5 and outputs 2e5 numbers: bandwidth does not bind."""
    operations = 2 * 1000 * 200 * 100
    w8a8, w8a16 = (recipe_named(name).main_spec() for name in ("w8a8", "w8a16"))
    assert KNOWN.seconds(SHAPE, None, torch.bfloat16) == pytest.approx(operations / 2e9)
    assert KNOWN.seconds(SHAPE, None, torch.float32) == pytest.approx(operations / 1e9)
    assert KNOWN.seconds(SHAPE, w8a8, torch.bfloat16) == pytest.approx(operations / 4e9)
    assert KNOWN.seconds(SHAPE, w8a16, torch.bfloat16) == pytest.approx(operations / 2e9)  # decoded, then a 16-bit matmul


def test_bytes_at_the_bandwidth():
    """One token: the weight is what there is to move."""
    one = LayerShape(weight=(200, 128), input=(1, 128), bias=True)
    w4a8 = recipe_named("w4a8-rtn").main_spec()
    moved = (1 * 128 + 200) * 2
    assert KNOWN.seconds(one, None, torch.bfloat16) == pytest.approx((200 * 128 * 2 + moved) / 1e9)
    stored = 200 * 128 / 2 + 200 * 128 / 64 + 200 * 4  # codes, group scales, channel scales
    assert KNOWN.seconds(one, w4a8, torch.bfloat16) == pytest.approx((stored + moved) / 1e9)


@pytest.mark.parametrize(("seconds", "side"), [(1e-5, 2048), (0.003, 2048), (0.005, 1024), (0.1, 512), (9.0, 256)])
def test_matrices_are_smaller_where_a_product_would_take_long(monkeypatch, seconds, side):
    small = {("bfloat16", "torch"): [seconds, 2 * seconds], ("float32", "torch"): [seconds / 100]}
    monkeypatch.setattr(ceilings, "_timed", lambda methods, repeats, device: small)
    assert ceilings._fitting(torch.device("cpu"), torch.bfloat16) == side
