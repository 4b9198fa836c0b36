"""Mean and scatter of a set of features, mergeable: all that a Fréchet distance needs, in D^2 numbers whatever N is.

Workers that each saw some of the images write one ``Moments`` each; ``+`` merges them without any communication between
workers, and uneven, empty or single-image shards are nothing special. What is kept is the *scatter* about the mean (sum of
centred outer products), merged by Chan, Golub & LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample
variances", eq. 2.1), rather than the raw sum of outer products: that one subtracts two large numbers at the end, and loses
digits as soon as the features' mean is far from zero, which it is after a ReLU and a pool.

``check_features`` is the contract of every set-of-features score: floating [N, D], finite, one D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1024  # rows widened to float64 at a time: 16 MiB for D = 2048


def check_features(where: str, *sets: Tensor, least: int = 1) -> None:
    """That each set is a floating, finite [N, D] with N at least ``least`` and D at least 1, and that they agree on D.

    Raises ``ValueError`` otherwise. No conversion: 16-bit features stay as they are, and are widened block by block where used.
    """
    for name, x in zip(("first", "second"), sets, strict=False):
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{where}: the {name} set must be features [N, D], got {list(x.shape)}. Flatten or pool each image.")
        if not x.is_floating_point():
            raise ValueError(f"{where}: the {name} set must be floating point, got {x.dtype}. Pass features, not images.")
        if len(x) < least:
            raise ValueError(f"{where}: the {name} set must be at least {least} rows, got {len(x)}. Score more images.")
        if not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).any(dim=1).sum())
            raise ValueError(
                f"{where}: the {name} set must be finite, got {bad} rows that are not. Look at those images, or extract in fp32."
            )
    if len({x.shape[1] for x in sets}) > 1:
        raise ValueError(
            f"{where}: both sets must be of one D, got {' and '.join(str(x.shape[1]) for x in sets)}. Use one feature extractor."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Count, mean [D] and scatter [D, D] (sum of centred outer products) of N features; float64 on the CPU. ``+`` merges."""

    num: int
    mean: Tensor
    scatter: Tensor

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.scatter.shape != (len(self.mean), len(self.mean)):
            raise ValueError(
                f"Moments: mean and scatter must be [D] and [D, D], got {list(self.mean.shape)} and {list(self.scatter.shape)}. "
                "Make them with Moments.of."
            )
        if {self.mean.dtype, self.scatter.dtype} != {torch.float64}:
            raise ValueError(
                f"Moments: mean and scatter must be float64, got {self.mean.dtype} and {self.scatter.dtype}. "
                "Narrower sums lose the digits that small distances are made of."
            )

    @classmethod
    def of(cls, features: Tensor, *, block: int = _BLOCK) -> "Moments":
        """The moments of ``features`` [N, D], any floating dtype and device, N = 0 allowed.

        ``block`` rows are widened to float64 at a time, so the memory beyond the features is O(block * D + D^2). Raises
        ``ValueError`` for another shape or dtype, for NaN and infinities, and for a block below 1.
        """
        check_features("Moments.of", features, least=0)
        if block < 1:
            raise ValueError(f"Moments.of: block must be at least 1 row, got {block}. The default is {_BLOCK}.")
        total = cls.empty(features.shape[1])
        for rows in features.detach().split(block) if len(features) else ():
            x = rows.double()
            mean = x.mean(dim=0)
            x = x - mean
            total = total + cls(num=len(x), mean=mean.cpu(), scatter=(x.T @ x).cpu())
        return total

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """The neutral element of ``+``: no features of ``dim`` numbers."""
        return cls(num=0, mean=torch.zeros(dim, dtype=torch.float64), scatter=torch.zeros(dim, dim, dtype=torch.float64))

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of both sets together. Raises ``ValueError`` for different D."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"Moments: both must be of one D, got {len(self.mean)} and {len(other.mean)}. Merge shards of one extractor."
            )
        if self.num == 0 or other.num == 0:
            return other if self.num == 0 else self
        num, shift = self.num + other.num, other.mean - self.mean
        scatter = torch.addr(self.scatter, shift, shift, alpha=self.num * other.num / num).add_(other.scatter)
        return Moments(num=num, mean=self.mean + shift * (other.num / num), scatter=scatter)

    def covariance(self) -> Tensor:
        """The unbiased covariance, float64 [D, D]. Raises ``ValueError`` for fewer than two features."""
        if self.num < 2:
            raise ValueError(f"Moments.covariance: num must be at least 2, got {self.num}. Score more images.")
        return self.scatter / (self.num - 1)
