"""Where a weight of vectors may lie: scales and words, found once. Solvers choose codes on it, as on a ``WeightGrid`` of numbers.

A format of vectors is one class with these four methods; every solver of vectors works on every one of them.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dqtk.spec import PerTensor, TensorSpec, Trellis, VectorCodebook

from .packing import Packed, pack
from .trellis import TILE
from .vectors import BEAM, nearest_words, words_of


class VectorGrid(Protocol):
    """Codes are a tensor [ceil(N / rows), G, ...] for a weight of G * width columns."""

    @property
    def width(self) -> int:
        """Columns that are rounded together."""

    @property
    def rows(self) -> int:
        """Rows that are; the last ones may be fewer."""

    @property
    def scale(self) -> Tensor:
        """float32 [N, 1] or [1, 1]; 0 of a row of zeros, whose codes then mean zeros whatever they are."""

    def encode(self, weight: Tensor, root: Tensor | None = None) -> Tensor:
        """Codes near ``weight`` [N, G * width], every ``width`` columns under the error e root root^T e^T (None: e e^T)."""

    def decode(self, codes: Tensor) -> Tensor:
        """float32 [N, G * width]."""

    def pack(self, codes: Tensor) -> Packed:
        """The stored form of the codes of a whole weight."""

    def scaled(self, factor: Tensor) -> "VectorGrid":
        """The same with rows multiplied by ``factor`` [N, 1]; of one scale for all rows, by one factor [1, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WordGrid:
    """Sums of words (``VectorCodebook``). scale: float32 [N, 1] or [1, 1]. codebook: float16 [M, W, D]. beam: of the search."""

    spec: TensorSpec
    scale: Tensor
    codebook: Tensor
    beam: int = BEAM

    @property
    def width(self) -> int:
        return self.codebook.shape[2]

    @property
    def rows(self) -> int:
        return 1

    def encode(self, weight: Tensor, root: Tensor | None = None) -> Tensor:
        vectors = in_units(weight, self.scale).reshape(-1, self.width)  # a row's scale does not move its nearest words
        return nearest_words(vectors, self.codebook, root, self.beam).view(len(weight), -1, len(self.codebook))

    def decode(self, codes: Tensor) -> Tensor:
        return words_of(codes, self.codebook) * self.scale

    def pack(self, codes: Tensor) -> Packed:
        form = self.spec.format
        assert isinstance(form, VectorCodebook)
        return Packed(qweight=pack(codes.flatten(1), form.code_bits), scale=self.scale, codebook=self.codebook)

    def scaled(self, factor: Tensor) -> "WordGrid":
        return replace(self, scale=self.scale * factor)


def width_of(spec: TensorSpec) -> int:
    """Columns that are rounded together: 1 unless a weight is made of vectors."""
    if isinstance(spec.format, Trellis):
        return TILE[1]
    return spec.format.length if isinstance(spec.format, VectorCodebook) else 1


def root_mean_square(weight: Tensor, spec: TensorSpec) -> Tensor:
    """float32 [N, 1] or [1, 1]: what a weight [N, K] is divided by; 0 where it is zero."""
    square = weight.float().square()
    mean = square.mean().view(1, 1) if isinstance(spec.granularity, PerTensor) else square.mean(dim=1, keepdim=True)
    return mean.sqrt()


def in_units(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 [N, K]: a weight divided by its scales; as it is where a scale is 0."""
    return weight.float() / torch.where(scale == 0, 1.0, scale)
