"""Fréchet distance of two sets of features, taken as Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

The last term is where implementations differ and break. S1 S2 is not symmetric, so a general matrix square root or general
eigenvalues give complex numbers from rounding alone; and an epsilon on the diagonal, added to keep them finite, changes the
value. It is the nuclear norm (sum of singular values) of L1^T L2 for any S = L L^T, which is real whatever the rounding:

    from moments    L = V sqrt(w) from S = V w V^T (eigh), without the directions in which w is zero to rounding
    from features   L^T = X / sqrt(N - 1), X centred: an N1 x N2 matrix instead of D x D ones; where both N < D

All in float64, and nothing is added. (The usual symmetric form, roots of the eigenvalues of L1^T S2 L1, squares the condition
and then takes roots of rounding errors, 1e-8 for each 1e-16. With variances over eight decades, D = 512 and N = 511, it was off
by 3e-7 in 1.9e-4, and the nuclear norm by 7e-15; for D = 2048 it takes 3.7 s and this 7.2 s on one thread of a busy 2-core EPYC.
Paired sets are close enough for that to matter. Directions of zero variance must go for the same reason.)

The distance of samples is biased upwards by about c / N with a c of the model's own (Chong & Forsyth 2020, arXiv 1911.07023):
equal N does not make two *models* comparable when their c differ. Measured, D = 2048, same distribution, independent samples:
34.1, 10.7, 2.2 for N = 256, 1024, 5000. Of features of the same prompts and seeds ("paired") the bias is common to both sets
and nearly cancels (D = 512, N = 1024, 10 % noise: 0.046 paired, 4.37 unpaired over a floor of 4.34). The function is the same
one: whether the sets are paired, and whether the reference is the original model or a dataset, is for the caller to say in
the score's name, since they are different scores.
"""

import math

import torch
from torch import Tensor

from .moments import Moments, check_features
from .score import SetScore


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance, at least 0, in squared units of the features; symmetric, 0 for equal moments.

    Raises ``ValueError`` for different D, fewer than two features, and moments that are not finite.
    """
    for name, x in (("first", a), ("second", b)):
        if x.num < 2:
            raise ValueError(
                f"frechet_distance: the {name} moments must be of at least 2 features, got {x.num}. Score more images."
            )
        if not bool(torch.isfinite(x.mean).all() and torch.isfinite(x.scatter).all()):
            raise ValueError(
                f"frechet_distance: the {name} moments must be finite, got NaN or infinity. Make them with Moments.of."
            )
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"frechet_distance: both moments must be of one D, got {len(a.mean)} and {len(b.mean)}. Use one feature extractor."
        )
    first, second = a.covariance(), b.covariance()
    shift = float((a.mean - b.mean).square().sum())
    nuclear = float(torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum())
    return _distance(shift, float(first.trace()), float(second.trace()), nuclear)


def frechet_distance_of(x: Tensor, y: Tensor) -> float:
    """``frechet_distance`` of features [N1, D] and [N2, D], without any D x D matrix where N1 and N2 are below D.

    Same value, faster for few samples. Raises ``ValueError`` for fewer than two rows, different D, NaN and infinities.
    """
    check_features("frechet_distance_of", x, y, least=2)
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(Moments.of(x), Moments.of(y))
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    shift = float((x.mean(dim=0) - y.mean(dim=0)).square().sum())
    x = (x - x.mean(dim=0)) / math.sqrt(len(x) - 1)
    y = (y - y.mean(dim=0)) / math.sqrt(len(y) - 1)
    nuclear = float(torch.linalg.svdvals(x @ y.T).sum())
    return _distance(shift, float(x.square().sum()), float(y.square().sum()), nuclear)


def rank_warning(num: int, dim: int, num_reference: int | None = None) -> str | None:
    """What to print beside a distance of ``num`` features of ``dim`` numbers, ``None`` if nothing.

    ``num_reference``: features that they are compared with, if not as many.

    The covariance of N features has rank N - 1 at most, so it is singular for N up to D, N = D included.
    """
    others = num if num_reference is None else num_reference
    if min(num, others) > dim:
        return None
    counts = str(num) if num == others else f"{num} generated and {others} reference"
    return (
        f"{counts} features of {dim} numbers: their covariance is singular and the Fréchet distance biased upwards. "
        f"Compare only equal counts, beside the floor of the original against itself, or score more than {dim}."
    )


def _factor(covariance: Tensor) -> Tensor:
    """L [D, rank] with L L^T the positive semidefinite float64 ``covariance`` [D, D]."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def _distance(shift: float, trace_a: float, trace_b: float, nuclear: float) -> float:
    # Below 0 only by rounding: tr S1 + tr S2 >= 2 tr (S1 S2)^(1/2).
    return max(0.0, shift + trace_a + trace_b - 2 * nuclear)


SCORES = (
    SetScore(
        name="frechet",
        label="Fréchet distance",
        higher_is_better=False,
        function=lambda generated, reference, paired: frechet_distance_of(generated, reference),
        full_rank=True,
    ),
    SetScore(  # Nash et al. 2021, arXiv 2103.03841, section 4: features that keep places, so it sees layout where FID sees content
        name="sfid",
        label="sFID",
        higher_is_better=False,
        function=lambda generated, reference, paired: frechet_distance_of(generated, reference),
        head="spatial",
        full_rank=True,
        published=(("inception2015*", "legacy"),),  # OpenAI's evaluator, which resizes as TensorFlow 1 did
    ),
)
