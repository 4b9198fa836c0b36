"""Names, shapes and dtypes of what layers store."""

import pytest
import torch

from dqtk.numerics.codebook import bitmod
from dqtk.numerics.packing import bytes_of, layout
from dqtk.numerics.storage import BUFFERS, layer_bytes, layer_layout
from dqtk.spec import (
    GPTQ,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Smooth,
    TensorSpec,
)

N, K = 6, 36
W4 = TensorSpec(format=Int(bits=4), granularity=PerChannel())


def static(form):
    return TensorSpec(format=form, granularity=PerTensor())


WEIGHT = {"qweight": ((N, 20), torch.uint8), "scale": ((N, 1), torch.float32)}
ONE = {"input_scale": ((1,), torch.float32)}
CASES = [
    (LayerSpec(weight=W4), {}),
    (LayerSpec(weight=W4, input=TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())), {}),
    (LayerSpec(weight=W4, input=TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())), {}),
    (LayerSpec(weight=W4, input=static(Int(bits=8))), ONE | {"input_zero": ((1,), torch.int32)}),
    (LayerSpec(weight=W4, input=static(Int(bits=4, symmetric=False))), ONE | {"input_zero": ((1,), torch.int32)}),
    (LayerSpec(weight=W4, input=static(Float())), ONE),
    (LayerSpec(weight=W4, input=static(Float(signed=False))), ONE | {"input_zero": ((1,), torch.float32)}),
    (LayerSpec(weight=W4, transforms=(Smooth(),)), {"smooth": ((K,), torch.bfloat16)}),
    (LayerSpec(weight=W4, transforms=(Hadamard(block=4),)), {"signs": ((5,), torch.uint8)}),
    (LayerSpec(weight=W4, low_rank=LowRank(rank=2)), {"down": ((2, K), torch.bfloat16), "up": ((N, 2), torch.bfloat16)}),
    (LayerSpec(weight=W4, low_rank=LowRank(rank=99)), {"down": ((N, K), torch.bfloat16), "up": ((N, N), torch.bfloat16)}),
    (
        LayerSpec(weight=W4, transforms=(Smooth(), Hadamard()), solver=GPTQ(), correct_bias=True),
        {"smooth": ((K,), torch.bfloat16), "signs": ((5,), torch.uint8)},
    ),
]


@pytest.mark.parametrize(("spec", "more"), CASES, ids=lambda value: str(value) if isinstance(value, LayerSpec) else "")
def test_tensors_of_a_linear(spec, more):
    found = layer_layout(spec, N, K, K)
    assert found == WEIGHT | more
    assert list(found) == [name for name in BUFFERS if name in found]
    assert layer_bytes(spec, N, K, K) == bytes_of(WEIGHT) + bytes_of(more)


def test_transforms_of_a_convolution_are_as_wide_as_its_channels():
    spec = LayerSpec(weight=W4, transforms=(Smooth(), Hadamard(block=4)))
    found = layer_layout(spec, N, K, 4)
    assert found["smooth"] == ((4,), torch.bfloat16)
    assert found["signs"] == ((1,), torch.uint8)
    assert found["qweight"] == WEIGHT["qweight"]


@pytest.mark.parametrize("granularity", [PerGroup(size=12 * 2), E8M0Group(size=8), E4M3Group(size=8)], ids=str)
def test_groups_that_do_not_fit_are_refused(granularity):
    with pytest.raises(ValueError, match=r"count_groups: group size must divide the 36 inputs, got \d+\. Choose another"):
        layer_layout(LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=granularity)), N, K, K)


def test_groups_of_inputs_that_do_not_fit_are_refused():
    given = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=24), range=Dynamic())
    with pytest.raises(ValueError, match=r"count_groups: group size must divide the 36 inputs, got 24\. Choose another"):
        layer_layout(LayerSpec(weight=W4, input=given), N, K, K)


def test_weights_are_stored_as_packing_says(weight_spec):
    assert layer_layout(LayerSpec(weight=weight_spec), 3, 48, 48) == layout(weight_spec, 3, 48)


def test_published_sizes():
    """Bits a weight, everything counted: SVDQuant INT4 with rank 32 on a square layer of 3072, NVFP4 and BitMoD."""
    n = k = 3072

    def bits(weight, **more):
        return layer_bytes(LayerSpec(weight=weight, **more), n, k, k) * 8 / (n * k)

    group = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64))
    assert bits(group) == 4 + 16 / 64
    assert bits(group, low_rank=LowRank(rank=32)) == 4.25 + 2 * 32 * 16 / k
    assert bits(group, transforms=(Smooth(), Hadamard())) == pytest.approx(4.25 + 17 / n, abs=1e-9)
    nvfp4 = TensorSpec(format=Float(exponent=2, mantissa=1), granularity=E4M3Group())
    assert bits(nvfp4) == pytest.approx(4.5, abs=1e-4)
    assert bits(TensorSpec(format=bitmod(4), granularity=PerGroup(size=128))) == 4 + 18 / 128
