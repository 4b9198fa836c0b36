"""Round to nearest: its own objective, two-level groups, shapes."""

import pytest
import torch

from dqtk.methods import rtn as module
from dqtk.methods.rtn import rtn
from dqtk.numerics.affine import decode, encode
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.numerics.packing import dequantize, integer_weight, max_group_scale, unpack_codes
from dqtk.spec import (
    MSE,
    AbsMax,
    E4M3Group,
    E8M0Group,
    Float,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
    TwoLevel,
)

E2M1 = Float(exponent=2, mantissa=1)


EVERY = [PerTensor(), PerChannel(), PerGroup(size=64), TwoLevel(size=64), E8M0Group(size=64), E4M3Group(size=64)]


def short(form):
    return getattr(form, "name", None) or str(form)


def combinations(forms):
    """Of these formats and every granularity, what a weight may have."""
    found = []
    for form in forms:
        for granularity in EVERY:
            try:
                LayerSpec(weight=TensorSpec(format=form, granularity=granularity))
            except ValueError:
                continue
            found.append((form, granularity))
    return found


def every_code(dtype, bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    if dtype == torch.int8:
        return codes.view(torch.int8) if bits == 8 else codes.to(torch.int8)[1:] - 2 ** (bits - 1)
    return codes if dtype == torch.uint8 else codes.view(dtype)[~codes.view(dtype).isnan()]


def matrix(n=32, k=256, seed=0, spread=2.0):
    """A weight whose groups of 64 have different sizes, as trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    size = torch.exp2(spread * torch.randn(n, k // 64, 1, generator=generator).clamp(-1.5, 1.5))
    return (w.unflatten(1, (-1, 64)) * size).flatten(1)


def error(w, spec):
    return float((dequantize(rtn(w, spec), spec, w.shape[1]).double() - w.double()).square().sum())


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(size=64)], ids=str)
@pytest.mark.parametrize("form", [Int(bits=4), Int(bits=3, symmetric=False), Int(bits=6), Float(), E2M1, nf4()], ids=short)
def test_every_weight_gets_its_nearest_code(granularity, form):
    w = matrix()
    spec = TensorSpec(format=form, granularity=granularity, range=MSE())
    packed = rtn(w, spec)
    scale = packed.scale.expand(32, -1).repeat_interleave(256 // packed.scale.shape[1], 1)
    zero = None if packed.zero is None else packed.zero.float().expand(32, -1).repeat_interleave(256 // packed.zero.shape[1], 1)
    codes = unpack_codes(packed.qweight, spec, 256)
    chosen = (decode(codes, scale, zero, form) - w).abs()
    for other in every_code(codes.dtype, form.bits):
        value = decode(other.expand(32, 256), scale, zero, form)
        assert (chosen <= ((value - w).abs() * (1 + 1e-6) + 1e-6 * scale)).all()
    assert torch.equal(codes.float(), encode(w, scale, zero, form).float())


@pytest.mark.parametrize("form", [Int(bits=4), Int(bits=4, symmetric=False), Float(exponent=3, mantissa=4), E2M1, nf4()], ids=short)
def test_finer_granularity_is_better(form):
    w = matrix()
    errors = [
        error(w, TensorSpec(format=form, granularity=g)) for g in (PerTensor(), PerChannel(), PerGroup(size=128), PerGroup(size=32))
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("form", "granularity"), combinations([Int(bits=4), E2M1, nf4(), Int(bits=3, symmetric=False)]), ids=short)
def test_range_search_is_never_worse(form, granularity):
    w = matrix(seed=1)
    absmax, mse = (error(w, TensorSpec(format=form, granularity=granularity, range=how)) for how in (AbsMax(), MSE(most=1.5)))
    slack = 1.02 if isinstance(granularity, TwoLevel) else 1 + 1e-6  # the group scales are already searched
    assert mse <= absmax * slack


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [8, 64])
def test_two_level_weights_are_int8_numbers(bits, size):
    spec = TensorSpec(format=Int(bits=bits), granularity=TwoLevel(size=size))
    for w in (matrix(spread=4.0), matrix(spread=0.0), torch.ones(4, 128), -torch.ones(4, 128)):
        packed = rtn(w, spec)
        codes = unpack_codes(packed.qweight, spec, w.shape[1]).int()
        products = codes.unflatten(1, (-1, size)) * packed.group_scale.int()[..., None]
        assert products.abs().max() <= 127
        assert packed.group_scale.min() >= 1
        assert packed.group_scale.max() <= max_group_scale(spec)
        assert torch.equal(integer_weight(packed.qweight, packed.group_scale, bits, w.shape[1]).int(), products.flatten(1))


def test_two_level_lies_between_its_neighbours():
    """Worse than nothing but float group scales, and much better than one scale per channel."""
    for seed in range(3):
        w = matrix(64, 512, seed=seed, spread=1.0)
        channel, two_level, group = (
            error(w, TensorSpec(format=Int(bits=4), granularity=g)) for g in (PerChannel(), TwoLevel(size=64), PerGroup(size=64))
        )
        assert two_level < 0.8 * channel
        assert two_level < 1.1 * group


def test_two_level_searches_group_scales_by_error():
    """For given channel scales no other integer group scale is better, tried one by one in float64."""
    spec = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
    w = matrix(8, 256)
    packed = rtn(w, spec)
    groups, scale = w.double().view(8, 4, 64), packed.scale.double()[..., None]

    def group_error(candidate):
        step = scale * candidate
        return ((groups / step).round().clamp(-7, 7) * step - groups).square().sum(-1)

    chosen = group_error(packed.group_scale.double()[..., None])
    for candidate in range(1, max_group_scale(spec) + 1):
        assert (chosen <= group_error(float(candidate)) * (1 + 1e-5)).all()


def test_two_level_ignores_empty_groups():
    """Groups of zeros, or of numbers next to zero, must not decide the scale of their channel."""
    spec = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
    w = matrix(4, 256, spread=0.0) * 1e-2
    clean = rtn(w, spec)
    for filler in (0.0, 1e-32, 1e-38):
        padded = torch.cat([w, torch.full((4, 64), filler)], dim=1)
        packed = rtn(padded, spec)
        torch.testing.assert_close(packed.scale, clean.scale)
        assert torch.equal(dequantize(packed, spec, 320)[:, :256], dequantize(clean, spec, 256))
        assert not dequantize(packed, spec, 320)[:, 256:].any()


@pytest.mark.parametrize("granularity", EVERY, ids=str)
def test_weights_of_zeros(granularity):
    spec = TensorSpec(format=Int(bits=4), granularity=granularity)
    assert not dequantize(rtn(torch.zeros(4, 128), spec), spec, 128).any()


@pytest.mark.parametrize(
    ("form", "granularity"), combinations([Int(bits=4), Int(bits=8), E2M1, Float(), nf4(), bitmod(4)]), ids=short
)
def test_memory_layout_and_dtype_do_not_matter(form, granularity):
    spec = TensorSpec(format=form, granularity=granularity)
    w = matrix(12, 128).bfloat16()
    expected = rtn(w.float(), spec)
    for same in (w, w.T.contiguous().T):
        packed = rtn(same, spec)
        assert_same(packed, expected)
        assert packed.qweight.is_contiguous()


def assert_same(packed, expected):
    assert packed.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert torch.equal(packed.tensors()[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("form", "granularity"),
    combinations([Int(bits=4), Int(bits=3, symmetric=False), E2M1, Float(), nf4(), bitmod(4)]),
    ids=short,
)
def test_blocks_of_rows_are_bookkeeping(form, granularity, monkeypatch):
    """Weights are rounded some rows at a time to bound memory; what comes out does not depend on how many."""
    w = matrix(7, 128, seed=2)
    spec = TensorSpec(format=form, granularity=granularity, range=MSE(steps=4))
    expected = rtn(w, spec)
    for rows in (1, 3, 7):
        monkeypatch.setattr(module, "BLOCK", rows * 128)
        assert_same(rtn(w, spec), expected)


def test_one_row_of_many_groups():
    """A single output channel: the tensor's own scale has as many rows as the weight."""
    w = matrix(1, 256)
    for granularity in EVERY:
        spec = TensorSpec(format=Int(bits=4), granularity=granularity)
        assert (dequantize(rtn(w, spec), spec, 256) - w).norm() < 0.25 * w.norm()


def test_bitmod_beats_its_own_base():
    """Four choices a group lose less than E2M1 alone, for equal float scales."""
    w = matrix(spread=0.5)
    base, four = (error(w, TensorSpec(format=form, granularity=PerGroup(size=64), range=MSE())) for form in (E2M1, bitmod(4)))
    assert four < 0.97 * base


def test_nvfp4_and_mxfp4_are_ordered():
    """NVFP4 with a sweep, NVFP4, MXFP4 with the best of three exponents, MXFP4 as prescribed."""
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [
        error(w, TensorSpec(format=E2M1, granularity=granularity, range=how))
        for granularity in (E4M3Group(size=16), E8M0Group(size=32))
        for how in (MSE(), AbsMax())
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()], ids=str)
def test_odd_shapes(granularity):
    for n, k in ((1, 1), (1, 7), (5, 13)):
        spec = TensorSpec(format=Int(bits=4), granularity=granularity)
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
        packed = rtn(w, spec)
        assert dequantize(packed, spec, k).shape == (n, k)
        assert ((dequantize(packed, spec, k) - w).abs() <= packed.scale * 0.501).all()
