"""Which op a spec runs as: the one place that knows what the kernels can take.

weight_only   inputs stay in the compute dtype: the weight is decoded, then torch's own matmul or convolution
vectors_only, trellis_only  the same of a weight of words from learned books, and of trellis codes
linear_int8, conv_int8   8-bit integer inputs and weights that are int8 numbers times one float per output channel
linear_fp8    E4M3 inputs per token and E4M3 weights per channel
emulated      everything else: inputs are rounded, weights decoded, and the product is that of float32 numbers

``report_of`` also knows "trellis_search", which no layer's spec runs as. What runs for attention ``report_of_attention`` says.
"""

from dqtk import gpu, native
from dqtk.gpu import flex
from dqtk.spec import (
    STATIC,
    AttentionSpec,
    Dynamic,
    Fixed,
    Float,
    Int,
    LayerSpec,
    PerChannel,
    PerTensor,
    PerTile,
    PerToken,
    RowInTile,
    TensorSpec,
    Trellis,
    TwoLevel,
    VectorCodebook,
)

E4M3 = Float(exponent=4, mantissa=3)
WEIGHT_ONLY = ("weight_only", "vectors_only", "trellis_only")
"""Ops of layers whose inputs stay as they are."""
OPS = (*WEIGHT_ONLY, "linear_int8", "conv_int8", "linear_fp8", "emulated", "trellis_search")
"""What ``report_of`` knows."""
_CODES = {"vectors_only": "words looked up in their books", "trellis_only": "trellis codes decoded"}
EMULATED = "emulated in floating point"
"""What ``report_of`` says where nothing serves an op: its pictures are real, its speed is not."""


def op_of(spec: LayerSpec, kind: str) -> str:
    """The op of a layer; ``kind`` is "linear" or "conv"."""
    if spec.input is None:
        form = spec.weight.format
        return (
            "vectors_only" if isinstance(form, VectorCodebook) else "trellis_only" if isinstance(form, Trellis) else "weight_only"
        )
    if _takes_int8(spec.weight, spec.input):
        return f"{kind}_int8"
    if kind == "linear" and _takes_fp8(spec.weight, spec.input):
        return "linear_fp8"
    return "emulated"


def _takes_int8(weight: TensorSpec, given: TensorSpec) -> bool:
    if not (isinstance(weight.format, Int) and isinstance(given.format, Int) and given.bits == 8):
        return False
    symmetric = given.format.symmetric or not isinstance(given.range, Dynamic)
    granularities = isinstance(weight.granularity, PerTensor | PerChannel | TwoLevel) and isinstance(
        given.granularity, (PerToken, *STATIC)
    )
    return weight.format.symmetric and symmetric and granularities


def _takes_fp8(weight: TensorSpec, given: TensorSpec) -> bool:
    formats = weight.format == E4M3 and given.format == E4M3
    return formats and isinstance(weight.granularity, PerTensor | PerChannel) and isinstance(given.granularity, (PerToken, *STATIC))


def report_of(op: str, device: str) -> str:
    """What runs for an op on a device type such as "cpu", in words; ``op``: what ``op_of`` says, or "trellis_search"."""
    assert op in OPS, op
    served, by = _kernels(op, device)
    why = f" ({by})" if by and not served else ""
    if op == "weight_only":
        if served and device == "cuda":
            return f"weights decoded inside {by} (linear, 4 and 8 bits) or to the compute dtype, then torch's own matmul"
        if served:
            return f"weights decoded to the compute dtype, {by}, then torch's own matmul"
        return f"weights decoded to the compute dtype, then torch's own matmul{why}"
    if op in _CODES:
        return f"{_CODES[op]}{f', {by}' if served else ' through torch'}, then torch's own matmul{'' if served else why}"
    if op == "trellis_search":
        return f"Viterbi's search, {by}" if served else f"Viterbi's search through torch, some hundred times slower{why}"
    if op in ("linear_int8", "conv_int8") and device in ("cpu", "cuda"):
        return f"integer matmul, {by}" if served else f"integer matmul through torch._int_mm{why}"
    if op == "linear_fp8" and device == "cuda" and gpu.no_scaled_matmul() is None:
        return "FP8 matmul through torch._scaled_mm"
    return EMULATED


_PV_MODES = {RowInTile: "row", PerTile: "tile", Fixed: "static"}


def pv_mode_of(spec: AttentionSpec) -> str:
    """What dqtk::block_attention calls the rounding of probabilities."""
    return "fp8" if isinstance(spec.pv, Float) else _PV_MODES[type(spec.scale)]


def report_of_attention(spec: AttentionSpec, device: str, channels: int | None = None) -> str:
    """What runs for an attention on a device type, in words; blocks of a plan shrink where a sequence has few of them.

    channels: of a head; None: not known, taken for few.
    """
    if spec.kernel is not None:
        there = gpu.sage_version()
        what = f"sageattention {there}, the installed package" if there else "an error: sageattention is not installed"
        return what if device == "cuda" else "an error: sageattention is for CUDA devices"
    return "; ".join(dict.fromkeys(_report_of_blocks(spec, device, channels, qk, pv) for qk, pv in spec.widths()))


def _report_of_blocks(spec: AttentionSpec, device: str, channels: int | None, qk: int, pv: int) -> str:
    """Of heads with these widths."""
    exact, mode = (qk, pv) == (16, 16), pv_mode_of(spec)
    if flex.takes(spec.mask is not None, spec.block[0], spec.block[1], qk, pv):
        return f"live blocks, {flex.NAME}"
    if device == "cuda" and exact and spec.mask is None:
        return "torch's own attention: all of it, as it is"
    served, by = native.describe() if device == "cpu" else gpu.describe() if device == "cuda" else (False, "")
    if device == "cpu":
        taken = native.takes_blocks(spec.mask is not None, spec.block[1], channels or 1, qk, pv, mode)
    else:
        taken = gpu.takes_blocks(spec.block[0], spec.block[1], channels or 1, qk, pv, mode)
    if served and taken:
        return f"live blocks, {by}"
    shape = f"{spec.block[0]} by {spec.block[1]}" + ("" if channels is None else f" and {channels} channels")
    why = f" ({by} take no blocks of {shape} like these)" if served else f" ({by})" if by else ""
    return f"live blocks gathered for torch's own attention{why}" if exact else f"{EMULATED}{why}"


def _kernels(op: str, device: str) -> tuple[bool, str]:
    """Whether kernels of dqtk's own serve an op there, and which (or why none)."""
    if device == "cpu":
        return native.describe()
    return gpu.describe() if device == "cuda" and op in ("linear_int8", *WEIGHT_ONLY) else (False, "")
