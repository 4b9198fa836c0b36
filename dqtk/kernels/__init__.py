"""dqtk:: ops. Importing this package registers them; ``report_of`` says which kernel serves an op on a device."""

from .conv import conv_int8, conv_int8_reference, from_matrix, to_matrix
from .linear import linear_fp8, linear_int8, linear_int8_reference

__all__ = [
    "conv_int8",
    "conv_int8_reference",
    "from_matrix",
    "linear_fp8",
    "linear_int8",
    "linear_int8_reference",
    "report_of",
    "to_matrix",
]


def report_of(op: str, device: str) -> str:
    """What runs for ``op`` ("linear_int8", "conv_int8", "linear_fp8", "weight_only") on a device type such as "cpu"."""
    if op == "weight_only":
        return "weights decoded to the compute dtype, then torch's own matmul"
    if op in ("linear_int8", "conv_int8") and device in ("cpu", "cuda"):
        return "integer matmul through torch._int_mm"
    return "emulated in floating point"
