"""The input basis of a runtime layer: smoothing and rotation, in the order that its spec gives them.

``apply`` takes an input into the basis in which the stored weight was rounded; ``undo`` takes a weight of that basis back to the
layer's own, so that ``weight`` of a quantized layer means what it meant before, and ``redo`` undoes that. With z = T(x) linear and
W' = W T^-1 (as x W^T is kept): smoothing is z = x * smooth and W' = W / smooth; rotation is orthogonal, z = R(x) and W' = R(W).
"""

from dataclasses import dataclass

from torch import Tensor

from dqtk.numerics.hadamard import block_size, rotate, unpack_signs, unrotate
from dqtk.spec import Hadamard, LayerSpec, Smooth, Transform


@dataclass(frozen=True, slots=True)
class Basis:
    """The transforms of a layer and the width of its input."""

    transforms: tuple[Transform, ...]
    channels: int

    @staticmethod
    def of(spec: LayerSpec, channels: int) -> "Basis":
        return Basis(tuple(t for t in spec.transforms if isinstance(t, Smooth | Hadamard)), channels)

    def apply(self, x: Tensor, smooth: Tensor | None, signs: Tensor | None) -> Tensor:
        """Input [..., channels] in the basis of the stored weight, same dtype."""
        for transform in self.transforms:
            if isinstance(transform, Smooth):
                assert smooth is not None
                x = (x.float() * smooth.float()).to(x.dtype)
            if isinstance(transform, Hadamard):
                assert signs is not None
                x = rotate(x, unpack_signs(signs, self.channels), block_of(transform, self.channels), transform.regular)
        return x

    def undo(self, weight: Tensor, smooth: Tensor | None, signs: Tensor | None) -> Tensor:
        """float32 weight [N, taps * channels] back in the layer's own basis."""
        w = weight.unflatten(1, (-1, self.channels))
        for transform in reversed(self.transforms):
            if isinstance(transform, Smooth):
                assert smooth is not None
                w = w * smooth.float()
            if isinstance(transform, Hadamard):
                assert signs is not None
                w = unrotate(w, unpack_signs(signs, self.channels), block_of(transform, self.channels), transform.regular)
        return w.flatten(1)

    def redo(self, weight: Tensor, smooth: Tensor | None, signs: Tensor | None) -> Tensor:
        """Inverse of ``undo``: float32 weight [N, taps * channels] in the basis of the stored one."""
        w = weight.unflatten(1, (-1, self.channels))
        for transform in self.transforms:
            if isinstance(transform, Smooth):
                assert smooth is not None
                w = w / smooth.float()
            if isinstance(transform, Hadamard):
                assert signs is not None
                w = rotate(w, unpack_signs(signs, self.channels), block_of(transform, self.channels), transform.regular)
        return w.flatten(1)


def block_of(transform: Hadamard, channels: int) -> int:
    """The block that a rotation of this width uses. Raises ``ValueError`` where there is none."""
    return block_size(channels, transform.regular, transform.block)
