"""From spec to stored weight and input scale."""

import pytest
import torch

from dqtk.methods.rtn import rtn
from dqtk.methods.solve import solve, static_input_scale
from dqtk.spec import Float, Int, LayerSpec, PerChannel, PerTensor, TensorSpec


def test_solver_is_found_by_its_type():
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerChannel()))
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(solve(w, spec).qweight, rtn(w, spec.weight).qweight)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-2.0, 2.0), (0.0, 0.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_range_fits_int8_and_represents_zero(low, high, symmetric):
    spec = TensorSpec(format=Int(bits=8, symmetric=symmetric), granularity=PerTensor())
    scale, zero = static_input_scale(torch.tensor([low]), torch.tensor([high]), spec)
    codes = (torch.tensor([low, 0.0, high]) / scale).round() + zero
    assert zero.round().equal(zero)
    assert codes.min() >= -128
    assert codes.max() <= 127
    assert codes[1] == zero
    torch.testing.assert_close((codes - zero) * scale, torch.tensor([low, 0.0, high]), atol=float(scale), rtol=0)
    if symmetric:
        assert not zero.any()


def test_static_fp8_range_has_no_zero_point():
    spec = TensorSpec(format=Float(), granularity=PerTensor())
    scale, zero = static_input_scale(torch.tensor([-896.0]), torch.tensor([10.0]), spec)
    assert zero is None
    assert scale.tolist() == [2.0]
