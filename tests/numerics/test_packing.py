"""Codes as bytes: round trips, bytes that must never change, and how big a stored weight is."""

import pytest
import torch

from dqtk.methods.rtn import rtn
from dqtk.numerics.packing import (
    Packed,
    count_groups,
    dequantize,
    empty_packed,
    integer_weight,
    pack,
    pack_codes,
    packed_width,
    storage_bits,
    stored_bytes,
    stored_dtype,
    unpack,
    unpack_codes,
)
from dqtk.spec import Float, Int, PerChannel, PerGroup, PerTensor, TensorSpec, TwoLevel

SPECS = [
    TensorSpec(format=Int(bits=bits, symmetric=symmetric), granularity=granularity)
    for bits in (2, 3, 4, 5, 8)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), PerGroup(size=8))
]
SPECS += [TensorSpec(format=Int(bits=bits), granularity=TwoLevel(size=8)) for bits in (2, 3, 4)]
SPECS += [TensorSpec(format=Float(), granularity=granularity) for granularity in (PerTensor(), PerChannel(), PerGroup(size=8))]


def short(spec):
    form = "fp8" if isinstance(spec.format, Float) else f"{spec.format.bits}{'s' if spec.format.symmetric else 'a'}"
    return f"{form}-{type(spec.granularity).__name__}"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 64])
def test_round_trip(bits, lead, length):
    codes = torch.randint(0, 2**bits, (*lead, length), generator=torch.Generator().manual_seed(length))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, packed_width(bits, length))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, length), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_empty_rows(bits):
    assert pack(torch.zeros(3, 0, dtype=torch.uint8), bits).shape == (3, 0)
    assert unpack(torch.zeros(3, 0, dtype=torch.uint8), bits, 0).shape == (3, 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_non_contiguous_input(bits):
    codes = torch.randint(0, 2**bits, (11, 6)).T
    assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))
    strided = torch.randint(0, 2**bits, (4, 20))[:, ::2]
    assert torch.equal(unpack(pack(strided, bits), bits, 10), strided.to(torch.uint8))


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        # byte i = c_i | c_{i+4} << 4
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x40, 0x51, 0x62, 0x73]),
        (4, [15, 14, 13, 12, 11, 10, 9, 8, 7], [0xBF, 0xAE, 0x9D, 0x8C, 0x07, 0x00, 0x00, 0x00]),
        # byte i = c_i | c_{i+2} << 2 | c_{i+4} << 4 | c_{i+6} << 6
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
        (2, [3], [0b00_00_00_11, 0]),
        # two planes of low bits, then one of high bits
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b10_00_10_00, 0b11_01_11_01, 0b1111_0000]),
        (3, [7, 0, 5], [0b00_00_01_11, 0, 0b0000_0101]),
        (8, [0, 127, 128, 255], [0, 127, 128, 255]),
    ],
)
def test_golden_bytes(bits, codes, expected):
    assert pack(torch.tensor(codes), bits).tolist() == expected


def golden(format_, codes):
    spec = TensorSpec(format=format_, granularity=PerChannel())
    qweight = pack_codes(torch.tensor([codes], dtype=torch.int8 if format_.symmetric else torch.uint8), spec)
    return qweight.dtype, qweight[0].tolist()


def test_golden_stored_codes():
    """The offset of signed codes is part of the file format."""
    assert golden(Int(bits=4), [-7, -1, 0, 7]) == (torch.uint8, [1, 7, 8, 15])
    assert golden(Int(bits=4, symmetric=False), [0, 1, 8, 15]) == (torch.uint8, [0, 1, 8, 15])
    assert golden(Int(bits=3), [-3, 0, 3, -3]) == (torch.uint8, [0b11_01, 0b01_00, 0b0110])
    assert golden(Int(bits=2), [-1, 0, 1]) == (torch.uint8, [0b11_01, 0b00_10])
    assert golden(Int(bits=5), [-15, 0, 15]) == (torch.uint8, [113, 128, 143])
    assert golden(Int(bits=8), [-127, 0, 127]) == (torch.int8, [-127, 0, 127])
    assert golden(Int(bits=8, symmetric=False), [0, 128, 255]) == (torch.uint8, [0, 128, 255])


def test_golden_weights():
    """The whole way from weights to bytes."""
    weight = torch.tensor([[-7.0, -3.0, 0.0, 1.0, 2.0, 3.0, 5.0, 7.0], [0.5, 0.25, -0.25, 0.0, 0.0, 0.0, 0.0, -3.5]])
    packed = rtn(weight, TensorSpec(format=Int(bits=4), granularity=PerChannel()))
    assert packed.scale.tolist() == [[1.0], [0.5]]
    assert packed.qweight.tolist() == [[0xA1, 0xB5, 0xD8, 0xF9], [0x89, 0x88, 0x88, 0x18]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("wrong", [-1, "top"])
def test_codes_out_of_range(bits, wrong):
    wrong = 2**bits if wrong == "top" else wrong
    with pytest.raises(ValueError, match=rf"pack: codes must be in 0\.\.{2**bits - 1}, got .*{wrong}.*Add the offset"):
        pack(torch.tensor([0, wrong]), bits)


@pytest.mark.parametrize("call", [lambda: pack(torch.zeros(8), 5), lambda: unpack(torch.zeros(8, dtype=torch.uint8), 5, 8)])
def test_other_widths(call):
    with pytest.raises(ValueError, match=r"pack: bits must be one of \(2, 3, 4, 8\), got 5\. Store other widths"):
        call()


def test_sizes():
    assert [packed_width(bits, 16) for bits in (2, 3, 4, 8)] == [4, 6, 8, 16]
    assert [packed_width(bits, 17) for bits in (2, 3, 4, 8)] == [6, 9, 12, 17]
    assert [storage_bits(bits) for bits in range(2, 9)] == [2, 3, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("spec", SPECS, ids=short)
@pytest.mark.parametrize(("n", "k"), [(3, 16), (1, 24)])
def test_stored_form_matches_its_declaration(spec, n, k):
    packed = rtn(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), spec)
    declared = empty_packed(spec, n, k, "cpu")
    total = 0
    for name in ("qweight", "scale", "group_scale", "zero"):
        real, empty = getattr(packed, name), getattr(declared, name)
        assert (real is None) == (empty is None)
        if real is not None:
            assert (real.shape, real.dtype) == (empty.shape, empty.dtype)
            total += real.untyped_storage().nbytes()
    assert stored_bytes(spec, n, k) == total


@pytest.mark.parametrize("spec", SPECS, ids=short)
def test_codes_and_weight_survive_storage(spec):
    """unpack_codes, integer_weight and dequantize agree with arithmetic on the codes."""
    packed = rtn(torch.randn(4, 24, generator=torch.Generator().manual_seed(1)), spec)
    codes = unpack_codes(packed.qweight, spec, 24)
    assert torch.equal(pack_codes(codes, spec).view(torch.uint8), packed.qweight.view(torch.uint8))
    scale = packed.scale if packed.group_scale is None else packed.scale * packed.group_scale
    zero = 0 if packed.zero is None else packed.zero.double().repeat_interleave(24 // packed.zero.shape[1], 1)
    expected = (codes.double() - zero) * scale.double().repeat_interleave(24 // scale.shape[1], 1)
    torch.testing.assert_close(dequantize(packed, spec, 24).double(), expected, rtol=1e-6, atol=0)
    if isinstance(spec.format, Int) and spec.format.symmetric and not isinstance(spec.granularity, PerGroup):
        integer = integer_weight(packed.qweight, packed.group_scale, storage_bits(spec.bits), 24)
        assert integer.dtype == torch.int8
        assert torch.equal(integer.float() * packed.scale, dequantize(packed, spec, 24))


def test_dtypes():
    assert stored_dtype(TensorSpec(format=Int(bits=8), granularity=PerChannel())) == torch.int8
    assert stored_dtype(TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerChannel())) == torch.uint8
    assert stored_dtype(TensorSpec(format=Float(), granularity=PerChannel())) == torch.float8_e4m3fn


def test_sizes_on_disk_are_really_small():
    """4 bits in groups of 64 with a zero point: 4 + 40 / 64 bits a weight; two-level: 4 + 8 / 64 and a float per row."""
    n, k = 128, 1024
    grouped = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64))
    assert stored_bytes(grouped, n, k) == n * k * (4 + 40 / 64) / 8
    two_level = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
    assert stored_bytes(two_level, n, k) == n * k * (4 + 8 / 64) / 8 + 4 * n


def test_groups_must_divide():
    spec = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16))
    assert count_groups(spec, 48) == 3
    for call in (lambda: count_groups(spec, 40), lambda: empty_packed(spec, 2, 40, "meta"), lambda: rtn(torch.ones(2, 40), spec)):
        with pytest.raises(ValueError, match="group size must divide the 40 inputs of the weight, got 16"):
            call()


def test_storage_can_be_declared_without_memory():
    packed = empty_packed(TensorSpec(format=Int(bits=4), granularity=PerChannel()), 10**6, 10**6, "meta")
    assert isinstance(packed, Packed)
    assert packed.qweight.is_meta
    assert packed.qweight.numel() == 10**12 // 2
