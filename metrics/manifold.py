"""Precision and recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020) of generated features.

A set's manifold is taken as the union of balls about its features, each reaching its k-th nearest neighbour in the same set.

    precision   generated features inside the reference's manifold: fidelity
    recall      reference features inside the generated manifold: variety
    density     reference balls a generated feature lies in, over k: fidelity, not inflated by one outlier's huge ball
    coverage    reference balls that hold a generated feature: variety, by the reference's balls only

They see what distances of means do not: a model that drops modes keeps precision and loses recall and coverage. Values depend
on N, k and the extractor (pool_3 in ADM, VGG16 fc2 in torch-fidelity), so compare only equal ones; coverage of two samples of
one distribution is 1 - 2^-k for large equal N, not 1.

Balls are closed, as in the papers (Naeem et al.'s code has them open: the same unless features are equal). Distances come from
``|x|^2 - 2 x y + |y|^2`` about the reference's mean, in float64: 13 times faster than summing differences (10,000 x 512, one
thread of a busy 2-core EPYC: 0.5 and 6.4 s per 1024 rows), but equal features are then a rounding error apart, which would decide
whether repeated images, whose radius is 0, lie in their own balls. So a bound of that error is granted to each ball.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import check_features
from .score import SetScore

_BLOCK = 1024  # rows against the whole other set at a time: 80 MiB for 10,000 features


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionRecall:
    """Both in [0, 1]."""

    precision: float
    recall: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DensityCoverage:
    """``density`` is about 1 for two samples of one distribution and may exceed it; ``coverage`` is in [0, 1]."""

    density: float
    coverage: float


def precision_recall(reference: Tensor, generated: Tensor, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2) of features [N, D] and [M, D].

    Raises ``ValueError`` for sets outside the contract and a k that is not below both set sizes.
    """
    x, y = _centred("precision_recall", reference, generated, k, least=min(len(reference), len(generated)))
    return PrecisionRecall(
        precision=float((_num_balls(y, x, _squared_radii(x, k)) > 0).double().mean()),
        recall=float((_num_balls(x, y, _squared_radii(y, k)) > 0).double().mean()),
    )


def density_coverage(reference: Tensor, generated: Tensor, *, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020, eq. 4 and 5) of features [N, D] and [M, D].

    Raises ``ValueError`` for sets outside the contract and a k that is not below the reference's size.
    """
    x, y = _centred("density_coverage", reference, generated, k, least=len(reference))
    radii = _squared_radii(x, k)
    num_inside, covered = 0, []
    for start in range(0, len(x), _BLOCK):
        part = slice(start, start + _BLOCK)
        inside = _least_squared_distances(x[part], y) <= radii[part, None]
        num_inside += int(inside.sum())
        covered.append(inside.any(dim=1))
    return DensityCoverage(density=num_inside / (k * len(y)), coverage=float(torch.cat(covered).double().mean()))


def _num_balls(points: Tensor, centres: Tensor, squared_radii: Tensor) -> Tensor:
    """In how many of the balls each point lies, [len(points)]."""
    parts = [(_least_squared_distances(rows, centres) <= squared_radii).sum(dim=1) for rows in points.split(_BLOCK)]
    return torch.cat(parts)


def _squared_radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row; the row itself is the first of k + 1."""
    nearest = [_squared_distances(rows, x).topk(k + 1, dim=1, largest=False).values[:, -1] for rows in x.split(_BLOCK)]
    return torch.cat(nearest).clamp_min(0)


def _squared_distances(x: Tensor, y: Tensor, *, slack: float = 0.0) -> Tensor:
    """[N, M], below 0 only by rounding and by ``slack`` times the squared lengths."""
    keep = 1 - slack
    lengths = keep * x.square().sum(dim=1, keepdim=True) + keep * y.square().sum(dim=1)
    return torch.addmm(lengths, x, y.T, alpha=-2)


def _least_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """What the squared distances are at least, rounding considered: error bounds of a sum of D products, on both sides."""
    return _squared_distances(x, y, slack=4 * x.shape[1] * torch.finfo(torch.float64).eps)


def _centred(where: str, reference: Tensor, generated: Tensor, k: int, *, least: int) -> tuple[Tensor, Tensor]:
    check_features(where, reference, generated)
    if not 1 <= k < least:
        raise ValueError(
            f"{where}: k must be at least 1 and below the number of features ({least}), got {k}. Score more images, or lower k."
        )
    x = reference.detach().double()
    mean = x.mean(dim=0)
    return x - mean, generated.detach().to(x) - mean


SCORES = (
    SetScore(
        name="precision",
        label="Precision, k = 3",
        higher_is_better=True,
        least=4,
        function=lambda generated, reference, paired: precision_recall(reference, generated).precision,
    ),
    SetScore(
        name="recall",
        label="Recall, k = 3",
        higher_is_better=True,
        least=4,
        function=lambda generated, reference, paired: precision_recall(reference, generated).recall,
    ),
    SetScore(
        name="density",
        label="Density, k = 5",
        higher_is_better=True,
        least=6,
        function=lambda generated, reference, paired: density_coverage(reference, generated).density,
    ),
    SetScore(
        name="coverage",
        label="Coverage, k = 5",
        higher_is_better=True,
        least=6,
        function=lambda generated, reference, paired: density_coverage(reference, generated).coverage,
    ),
)
