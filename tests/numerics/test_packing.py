"""Codes as bytes: round trips, bytes that must never change, and how big a stored weight is."""

import pytest
import torch

from dqtk.methods.rtn import rtn
from dqtk.numerics.codebook import bitmod, log_grid, nf4
from dqtk.numerics.packing import (
    Packed,
    bytes_of,
    count_groups,
    dequantize,
    empty,
    group_steps,
    integer_weight,
    layout,
    pack,
    pack_codes,
    packed_width,
    selector_bits,
    stored_bytes,
    stored_dtype,
    stored_width,
    unpack,
    unpack_codes,
    weight_levels,
)
from dqtk.spec import (
    Codebook,
    E4M3Group,
    E8M0Group,
    Float,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
    TwoLevel,
)

WIDTHS = range(1, 9)
WIDE = range(9, 17)
E2M1 = Float(exponent=2, mantissa=1)


@pytest.mark.parametrize("bits", [*WIDTHS, *WIDE])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 31, 64])
def test_round_trip(bits, lead, length):
    codes = torch.randint(0, 2**bits, (*lead, length), generator=torch.Generator().manual_seed(length))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, packed_width(bits, length))
    assert packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, length), codes.to(torch.uint8 if bits <= 8 else torch.int32))


@pytest.mark.parametrize("bits", [*WIDTHS, *WIDE])
def test_empty_rows(bits):
    assert pack(torch.zeros(3, 0, dtype=torch.uint8), bits).shape == (3, 0)
    assert unpack(torch.zeros(3, 0, dtype=torch.uint8), bits, 0).shape == (3, 0)


@pytest.mark.parametrize("bits", WIDTHS)
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
        # bit j = c_j
        (1, [1, 0, 0, 1, 1, 0, 1, 0], [0b0101_1001]),
        (1, [0, 1, 1, 0, 0, 0, 0, 0, 1], [0b0000_0110, 1]),
        # four planes of low bits, then one of high bits
        (5, [0x01, 0x02, 0x03, 0x04, 0x15, 0x16, 0x17, 0x18], [0x51, 0x62, 0x73, 0x84, 0b1111_0000]),
        (5, [31], [0x0F, 0, 0, 0, 1]),
        # then two of high bits: 3, 2, 1, 0, 3, 2, 1, 0
        (6, [0x31, 0x22, 0x13, 0x04, 0x35, 0x26, 0x17, 0x08], [0x51, 0x62, 0x73, 0x84, 0b01_11_01_11, 0b00_10_00_10]),
        (6, [0, 63, 32], [0, 0x0F, 0, 0, 0b00_00_10_00, 0b00_00_00_11]),
        # then two of middle bits, then one of high bits
        (7, [0x71, 0x22, 0x13, 0x44, 0x75, 0x26, 0x57, 0x08], [0x51, 0x62, 0x73, 0x84, 0x77, 0x22, 0b0101_1001]),
        (7, [127, 64], [0x0F, 0, 0, 0, 0b00_00_00_11, 0, 0b0000_0011]),
        (8, [0, 127, 128, 255], [0, 127, 128, 255]),
        # eight of low bytes, then as 4, 2 and 1 bits are; then two times eight
        (
            12,
            [0x001, 0x102, 0x203, 0x304, 0x4F5, 0x5F6, 0x6F7, 0x7F8],
            [1, 2, 3, 4, 0xF5, 0xF6, 0xF7, 0xF8, 0x40, 0x51, 0x62, 0x73],
        ),
        (9, [0x101, 0x0FE], [1, 0xFE, 0, 0, 0, 0, 0, 0, 1]),
        (16, [0xABCD, 0x0102], [0xCD, 2, 0, 0, 0, 0, 0, 0, 0xAB, 1, 0, 0, 0, 0, 0, 0]),
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
    assert golden(Int(bits=5), [-15, 0, 15]) == (torch.uint8, [1, 0, 15, 0, 0b110])
    assert golden(Int(bits=5, symmetric=False), [0, 16, 31]) == (torch.uint8, [0, 0, 15, 0, 0b110])
    assert golden(Int(bits=6), [-31, 0, 31]) == (torch.uint8, [1, 0, 15, 0, 0b11_00, 0b10])
    assert golden(Int(bits=7), [-63, 0, 63]) == (torch.uint8, [1, 0, 15, 0, 0b11_00, 0, 0b110])
    assert golden(Int(bits=8), [-127, 0, 127]) == (torch.int8, [-127, 0, 127])
    assert golden(Int(bits=8, symmetric=False), [0, 128, 255]) == (torch.uint8, [0, 128, 255])


def test_golden_weights():
    """The whole way from weights to bytes."""
    weight = torch.tensor([[-7.0, -3.0, 0.0, 1.0, 2.0, 3.0, 5.0, 7.0], [0.5, 0.25, -0.25, 0.0, 0.0, 0.0, 0.0, -3.5]])
    packed = rtn(weight, TensorSpec(format=Int(bits=4), granularity=PerChannel()))
    assert packed.scale.tolist() == [[1.0], [0.5]]
    assert packed.qweight.tolist() == [[0xA1, 0xB5, 0xD8, 0xF9], [0x89, 0x88, 0x88, 0x18]]


def stored(weight, form, granularity):
    """Bytes of every tensor."""
    packed = rtn(torch.tensor(weight), TensorSpec(format=form, granularity=granularity))
    return {name: tensor.view(torch.uint8).flatten().tolist() for name, tensor in packed.tensors().items() if name != "scale"}


FP4_ROWS = [[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0]]
FP4_BYTES = [0x40, 0x51, 0x62, 0x73, 0xBF, 0xAE, 0x9D, 0x0C]  # sign | exponent | mantissa; minus zero is stored as zero


def test_golden_fp4():
    assert stored(FP4_ROWS, E2M1, PerChannel()) == {"qweight": FP4_BYTES}


def test_golden_fp6_and_fp8():
    """OFP8's two are torch's own; the others are packed bit patterns."""
    row = [[0.0, 0.0625, 1.0, -1.25, 28.0, -28.0, 0.25, 3.5]]
    e3m2 = [0x00, 0x01, 0x0C, 0x2D, 0x1F, 0x3F, 0x04, 0x13]
    assert stored(row, Float(exponent=3, mantissa=2), PerChannel())["qweight"] == pack(torch.tensor(e3m2), 6).tolist()
    assert stored([[448.0, -1.0, 2.0**-9]], Float(), PerChannel())["qweight"] == [0x7E, 0xB8, 0x01]
    assert stored([[57344.0, -1.0, 2.0**-16]], Float(exponent=5, mantissa=2), PerChannel())["qweight"] == [0x7B, 0xBC, 0x01]
    assert stored([[31.0, -1.0, 2.0**-6]], Float(exponent=3, mantissa=4), PerChannel())["qweight"] == [0x7F, 0xB0, 0x01]


def test_golden_mxfp4():
    """Absmax 48 = 1.5 * 2^5 and 0.25 = 2^-2: exponents 5 - 2 and -2 - 2, plus 127; the third group holds zeros."""
    first, second = [8 * x for x in FP4_ROWS[0]], [0.25, -0.25, 0.125, 0.0, 0.03125, -0.0625, 0.1875, 0.25]
    assert stored([first + second + [0.0] * 8], E2M1, E8M0Group(size=8)) == {
        "qweight": [0x40, 0x51, 0x62, 0x73, 0x16, 0xAE, 0x54, 0x60, 0, 0, 0, 0],
        "group_scale": [130, 123, 127],
    }


def test_golden_nvfp4():
    """The tensor's absmax 2688 = 6 * 448 makes the float scale 1. Group scales: 448, 1, 0.55 rounded to 0.5625, the least one."""
    row = [*(448 * x for x in FP4_ROWS[0]), *FP4_ROWS[1], 3.3, *[0.0] * 15]
    found = stored([row], E2M1, E4M3Group(size=8))
    assert found == {"qweight": [*FP4_BYTES, 0x07, 0, 0, 0, 0, 0, 0, 0], "group_scale": [0x7E, 0x38, 0x31, 0x01]}
    packed = rtn(torch.tensor([row]), TensorSpec(format=E2M1, granularity=E4M3Group(size=8)))
    assert packed.scale.tolist() == [[1.0]]


def test_golden_nf4():
    table = list(nf4().tables[0])
    assert stored([table], nf4(), PerChannel()) == {"qweight": [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB]}


def test_golden_bitmod():
    """Tables: 0 has 5 more, 1 has -5, 2 has 8, 3 has -8; the selector has two bits a group. Codes are places in the table."""
    row = [x / (8 if 8 in t or -8 in t else 1) for t in bitmod(4).tables for x in t]
    assert stored([row], bitmod(4), PerGroup(size=16)) == {
        "qweight": [0x40, 0x51, 0x62, 0x73, 0xC8, 0xD9, 0xEA, 0xFB] * 4,
        "selector": [0b00_00_10_00, 0b00_00_11_01],
    }


def test_golden_two_level_and_log():
    """Group scales are plain bytes. The logarithmic table begins with its zero."""
    weight = [[127.0 * x for x in (1, -1, 0, 3 / 7, 0, 0, 0, 0)] + [7.0, -7.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0]]
    assert stored(weight, Int(bits=4), TwoLevel(size=8)) == {
        "qweight": [0x8F, 0x81, 0x88, 0x8B, 0x8F, 0x81, 0x89, 0xB8],
        "group_scale": [18, 1],
    }
    assert stored([[0.0, 2**-6, 2**-5, 2**-4, 2**-3, 0.25, 0.5, 1.0]], log_grid(3), PerChannel()) == {
        "qweight": pack(torch.arange(8), 3).tolist()
    }


@pytest.mark.parametrize("bits", [*WIDTHS, *WIDE])
@pytest.mark.parametrize("wrong", [-1, "top"])
def test_codes_out_of_range(bits, wrong):
    wrong = 2**bits if wrong == "top" else wrong
    with pytest.raises(ValueError, match=rf"pack: codes must be in 0\.\.{2**bits - 1}, got .*{wrong}.*Add the offset"):
        pack(torch.tensor([0, wrong]), bits)


@pytest.mark.parametrize("bits", [0, 17, -1, 32])
def test_other_widths(bits):
    for name, call in (("pack", lambda: pack(torch.zeros(8), bits)), ("unpack", lambda: unpack(torch.zeros(8), bits, 8))):
        with pytest.raises(ValueError, match=rf"{name}: bits must be from 1 to 16, got {bits}\. Split wider codes"):
            call()


def test_sizes():
    assert [packed_width(bits, 16) for bits in WIDTHS] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert [packed_width(bits, 17) for bits in WIDTHS] == [3, 6, 9, 12, 15, 18, 21, 17]  # 8 bits need no padding
    assert [packed_width(bits, 16) for bits in WIDE] == [18, 20, 22, 24, 26, 28, 30, 32]
    assert [packed_width(bits, 0) for bits in WIDTHS] == [0] * 8


@pytest.mark.parametrize(("n", "k"), [(3, 16), (1, 24), (2, 72)])
def test_stored_form_matches_its_declaration(weight_spec, seeded, n, k):
    packed = rtn(seeded(n, k), weight_spec)
    declared = layout(weight_spec, n, k)
    real = packed.tensors()
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in real.items()} == declared
    assert stored_bytes(weight_spec, n, k) == bytes_of(declared) == sum(t.untyped_storage().nbytes() for t in real.values())
    assert {name: (t.shape, t.dtype) for name, t in empty(declared, "cpu").items()} == declared
    assert all(tensor.is_contiguous() for tensor in real.values())


def test_codes_survive_storage(weight_spec, seeded):
    packed = rtn(seeded(4, 24, seed=1), weight_spec)
    codes = unpack_codes(packed.qweight, weight_spec, 24)
    assert codes.shape == (4, 24)
    assert torch.equal(pack_codes(codes, weight_spec).view(torch.uint8), packed.qweight.view(torch.uint8))


def test_stored_weight_is_its_levels_times_its_steps(weight_spec, seeded, levels):
    """In float64, from the tensors alone; levels are looked up by the code's place or bit pattern."""
    packed, form = rtn(seeded(4, 24, seed=1), weight_spec), weight_spec.format

    def spread(per_group):
        return per_group.double().repeat_interleave(24 // per_group.shape[1], 1)

    if isinstance(weight_spec.granularity, E8M0Group):
        steps = spread(torch.exp2(packed.group_scale.double() - 127))
    else:
        steps = spread(packed.scale) * (1 if packed.group_scale is None else spread(packed.group_scale))
    zero = 0 if packed.zero is None else spread(packed.zero)
    codes = unpack_codes(packed.qweight, weight_spec, 24)
    if isinstance(form, Codebook):
        which = 0 if packed.selector is None else spread(unpack(packed.selector, selector_bits(form), 3)).long()
        values = torch.stack([levels(form, i) for i in range(len(form.tables))])[which, codes.long()]
    elif isinstance(form, Float) and codes.dtype == torch.uint8:
        half, positive = 2 ** (form.bits - 1), levels(form)[levels(form) >= 0]
        values = positive[codes.long() % half] * (1 - 2 * (codes.long() // half))
    else:
        values = codes.double()
    decoded = dequantize(packed, weight_spec, 24)
    assert (decoded.dtype, decoded.shape) == (torch.float32, (4, 24))
    torch.testing.assert_close(decoded.double(), (values - zero) * steps, rtol=1e-6, atol=0)
    assert torch.equal(weight_levels(packed, weight_spec, 24).double(), values)
    torch.testing.assert_close(spread(group_steps(packed, weight_spec)).expand(4, 24), steps.expand(4, 24), rtol=1e-6, atol=0)
    if isinstance(form, Int) and form.symmetric and isinstance(weight_spec.granularity, PerTensor | PerChannel | TwoLevel):
        integer = integer_weight(packed.qweight, packed.group_scale, form.bits, 24)
        assert integer.dtype == torch.int8
        assert torch.equal(integer.float() * packed.scale, decoded)


def test_dtypes():
    assert stored_dtype(TensorSpec(format=Int(bits=8), granularity=PerChannel())) == torch.int8
    assert stored_dtype(TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerChannel())) == torch.uint8
    assert stored_dtype(TensorSpec(format=Float(), granularity=PerChannel())) == torch.float8_e4m3fn
    assert stored_dtype(TensorSpec(format=Float(exponent=5, mantissa=2), granularity=PerChannel())) == torch.float8_e5m2
    for form in (Float(exponent=3, mantissa=4), E2M1, Int(bits=7), nf4(), log_grid(8, 1.1)):
        assert stored_dtype(TensorSpec(format=form, granularity=PerChannel())) == torch.uint8
    assert stored_width(TensorSpec(format=E2M1, granularity=PerChannel()), 17) == 12


def test_sizes_on_disk_are_really_small():
    """4 bits in groups of 64 with a zero point: 4 + 24 / 64 bits a weight; two-level: 4 + 8 / 64 and a float per row."""
    n, k = 128, 1024
    grouped = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64))
    assert stored_bytes(grouped, n, k) == n * k * (4 + 24 / 64) / 8
    two_level = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
    assert stored_bytes(two_level, n, k) == n * k * (4 + 8 / 64) / 8 + 4 * n
    for bits in (5, 6, 7):
        assert stored_bytes(TensorSpec(format=Int(bits=bits), granularity=PerChannel()), n, k) == n * k * bits / 8 + 4 * n
    assert stored_bytes(TensorSpec(format=E2M1, granularity=E8M0Group()), n, k) == n * k * 4.25 / 8  # MXFP4
    assert stored_bytes(TensorSpec(format=Float(), granularity=E8M0Group()), n, k) == n * k * 8.25 / 8  # MXFP8
    assert stored_bytes(TensorSpec(format=E2M1, granularity=E4M3Group()), n, k) == n * k * 4.5 / 8 + 4  # NVFP4
    assert stored_bytes(TensorSpec(format=bitmod(4), granularity=PerGroup(size=128)), n, k) == n * k * (4 + 18 / 128) / 8


def test_groups_must_divide():
    spec = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16))
    assert count_groups(spec, 48) == 3
    for call in (lambda: count_groups(spec, 40), lambda: layout(spec, 2, 40), lambda: rtn(torch.ones(2, 40), spec)):
        with pytest.raises(ValueError, match="group size must divide the 40 inputs, got 16"):
            call()


def test_storage_can_be_declared_without_memory():
    spec = TensorSpec(format=Int(bits=4), granularity=PerChannel())
    packed = Packed(**empty(layout(spec, 10**6, 10**6), "meta"))
    assert packed.qweight.is_meta
    assert packed.tensors().keys() == {"qweight", "scale"}
    assert packed.qweight.numel() == 10**12 // 2
