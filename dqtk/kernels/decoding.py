"""How stored codes become numbers, whatever the format: the one place that picks decoding ops by the type of the format."""

from typing import Protocol

import torch
from torch import Tensor

from dqtk.numerics.packing import Packed
from dqtk.spec import TensorSpec, Trellis, VectorCodebook

from .decoded import Decoding
from .trellis import TrellisDecoding
from .vectors import VectorDecoding


class Decodes(Protocol):
    """What layers ask of a decoding."""

    def weight(self, qweight: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """The stored weight [N, K], rounded from float32 to ``dtype``."""

    def linear(self, x: Tensor, qweight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., N] = x W^T + bias in the dtype of ``x`` [..., K]."""


def decoding_of(packed: Packed, spec: TensorSpec) -> Decodes:
    """The decoding of a stored weight."""
    if isinstance(spec.format, Trellis):
        return TrellisDecoding.of(packed, spec)
    return VectorDecoding.of(packed, spec) if isinstance(spec.format, VectorCodebook) else Decoding.of(packed, spec)
