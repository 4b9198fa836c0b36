"""Signal-to-quantization-noise ratio and cosine of tensors: how far a quantized denoiser's output is from the original's.

Both come from three sums, ``sum y^2``, ``sum (y_hat - y)^2`` and ``sum y * y_hat``, which add up over batches, shards and
steps. ``PairSums`` holds them in float64 per sample, so merged shards give the single-pass value (the error is summed as
itself: obtained as ``y^2 - 2 y y_hat + y_hat^2`` it would drown in rounding above about 70 dB in fp32).

SQNR as in MixDQ (Zhao et al. 2024): ``10 log10(sum y^2 / sum (y_hat - y)^2)``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def sqnr_db(approximation: Tensor, reference: Tensor) -> float:
    """SQNR in dB over all elements; ``inf`` where both are equal, ``-inf`` for a zero reference. Any shape, any real dtype."""
    return float(PairSums.of(approximation, reference, num_samples=1).sqnr_db()[0])


def cosine(approximation: Tensor, reference: Tensor) -> float:
    """Cosine in [-1, 1] over all elements; 1 where both are equal (zero tensors too), 0 where only one is zero."""
    return float(PairSums.of(approximation, reference, num_samples=1).cosine()[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSums:
    """Sums over the elements of each sample, float64 [S] on the CPU; ``+`` merges two shards of the same samples."""

    reference_squared: Tensor  # sum y^2
    error_squared: Tensor  # sum (y_hat - y)^2
    product: Tensor  # sum y * y_hat

    @classmethod
    def of(cls, approximation: Tensor, reference: Tensor, *, num_samples: int) -> "PairSums":
        """The sums of one batch whose leading axis is [R * S]: row ``i`` belongs to sample ``i % num_samples``.

        That is the layout of batched guidance: all unconditional rows, then all conditional ones. With ``num_samples=1`` every
        element counts for the one sample, whatever the shape. Raises ``ValueError`` for unequal shapes or rows that do not
        divide.
        """
        if approximation.shape != reference.shape:
            raise ValueError(
                f"PairSums.of: both tensors must be of one shape, got {list(approximation.shape)} and {list(reference.shape)}. "
                "Compare outputs of the same call."
            )
        rows = reference.shape[0] if reference.ndim else 1
        if num_samples < 1 or (num_samples > 1 and rows % num_samples):
            raise ValueError(
                f"PairSums.of: num_samples must be at least 1 and divide the {rows} rows, got {num_samples}. "
                "Pass the number of images in the batch."
            )
        y = reference.detach().cpu().double()
        y_hat = approximation.detach().cpu().double()
        if num_samples == 1:
            y, y_hat = y.reshape(1, 1, -1), y_hat.reshape(1, 1, -1)
        else:
            y, y_hat = (x.reshape(rows // num_samples, num_samples, -1) for x in (y, y_hat))
        return cls(
            reference_squared=y.square().sum(dim=(0, 2)),
            error_squared=(y_hat - y).square().sum(dim=(0, 2)),
            product=(y * y_hat).sum(dim=(0, 2)),
        )

    @classmethod
    def zeros(cls, num_samples: int) -> "PairSums":
        """The neutral element of ``+``."""
        return cls(**{name: torch.zeros(num_samples, dtype=torch.float64) for name in cls.__slots__})

    def __add__(self, other: "PairSums") -> "PairSums":
        return PairSums(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def concatenated(self, other: "PairSums") -> "PairSums":
        """The samples of both, one after the other."""
        return PairSums(**{name: torch.cat([getattr(self, name), getattr(other, name)]) for name in self.__slots__})

    def pooled(self) -> "PairSums":
        """All samples as one."""
        return PairSums(**{name: getattr(self, name).sum().reshape(1) for name in self.__slots__})

    def sqnr_db(self) -> Tensor:
        """Float64 [S] in dB; ``inf`` without error."""
        ratio = self.reference_squared / self.error_squared
        return torch.where(self.error_squared == 0, torch.inf, 10 * torch.log10(ratio))

    def cosine(self) -> Tensor:
        """Float64 [S] in [-1, 1]; 1 without error."""
        # |y_hat|^2 follows from the three sums: e = y_hat - y, so |y_hat|^2 = |e|^2 + 2 <y, y_hat> - |y|^2.
        approximation_squared = (self.error_squared + 2 * self.product - self.reference_squared).clamp_min(0)
        norm = (self.reference_squared * approximation_squared).sqrt()
        value = torch.where(norm > 0, self.product / norm.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return torch.where(self.error_squared == 0, 1.0, value.clamp(-1, 1))
