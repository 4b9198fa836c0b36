"""The linear ops: kernel equals reference bit for bit, reference equals independent float64 arithmetic."""

import pytest
import torch

from dqtk.kernels import linear, linear_fp8, linear_int8, linear_int8_reference
from dqtk.kernels.int8 import matmul_padded, matmul_reference
from dqtk.methods.rtn import rtn
from dqtk.native import IntegerLayer
from dqtk.numerics.packing import dequantize
from dqtk.spec import Float, Int, PerChannel, PerTensor, TensorSpec, TwoLevel

SHAPES = [((5, 24), 7), ((1, 8), 1), ((2, 3, 40), 16), ((1, 1, 17), 3), ((0, 24), 7), ((2, 0, 24), 7), ((24,), 5), ((33, 129), 65)]
INPUTS = ["dynamic", "static", "static-asymmetric"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(n, k, bits, granularity=None, bias=True, seed=1):
    """Spec, packed weight and bias."""
    granularity = granularity or (TwoLevel(size=8) if bits <= 7 and k % 8 == 0 else PerChannel())
    spec = TensorSpec(format=Int(bits=bits), granularity=granularity)
    return spec, rtn(seeded(n, k, seed=seed), spec), seeded(n, seed=seed + 1) if bias else None


def input_parameters(x, mode):
    if mode == "dynamic":
        return None, None
    zero = torch.tensor([-37 if mode == "static-asymmetric" else 0], dtype=torch.int32)
    return torch.tensor([0.021]), zero


def rounded(x, mode):
    """The input as the op must see it, float64."""
    x = x.double()
    if mode == "dynamic":
        scale = (x.float().abs().amax(-1, keepdim=True) / 127).double()
        scale[scale == 0] = 1
        return (x.float() / scale.float()).round().double() * scale
    scale, zero = input_parameters(x, mode)
    codes = ((x.float() / scale).round() + zero).clamp(-128, 127).double()
    return (codes - zero) * scale.double()


def arguments(x, packed, bits, bias, mode):
    return x, packed.qweight, packed.scale, packed.group_scale, bias, *input_parameters(x, mode), bits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
def test_kernel_equals_reference(bits, mode, shape, n):
    _, packed, bias = stored(n, shape[-1], bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = seeded(*shape).to(dtype)
        call = arguments(x, packed, bits, bias.to(dtype), mode)
        y = linear_int8(*call)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], n)
        assert y.is_contiguous()
        assert torch.equal(y, linear_int8_reference(*call))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_reference_equals_float64(bits, mode, bias):
    spec, packed, bias = stored(11, 48, bits, bias=bias)
    x = seeded(2, 9, 48)
    expected = rounded(x, mode) @ dequantize(packed, spec, 48).double().T
    expected = expected if bias is None else expected + bias.double()
    y = linear_int8_reference(*arguments(x, packed, bits, bias, mode))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_per_tensor_weight():
    spec, packed, bias = stored(11, 48, 8, granularity=PerTensor())
    x = seeded(3, 48)
    y = linear_int8(*arguments(x, packed, 8, bias, "dynamic"))
    expected = rounded(x, "dynamic") @ dequantize(packed, spec, 48).double().T + bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_result_is_close_to_the_unquantized_layer():
    """W8A8 of Gaussian data: about 1 % relative error."""
    w, x = seeded(64, 256, seed=1), seeded(32, 256)
    packed = rtn(w, TensorSpec(format=Int(bits=8), granularity=PerChannel()))
    y = linear_int8(*arguments(x, packed, 8, None, "dynamic"))
    assert (y - x @ w.T).norm() < 0.02 * (x @ w.T).norm()


@pytest.mark.parametrize("mode", INPUTS)
def test_non_contiguous_input(mode):
    _, packed, bias = stored(7, 24, 4)
    for x in (seeded(24, 10).T, seeded(3, 24, 5).transpose(1, 2), seeded(6, 48)[:, ::2], seeded(1, 24).expand(4, 24)):
        strided, dense = (linear_int8(*arguments(v, packed, 4, bias, mode)) for v in (x, x.contiguous()))
        assert torch.equal(strided, dense)


def test_tokens_do_not_influence_each_other():
    """Dynamic scales are per row: one huge token changes nothing elsewhere."""
    _, packed, bias = stored(7, 24, 8)
    x = seeded(5, 24)
    alone = linear_int8(*arguments(x[1:2], packed, 8, bias, "dynamic"))
    x[0] *= 1e4
    assert torch.equal(linear_int8(*arguments(x, packed, 8, bias, "dynamic"))[1:2], alone)


def test_rows_of_zeros_give_the_bias():
    _, packed, bias = stored(7, 24, 8)
    for mode in INPUTS:
        y = linear_int8(*arguments(torch.zeros(2, 24), packed, 8, bias, mode))
        torch.testing.assert_close(y, bias.expand(2, 7), rtol=1e-6, atol=1e-6)


def test_static_range_saturates():
    _, packed, _ = stored(7, 24, 8)
    huge, top = torch.full((1, 24), 1e6), torch.full((1, 24), 0.021 * 127)
    a, b = (linear_int8(*arguments(x, packed, 8, None, "static")) for x in (huge, top))
    assert torch.equal(a, b)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", INPUTS)
def test_inputs_do_not_hide_nan(wrong, mode):
    """A diverged model must not look healthy."""
    _, packed, bias = stored(7, 24, 8)
    x = seeded(3, 24)
    x[1, 4] = wrong
    y = linear_int8(*arguments(x, packed, 8, bias, mode))
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2]]).all()


def fp8_weight(n, k, granularity=None):
    return rtn(seeded(n, k, seed=1), TensorSpec(format=Float(), granularity=granularity or PerChannel()))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
def test_fp8_equals_float64(static, shape, n):
    packed, bias = fp8_weight(n, shape[-1]), seeded(n)
    for dtype in (torch.float32, torch.bfloat16):
        x = seeded(*shape).to(dtype)
        scale = torch.tensor([0.004]) if static else x.float().abs().amax(-1, keepdim=True) / 448
        codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double()
        expected = (codes * scale) @ (packed.qweight.double() * packed.scale).T + bias.double()
        y = linear_fp8(x, packed.qweight, packed.scale, bias, scale if static else None)
        assert y.dtype == dtype
        assert y.shape == (*shape[:-1], n)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_fp8_per_tensor_zeros_and_nan():
    packed = fp8_weight(5, 16, PerTensor())
    x = seeded(3, 16)
    x[0], x[1, 2] = 0, float("nan")
    y = linear_fp8(x, packed.qweight, packed.scale, None, None)
    assert not y[0].any()
    assert y[1].isnan().all()
    assert torch.isfinite(y[2]).all()


@pytest.mark.parametrize(("t", "k", "n"), [(1, 16, 16), (1, 17, 3), (33, 129, 65), (40, 64, 24), (0, 24, 7), (3, 24, 0)])
def test_scaled_matmul_of_cuda(t, k, n):
    """On the CPU, whose ``torch._scaled_mm`` takes the same arguments."""
    a, b = (seeded(rows, k, seed=rows).to(torch.float8_e4m3fn) for rows in (t, n))
    y = linear.matmul_scaled(a, b)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
def test_fp8_through_scaled_matmul_equals_reference(static, shape, n):
    packed, x, scale = fp8_weight(n, shape[-1]), seeded(*shape), torch.tensor([0.004]) if static else None
    call = x, packed.qweight, packed.scale, seeded(n), scale
    y = linear._linear_fp8(*call, linear.matmul_scaled)
    torch.testing.assert_close(y, linear_fp8(*call), rtol=1e-5, atol=1e-5)


# opcheck itself reads .grad of non-leaf copies.
OPCHECK_WARNING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")


@OPCHECK_WARNING
@pytest.mark.parametrize("mode", INPUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck_int8(bits, mode):
    _, packed, bias = stored(7, 24, bits)
    for x, b in ((seeded(2, 5, 24).requires_grad_(), bias.requires_grad_()), (seeded(5, 24).bfloat16(), None)):
        torch.library.opcheck(linear_int8, arguments(x, packed, bits, b, mode))


@OPCHECK_WARNING
def test_opcheck_fp8():
    packed = fp8_weight(7, 24)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # test_schema cannot multiply float8
    for call in (
        (seeded(2, 5, 24).requires_grad_(), packed.qweight, packed.scale, seeded(7).requires_grad_(), None),
        (seeded(5, 24).bfloat16(), packed.qweight, packed.scale, None, torch.tensor([0.01])),
    ):
        before = [None if v is None else v.detach().clone() for v in call]
        torch.library.opcheck(linear_fp8, call, test_utils=checks)
        for value, copy in zip(call, before, strict=True):
            assert value is None or torch.equal(value.float(), copy.float())


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=str)
def test_shapes_are_known_without_data(shape):
    """On the meta device: dtype, shape and strides of the real result."""
    _, packed, bias = stored(7, shape[-1], 8)
    x = seeded(*shape).bfloat16()
    call = arguments(x, packed, 8, bias, "dynamic")
    real, meta = linear_int8(*call), linear_int8(*(v.to("meta") if isinstance(v, torch.Tensor) else v for v in call))
    assert meta.is_meta
    assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize(("t", "k", "n"), [(1, 8, 8), (3, 13, 5), (40, 64, 24), (17, 30, 9)])
def test_padded_matmul_of_cuda_is_exact(t, k, n):
    generator = torch.Generator().manual_seed(t)
    a = torch.randint(-128, 128, (t, k), dtype=torch.int8, generator=generator)
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    assert torch.equal(matmul_padded(a, b), matmul_reference(a, b))


def through_torch(x, *layer):
    (y,) = linear.linears_int8_through_torch(x, [IntegerLayer(*layer)])
    return y


def test_rows_in_blocks_without_native_kernels(monkeypatch):
    monkeypatch.setattr(linear, "_OUTPUTS_AT_ONCE", 64 * 7)
    _, packed, bias = stored(7, 24, 4)
    for mode in INPUTS:
        call = arguments(seeded(3, 50, 24), packed, 4, bias, mode)
        assert torch.equal(through_torch(*call), linear_int8_reference(*call))


@pytest.mark.parametrize("mode", INPUTS)
def test_inputs_are_left_alone(mode):
    _, packed, bias = stored(7, 24, 8)
    for dtype in (torch.float32, torch.bfloat16):
        x = seeded(5, 24).to(dtype)
        copy = x.clone()
        through_torch(*arguments(x, packed, 8, bias, mode))
        assert torch.equal(x, copy)
