"""Spec -> stored weight and input scale: the one place that picks a solver. The type of ``LayerSpec.solver`` is the key."""

from collections.abc import Callable

from torch import Tensor

from dqtk.numerics.affine import scale_of_range
from dqtk.numerics.packing import Packed
from dqtk.spec import RTN, Float, LayerSpec, TensorSpec

from .rtn import rtn

SOLVERS: dict[type, Callable[[Tensor, TensorSpec], Packed]] = {RTN: rtn}


def solve(weight: Tensor, spec: LayerSpec) -> Packed:
    """Quantize a weight [N, K] with the solver of its spec."""
    return SOLVERS[type(spec.solver)](weight, spec.weight)


def static_input_scale(low: Tensor, high: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of a calibrated input range, as the runtime layers hold them (codes -128 .. 127)."""
    scale, zero = scale_of_range(low.clamp(max=0), high.clamp(min=0), spec.format)
    if isinstance(spec.format, Float):
        return scale, None
    return scale, (zero - 128 if zero is not None else scale.new_zeros(1))
