"""Which spec runs as which op, and what the reports say."""

import pytest

from dqtk import ops
from dqtk.kernels import op_of, report_of
from dqtk.numerics.codebook import bitmod, log_grid, nf4
from dqtk.spec import (
    MSE,
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
    Trellis,
    TwoLevel,
    VectorCodebook,
)


def weight(form, granularity=None):
    return TensorSpec(format=form, granularity=granularity or PerChannel())


def dynamic(form, granularity=None):
    return TensorSpec(format=form, granularity=granularity or PerToken(), range=Dynamic())


def static(form, **how):
    return TensorSpec(format=form, granularity=PerTensor(), **how)


E4M3, E5M2, E2M1 = Float(), Float(exponent=5, mantissa=2), Float(exponent=2, mantissa=1)
I4, I8, ASYM = Int(bits=4), Int(bits=8), Int(bits=8, symmetric=False)
A8 = dynamic(I8)

TABLE = [
    # 8-bit integer inputs; weights that are int8 numbers times one float per output channel
    (weight(I8), A8, "int8"),
    (weight(I8, PerTensor()), A8, "int8"),
    (weight(Int(bits=5)), A8, "int8"),
    (weight(Int(bits=2)), A8, "int8"),
    (weight(I4, TwoLevel()), A8, "int8"),
    (weight(I8), static(I8), "int8"),
    (weight(I8), static(ASYM), "int8"),
    (weight(I8), static(ASYM, range=MSE()), "int8"),
    (weight(I4, TwoLevel()), static(ASYM), "int8"),
    # what the integer kernel does not have: zero points per token, groups, other widths, weights that are no integers
    (weight(I8), dynamic(ASYM), "emulated"),
    (weight(I8), dynamic(I8, PerGroup()), "emulated"),
    (weight(I8), dynamic(I8, E8M0Group()), "emulated"),
    (weight(I8), dynamic(I4), "emulated"),
    (weight(I8), dynamic(Int(bits=7)), "emulated"),
    (weight(I8), static(I4), "emulated"),
    (weight(I4, PerGroup()), A8, "emulated"),
    (weight(I4, E8M0Group()), A8, "emulated"),
    (weight(I4, E4M3Group()), A8, "emulated"),
    (weight(ASYM), A8, "emulated"),
    (weight(Int(bits=4, symmetric=False), PerGroup()), A8, "emulated"),
    (weight(E2M1), A8, "emulated"),
    (weight(E4M3), A8, "emulated"),
    (weight(nf4()), A8, "emulated"),
    (weight(bitmod(4), PerGroup()), A8, "emulated"),
    # FP8
    (weight(E4M3), dynamic(E4M3), "fp8"),
    (weight(E4M3, PerTensor()), dynamic(E4M3), "fp8"),
    (weight(E4M3), static(E4M3), "fp8"),
    (weight(E4M3, PerGroup()), dynamic(E4M3), "emulated"),
    (weight(E4M3, E8M0Group()), dynamic(E4M3), "emulated"),
    (weight(E4M3), dynamic(E4M3, E8M0Group()), "emulated"),
    (weight(E4M3), dynamic(E4M3, PerGroup()), "emulated"),
    (weight(E5M2), dynamic(E4M3), "emulated"),
    (weight(E4M3), dynamic(E5M2), "emulated"),
    (weight(E4M3), static(Float(signed=False)), "emulated"),
    (weight(E4M3), dynamic(Float(exponent=4, mantissa=4, signed=False)), "emulated"),
    (weight(I8), dynamic(E4M3), "emulated"),
    # the others
    (weight(E2M1, E4M3Group()), dynamic(E2M1, E4M3Group()), "emulated"),
    (weight(E2M1, E8M0Group()), dynamic(E4M3, E8M0Group()), "emulated"),
    (weight(I8), static(log_grid(4)), "emulated"),
]


@pytest.mark.parametrize("more", [{}, {"transforms": (Smooth(), Hadamard()), "low_rank": LowRank()}], ids=["plain", "transformed"])
@pytest.mark.parametrize(("stored", "given", "op"), TABLE, ids=str)
def test_ops(stored, given, op, more):
    """Transforms and branches are around the op and change nothing. Convolutions have no FP8 kernel."""
    spec = LayerSpec(weight=stored, input=given, **more)
    assert op_of(spec, "linear") == {"int8": "linear_int8", "fp8": "linear_fp8"}.get(op, op)
    assert op_of(spec, "conv") == {"int8": "conv_int8", "fp8": "emulated"}.get(op, op)


@pytest.mark.parametrize("stored", dict.fromkeys(stored for stored, _, _ in TABLE), ids=str)
def test_without_rounded_inputs_weights_are_decoded(stored):
    for kind in ("linear", "conv"):
        assert op_of(LayerSpec(weight=stored), kind) == "weight_only"


def test_reports_name_what_runs():
    assert report_of("conv_int8", "cuda") == "integer matmul through torch._int_mm"
    assert report_of("linear_int8", "mps") == "emulated in floating point"
    assert report_of("linear_fp8", "cpu") == "emulated in floating point"
    assert report_of("emulated", "cuda") == "emulated in floating point"
    assert report_of("weight_only", "mps") == "weights decoded to the compute dtype, then torch's own matmul"


@pytest.mark.parametrize("op", ["block_attention", "linear_int4"])
def test_only_ops_are_reported(op):
    """A name that nothing runs as would be said to be emulated."""
    with pytest.raises(AssertionError, match=op):
        report_of(op, "cpu")


def test_reports_on_cuda_name_triton_or_why_it_does_not_run(monkeypatch):
    monkeypatch.setattr(ops.gpu, "describe", lambda: (True, "Triton kernels"))
    assert report_of("linear_int8", "cuda") == "integer matmul, Triton kernels"
    decoded = "weights decoded inside Triton kernels (linear, 4 and 8 bits) or to the compute dtype, then torch's own matmul"
    assert report_of("weight_only", "cuda") == decoded
    monkeypatch.setattr(ops.gpu, "describe", lambda: (False, "Triton kernels: triton is not installed"))
    missing = "integer matmul through torch._int_mm (Triton kernels: triton is not installed)"
    assert report_of("linear_int8", "cuda") == missing
    assert report_of("weight_only", "cuda").endswith("then torch's own matmul (Triton kernels: triton is not installed)")


@pytest.mark.parametrize("op", ["linear_int8", "conv_int8", "weight_only"])
def test_reports_on_the_cpu_name_the_native_kernels_or_why_there_are_none(op, monkeypatch):
    integers = op != "weight_only"
    monkeypatch.setattr(ops.native, "describe", lambda: (True, "native (some level)"))
    served = report_of(op, "cpu")
    monkeypatch.setattr(ops.native, "describe", lambda: (False, "native kernels: no compiler"))
    missing = report_of(op, "cpu")
    if integers:
        assert served == "integer matmul, native (some level)"
        assert missing == "integer matmul through torch._int_mm (native kernels: no compiler)"
    else:
        assert served == "weights decoded to the compute dtype, native (some level), then torch's own matmul"
        assert missing == "weights decoded to the compute dtype, then torch's own matmul (native kernels: no compiler)"


def test_reports_of_the_trellis_search_say_whether_it_is_slow(monkeypatch):
    monkeypatch.setattr(ops.native, "describe", lambda: (True, "native (some level)"))
    assert report_of("trellis_search", "cpu") == "Viterbi's search, native (some level)"
    assert report_of("trellis_search", "cuda") == "Viterbi's search through torch, some hundred times slower"
    monkeypatch.setattr(ops.native, "describe", lambda: (False, "native kernels: no compiler"))
    slow = "Viterbi's search through torch, some hundred times slower (native kernels: no compiler)"
    assert report_of("trellis_search", "cpu") == slow


def test_weights_of_vectors_name_their_own_decoding(monkeypatch):
    words, rings = weight(VectorCodebook()), weight(Trellis())
    for kind in ("linear", "conv"):
        assert op_of(LayerSpec(weight=words), kind) == "vectors_only"
        assert op_of(LayerSpec(weight=rings), kind) == "trellis_only"
        assert op_of(LayerSpec(weight=words, input=A8), kind) == "emulated"
    assert report_of("vectors_only", "mps") == "words looked up in their books through torch, then torch's own matmul"
    monkeypatch.setattr(ops.native, "describe", lambda: (True, "native (some level)"))
    assert report_of("trellis_only", "cpu") == "trellis codes decoded, native (some level), then torch's own matmul"
    monkeypatch.setattr(ops.native, "describe", lambda: (False, "native kernels: no compiler"))
    text = "trellis codes decoded through torch, then torch's own matmul (native kernels: no compiler)"
    assert report_of("trellis_only", "cpu") == text
    monkeypatch.setattr(ops.gpu, "describe", lambda: (True, "Triton kernels"))
    assert report_of("trellis_only", "cuda") == "trellis codes decoded, Triton kernels, then torch's own matmul"
