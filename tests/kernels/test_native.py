"""Native kernels of every level that this machine can run equal the references bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from test_conv import CASES
from test_conv import arguments as conv_arguments
from test_conv import stored as stored_conv
from test_decoded import SPECS

from dqtk.kernels import (
    Decoding,
    conv_int8,
    conv_int8_reference,
    decode_reference,
    decode_weight,
    linear_decoded,
    linear_int8,
    linear_int8_reference,
)
from dqtk.methods.rtn import rtn
from dqtk.native import library
from dqtk.numerics.packing import dequantize
from dqtk.spec import Int, PerChannel, TensorSpec, TwoLevel

LEVELS = [level.name for level in library.LEVELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# rows, K, N: around the sizes of tiles, panels and vectors
SHAPES = [(1, 8, 1), (2, 130, 67), (3, 17, 5), (7, 1, 3), (17, 129, 70), (33, 64, 64), (65, 384, 130), (3, 1032, 9)]
INPUTS = {
    "dynamic": (None, None),
    "static": (torch.tensor([0.021]), torch.tensor([0], dtype=torch.int32)),
    "static-asymmetric": (torch.tensor([0.021]), torch.tensor([-37], dtype=torch.int32)),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    """Bit for bit, except which NaN."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", INPUTS)
def test_linear(level, mode, native_level, threads):
    native_level(level)
    for rows, k, n in SHAPES:
        threads(2 if n > 100 else 1)
        for bits in (3, 4, 6, 8):
            granularity = TwoLevel(size=8) if bits < 8 and k % 8 == 0 else PerChannel()
            packed = rtn(seeded(n, k, seed=1), TensorSpec(format=Int(bits=bits), granularity=granularity))
            for dtype in DTYPES:
                bias = seeded(n, seed=2).to(dtype) if bits > 3 else None
                call = seeded(rows, k).to(dtype), packed.qweight, packed.scale, packed.group_scale, bias, *INPUTS[mode], bits
                assert same(linear_int8(*call), linear_int8_reference(*call)), (rows, k, n, bits, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", INPUTS)
def test_rows_that_are_not_numbers(level, mode, native_level):
    """NaN, infinities, zeros, tiny and huge rows, sums that overflow: as the reference, and next to healthy rows."""
    native_level(level)
    x = seeded(24, 40)
    x[0, 3], x[1, 3], x[2, 3], x[3] = torch.nan, torch.inf, -torch.inf, 0
    x[4, :2] = torch.tensor([torch.inf, -torch.inf])
    x[5], x[6], x[7] = 3e38, 1e-38, x[7] * 1e-31
    x[8, 5], x[9] = 1e30, -3e38
    packed = rtn(seeded(70, 40, seed=1), TensorSpec(format=Int(bits=8), granularity=PerChannel()))
    for rows in (x, x[:1], x[1:3]):
        call = rows, packed.qweight, packed.scale, None, None, *INPUTS[mode], 8
        y = linear_int8(*call)
        assert same(y, linear_int8_reference(*call))
        assert same(linear_int8(rows.bfloat16(), *call[1:]), linear_int8_reference(rows.bfloat16(), *call[1:]))
    assert torch.isfinite(linear_int8(x, *call[1:])[10:]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_inputs_as_they_lie(level, native_level):
    native_level(level)
    packed = rtn(seeded(67, 24, seed=1), TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=8)))
    weight = packed.qweight, packed.scale, packed.group_scale, None, None, None, 4
    for x in (
        seeded(24, 10).T,
        seeded(3, 24, 5).transpose(1, 2),
        seeded(6, 48)[:, ::2],
        seeded(9, 48)[:, 7:31],
        seeded(24).expand(4, 24),
    ):
        assert same(linear_int8(x, *weight), linear_int8_reference(x, *weight))
    wide = torch.cat([packed.qweight, packed.qweight], dim=1)[:, : packed.qweight.shape[1]]
    assert same(linear_int8(seeded(5, 24), wide, *weight[1:]), linear_int8_reference(seeded(5, 24), *weight))
    for empty in (seeded(0, 24), seeded(2, 0, 24)):
        assert linear_int8(empty, *weight).shape == (*empty.shape[:-1], 67)


@pytest.mark.parametrize("level", LEVELS)
def test_other_dtypes_are_computed_in_float32(level, native_level):
    native_level(level)
    packed = rtn(seeded(9, 24, seed=1), TensorSpec(format=Int(bits=8), granularity=PerChannel()))
    call = seeded(5, 24).double(), packed.qweight, packed.scale, None, seeded(9).double(), None, None, 8
    assert same(linear_int8(*call), linear_int8_reference(*call))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_smoothing_in_the_same_pass(level, dtype, native_level):
    """Equals multiplying first and rounding to the dtype, as ``nn.basis`` does; in any dtype of the vector."""
    native_level(level)
    smooth, x = seeded(130).exp(), seeded(9, 130).to(dtype)
    packed = rtn(seeded(67, 130, seed=1), TensorSpec(format=Int(bits=8), granularity=PerChannel()))
    weight = packed.qweight, packed.scale, None, None, None, None, 8
    for stored in (smooth, smooth.bfloat16()):
        expected = linear_int8_reference((x.float() * stored.float()).to(dtype), *weight)
        assert same(linear_int8(x, *weight, stored), expected)


UNIT = {torch.float32: 6e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("level", [*LEVELS, "off"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_in_the_same_pass(level, dtype, native_level, monkeypatch):
    """Of the outputs as they were rounded, against float64; those before ``active_from`` are bit for bit what they were."""
    if level == "off":
        monkeypatch.setenv("DQTK_NATIVE", "off")
        library.forget()
    else:
        native_level(level)
    packed = rtn(seeded(134, 40, seed=1), TensorSpec(format=Int(bits=8), granularity=PerChannel()))
    for rows in (1, 9):
        x = 0.7 * seeded(rows, 40).to(dtype)
        call = x, packed.qweight, packed.scale, None, seeded(134, seed=2), None, None, 8
        plain = linear_int8_reference(*call)
        for name, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
            exact = F.gelu(plain.double(), approximate=approximate)
            for first in (0, 1, 64, 67, 133):
                y = linear_int8(*call, None, name, first)
                assert y.dtype == dtype
                assert torch.equal(y[:, :first], plain[:, :first])
                error = (y.double() - exact)[:, first:].abs()
                assert (error <= UNIT[dtype] * (exact[:, first:].abs() + 0.5 * plain[:, first:].abs().double()) + 1e-7).all()
                torch.testing.assert_close(y, linear_int8_reference(*call, None, name, first), rtol=2 * UNIT[dtype], atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_of_all_numbers(level, activation, native_level):
    """Far tails, zeros, infinities and NaN, as torch has them."""
    native_level(level)
    bias = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, torch.nan, 1e-30, -1e-30])])
    weight = torch.zeros(len(bias), 8, dtype=torch.int8)
    y = linear_int8(torch.ones(1, 8), weight, torch.ones(len(bias), 1), None, bias, None, None, 8, None, activation)[0]
    expected = F.gelu(bias.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=3e-7, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("outputs", [3, 530])
def test_many_rows_in_chunks(level, outputs, native_level):
    """More rows than codes are kept at a time (8 MiB) or near a core; and few outputs, where threads share a panel's rows."""
    native_level(level)
    packed = rtn(seeded(outputs, 2056, seed=1), TensorSpec(format=Int(bits=8), granularity=PerChannel()))
    x = seeded(4201, 257).repeat(1, 8)
    call = x.bfloat16(), packed.qweight, packed.scale, None, None, None, None, 8
    assert same(linear_int8(*call), linear_int8_reference(*call))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", INPUTS)
def test_convolution(level, mode, native_level, threads):
    native_level(level)
    for i, case in enumerate(CASES):
        threads(1 + i % 2)
        for bits in (3, 8):
            _, packed, bias = stored_conv(case, bits)
            for dtype in DTYPES:
                x = seeded(*case[0]).to(dtype)
                variants = [x]
                if x.ndim == 4:
                    variants += [x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
                for given in variants:
                    call = conv_arguments(given, case, packed, bits, bias.to(dtype), mode)
                    assert same(conv_int8(*call), conv_int8_reference(*call)), (case, bits, dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mode", INPUTS)
def test_samples_that_are_not_numbers(level, mode, native_level):
    native_level(level)
    case = CASES[2]
    x = seeded(5, *case[0][1:])
    x[1, 0, 0, 0], x[2, 1, 2, 3], x[3] = torch.nan, torch.inf, 0
    _, packed, bias = stored_conv(case, 8)
    call = conv_arguments(x, case, packed, 8, bias, mode)
    y = conv_int8(*call)
    assert same(y, conv_int8_reference(*call))
    assert torch.isfinite(y[[0, 3, 4]]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_larger_convolution(level, native_level, threads):
    """Wide enough for several tiles and panels, with samples in several chunks of codes."""
    native_level(level)
    threads(2)
    case = ((3, 40, 200, 180), 70, [3, 3], [2, 2], [1, 1], [1, 1])
    _, packed, bias = stored_conv(case, 8)
    call = conv_arguments(seeded(*case[0]).bfloat16(), case, packed, 8, bias, "dynamic")
    assert same(conv_int8(*call), conv_int8_reference(*call))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_decoding(level, spec, native_level):
    native_level(level)
    for n, k in ((5, 64), (3, 192)):
        packed = rtn(seeded(n, k), spec)
        decoding = Decoding.of(packed, spec)
        for dtype in DTYPES:
            y = decode_weight(packed.qweight, *decoding.arguments(), k, dtype)
            assert same(y, decode_reference(packed.qweight, *decoding.arguments(), k, dtype))
            assert same(y, dequantize(packed, spec, k).to(dtype))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_times_decoded_weights(level, dtype, native_level, threads):
    """Up to ``FEW_ROWS`` rows are multiplied as the weight is decoded; sums in float32."""
    native_level(level)
    for i, spec in enumerate(SPECS[::7]):
        threads(1 + i % 2)
        packed = rtn(seeded(37, 96, seed=1), spec)
        how, weight = Decoding.of(packed, spec).arguments(), dequantize(packed, spec, 96).to(dtype).double()
        for rows in (1, 2, 3, 9):
            x, bias = seeded(rows, 96).to(dtype), seeded(37).to(dtype) if i % 2 else None
            exact = x.double() @ weight.T + (0 if bias is None else bias.double())
            y = linear_decoded(x, packed.qweight, bias, *how)
            torch.testing.assert_close(y.double(), exact, rtol=2 * UNIT[dtype], atol=2e-5 if dtype == torch.float32 else 2e-2)
    for k in (1, 31, 33, 1030):
        spec = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerChannel())
        packed = rtn(seeded(5, k, seed=1), spec)
        x, weight = seeded(2, k).to(dtype), dequantize(packed, spec, k).to(dtype).double()
        y = linear_decoded(x, packed.qweight, None, *Decoding.of(packed, spec).arguments())
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=2 * UNIT[dtype], atol=3e-2)
