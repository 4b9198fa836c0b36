"""Layers whose weights alone are rounded: the ops against decoded weights and torch's own linear."""

import pytest
import torch
import torch.nn.functional as F

from dqtk.kernels import Decoding, decode_weight, linear_decoded, on_cpu
from dqtk.methods.rtn import rtn
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.numerics.packing import dequantize
from dqtk.spec import E4M3Group, E8M0Group, Float, Int, PerChannel, PerGroup, PerTensor, TensorSpec, TwoLevel

GRANULARITIES = (PerTensor(), PerChannel(), PerGroup(size=8), PerGroup(size=32))
FLOATS = (Float(), Float(exponent=5, mantissa=2), Float(exponent=2, mantissa=1), Float(exponent=3, mantissa=2))
SPECS = [
    *(
        TensorSpec(format=Int(bits=b, symmetric=s), granularity=g)
        for b in range(2, 9)
        for s in (True, False)
        for g in GRANULARITIES
    ),
    *(TensorSpec(format=Int(bits=b), granularity=TwoLevel(size=32)) for b in range(2, 8)),
    *(TensorSpec(format=f, granularity=g) for f in (*FLOATS, nf4()) for g in (PerChannel(), PerGroup(size=32))),
    *(TensorSpec(format=f, granularity=E8M0Group(size=32)) for f in FLOATS),
    TensorSpec(format=Float(exponent=2, mantissa=1), granularity=E4M3Group(size=16)),
    *(TensorSpec(format=bitmod(b), granularity=g) for b in (3, 4) for g in (PerChannel(), PerGroup(size=32))),
]
FEW = [SPECS[i] for i in (1, 14, 45, 58, 63, 70, -5, -1)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(spec, n, k):
    packed = rtn(seeded(n, k, seed=1), spec)
    return packed, Decoding.of(packed, spec).arguments()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decoding_equals_dequantize(spec):
    packed, how = stored(spec, 5, 96)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        y = decode_weight(packed.qweight, *how, 96, dtype)
        assert y.dtype == dtype
        assert torch.equal(y, dequantize(packed, spec, 96).to(dtype))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 17), (9, 7), (4, 1030)])
def test_ragged_rows(n, k):
    for bits in range(2, 9):
        for symmetric in (True, False):
            spec = TensorSpec(format=Int(bits=bits, symmetric=symmetric), granularity=PerChannel())
            packed, how = stored(spec, n, k)
            assert torch.equal(decode_weight(packed.qweight, *how, k, torch.float32), dequantize(packed, spec, k))


@pytest.mark.parametrize("spec", FEW, ids=str)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 3, 96), (33, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(spec, shape, dtype):
    packed, how = stored(spec, 7, 96)
    weight, x, bias = dequantize(packed, spec, 96).to(dtype), seeded(*shape).to(dtype), seeded(7).to(dtype)
    for b in (bias, None):
        y = linear_decoded(x, packed.qweight, b, *how)
        assert y.dtype == dtype
        assert y.is_contiguous()
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("bias", [True, False])
def test_output_rows_in_chunks(bias, monkeypatch):
    """As soon as a weight is larger than the memory for decoded rows; the last chunk is shorter."""
    monkeypatch.setattr(on_cpu, "CHUNK_BYTES", 64 * 96 * 4)
    spec = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=32))
    packed, how = stored(spec, 150, 96)
    x, b = seeded(2, 9, 96), seeded(150) if bias else None
    y = linear_decoded(x, packed.qweight, b, *how)
    torch.testing.assert_close(y, F.linear(x, dequantize(packed, spec, 96), b), rtol=1e-5, atol=1e-5)


def test_results_do_not_share_memory():
    """The memory of decoded rows is used again; what the ops return is not."""
    spec = TensorSpec(format=Int(bits=8), granularity=PerChannel())
    first, second = stored(spec, 7, 24), (rtn(seeded(7, 24, seed=5), spec), None)
    x = seeded(3, 24)
    y = linear_decoded(x, first[0].qweight, None, *first[1])
    copy = y.clone()
    linear_decoded(x, second[0].qweight, None, *Decoding.of(second[0], spec).arguments())
    assert torch.equal(y, copy)


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16])
def test_scales_may_be_stored_in_bfloat16(scale):
    spec = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32))
    packed = rtn(seeded(5, 96), spec)
    packed = type(packed)(**packed.tensors() | {"scale": packed.scale.to(scale)})
    wide = type(packed)(**packed.tensors() | {"scale": packed.scale.float()})
    y = decode_weight(packed.qweight, *Decoding.of(packed, spec).arguments(), 96, torch.float32)
    assert torch.equal(y, dequantize(wide, spec, 96))


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_gradients_are_those_of_the_decoded_layer(spec):
    packed, how = stored(spec, 7, 96)
    weight = dequantize(packed, spec, 96)
    leaves = [v.requires_grad_() for v in (seeded(3, 5, 96), seeded(7), seeded(3, 5, 96), seeded(7))]
    linear_decoded(leaves[0], packed.qweight, leaves[1], *how).square().sum().backward()
    F.linear(leaves[2], weight, leaves[3]).square().sum().backward()
    for mine, plain in (leaves[::2], leaves[1::2]):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # opcheck's own doing
@pytest.mark.parametrize("spec", [spec for spec in FEW if spec.format not in FLOATS[:2]], ids=str)
def test_opcheck(spec):
    packed, how = stored(spec, 7, 96)
    for x, bias in ((seeded(2, 3, 96).requires_grad_(), seeded(7).requires_grad_()), (seeded(5, 96).bfloat16(), None)):
        torch.library.opcheck(linear_decoded, (x, packed.qweight, bias, *how))
    torch.library.opcheck(decode_weight, (packed.qweight, *how, 96, torch.bfloat16))


def test_shapes_are_known_without_data():
    packed, how = stored(SPECS[2], 7, 96)
    call = (seeded(2, 3, 96).bfloat16(), packed.qweight, None, *how)
    real, meta = linear_decoded(*call), linear_decoded(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in call))
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())
