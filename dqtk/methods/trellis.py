"""Where a weight of trellis codes may lie: a ring for each tile of rows and columns, whose numbers follow each other by shifts.

The search takes weights per number: of a quadratic form within a tile's few columns, the diagonal. Numbers of the trellis are those
of a normal distribution of variance 1, so weights should be rotated first (``spec.Hadamard``), and rows have scales.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqtk.kernels import encode_trellis
from dqtk.numerics.packing import Packed
from dqtk.numerics.trellis import TILE, decode, from_tiles, pack, to_tiles
from dqtk.numerics.vector_grid import in_units
from dqtk.spec import TensorSpec, Trellis


@dataclass(frozen=True, kw_only=True, slots=True)
class TrellisGrid:
    """The numbers of a trellis. scale: float32 [N, 1]. Codes are states, int32 [ceil(N / 64), G, steps]."""

    spec: TensorSpec
    scale: Tensor

    @property
    def width(self) -> int:
        return TILE[1]

    @property
    def rows(self) -> int:
        return TILE[0]

    @property
    def _form(self) -> Trellis:
        form = self.spec.format
        assert isinstance(form, Trellis)
        return form

    def encode(self, weight: Tensor, root: Tensor | None = None) -> Tensor:
        columns = torch.ones(self.width, device=weight.device) if root is None else root.square().sum(dim=1)
        importance = self.scale.square() * columns.repeat(weight.shape[1] // self.width)
        importance = importance / importance.amax().clamp(min=1e-30)
        tiles = to_tiles(in_units(weight, self.scale), TILE)
        states = encode_trellis(tiles, self._form, weight=to_tiles(importance, TILE))
        return states.unflatten(0, (-1, weight.shape[1] // self.width))

    def decode(self, codes: Tensor) -> Tensor:
        numbers = decode(codes.flatten(0, 1), self._form)
        return from_tiles(numbers, self.scale.shape[0], codes.shape[1] * self.width, TILE) * self.scale

    def pack(self, codes: Tensor) -> Packed:
        return Packed(qweight=pack(codes.flatten(0, 1), self._form), scale=self.scale)

    def scaled(self, factor: Tensor) -> "TrellisGrid":
        return replace(self, scale=self.scale * factor)
