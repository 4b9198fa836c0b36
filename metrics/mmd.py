"""Maximum mean discrepancy of two sets of features (Gretton et al. 2012, "A Kernel Two-Sample Test"), and the scores made of it.

    KID      polynomial kernel on Inception features, unbiased (Binkowski et al. 2018, "Demystifying MMD GANs")
    JEDi     polynomial kernel of degree 2 on V-JEPA features, biased, times 100 (Luo et al. 2024, arXiv 2410.05203)
    CMMD     Gaussian of sigma 10 on unit CLIP embeddings, biased, times 1000 (Jayasumana et al. 2024, arXiv 2401.09603)
    rbf_mmd  Gaussian whose sigma is the reference's median distance: sees variety, which CMMD does not

Against the Fréchet distance: no bias to speak of at small N, no Gaussian assumption, no D x D matrix. Kernel matrices are summed
in blocks in float64, on the first set's device.

Two ways in which published implementations surprise, and what is done here. KID's subsets are drawn from the global generator,
so two calls on one set differ (torchmetrics: 0.0293 and 0.0294): here they follow from ``seed``, and ``Kid.full`` uses all
features at once, so that it has no randomness but the data's. And "unbiased" assumes that both sets are independent: images of
the same prompts and seeds are not. For those the cross term holds the pairs (i, i), which are far closer than chance, and the
estimate falls below zero (a set against itself: about -2 (E k(x, x) - E k(x, x')) / N). ``mmd_squared(..., paired=True)`` leaves
these pairs out, which is Gretton's U-statistic (Lemma 6, eq. 4): unbiased for pairs too, and 0 for a set against itself.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .clip_score import unit_rows
from .moments import check_features
from .score import SetScore

_MEDIAN_ROWS = 1000  # rows of which the median distance is taken; a kernel's width needs no third digit


class Kernel(Protocol):
    """A positive definite function of two float64 sets [N, D] and [M, D], giving [N, M]."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Polynomial:
    """``(x . y / D + coef0) ** degree``; the defaults are KID's."""

    degree: int = 3
    coef0: float = 1.0

    def __post_init__(self) -> None:
        if self.degree < 1:
            raise ValueError(f"Polynomial: degree must be at least 1, got {self.degree}. KID's is 3.")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T).div_(x.shape[1]).add_(self.coef0).pow_(self.degree)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gaussian:
    """``exp(-|x - y|^2 / (2 sigma^2))``, sigma in units of the features."""

    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"Gaussian: sigma must be above 0 and finite, got {self.sigma}. CMMD's is 10; or median_bandwidth.")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squared = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2).add_(x.square().sum(dim=1, keepdim=True)).clamp_min_(0)
        return squared.div_(-2 * self.sigma**2).exp_()


def mmd_squared(x: Tensor, y: Tensor, kernel: Kernel, *, unbiased: bool, paired: bool = False, block: int = 2048) -> float:
    """MMD^2 of features [N, D] and [M, D], any floating dtype.

    Biased (Gretton et al. 2012, eq. 5) is at least 0 and has the diagonals of the kernel matrices within; unbiased (eq. 3) has
    not, and may be negative. ``paired`` (only unbiased, N = M, row i of both from one prompt and seed) also leaves the cross
    matrix's diagonal out. ``block`` rows against as many at a time. Raises ``ValueError`` for sets outside the contract, fewer
    than two rows where unbiased, and ``paired`` where it has no meaning.
    """
    check_features("mmd_squared", x, y, least=2 if unbiased else 1)
    if block < 1:
        raise ValueError(f"mmd_squared: block must be at least 1 row, got {block}. The default is 2048.")
    if paired and not (unbiased and len(x) == len(y)):
        raise ValueError(
            f"mmd_squared: paired must be with unbiased=True and sets of one length, got unbiased={unbiased}, "
            f"{len(x)} and {len(y)} rows. Leave paired out."
        )
    n, m = len(x), len(y)
    xx, xx_diagonal = _kernel_sums(x, x, kernel, block)
    yy, yy_diagonal = _kernel_sums(y, y, kernel, block)
    xy, xy_diagonal = _kernel_sums(x, y, kernel, block)
    if not unbiased:
        return xx / n**2 + yy / m**2 - 2 * xy / (n * m)
    cross = (xy - xy_diagonal) / (n * (n - 1)) if paired else xy / (n * m)
    return (xx - xx_diagonal) / (n * (n - 1)) + (yy - yy_diagonal) / (m * (m - 1)) - 2 * cross


@dataclass(frozen=True, kw_only=True, slots=True)
class Kid:
    """KID as published (``mean`` and population ``std`` over subsets) and ``full``, of all features at once. Not times 1000."""

    mean: float
    std: float
    full: float


def kid(x: Tensor, y: Tensor, *, seed: int = 0, num_subsets: int = 100, subset_size: int = 1000) -> Kid:
    """Kernel Inception distance of features [N, D] and [M, D]: unbiased MMD^2 with ``Polynomial()``; may be negative.

    Subsets are drawn without replacement, of each set on its own, and are the same for the same seed on every machine. ``std``
    is the spread over overlapping subsets, not a standard error. For images of the same prompts and seeds read the module's
    docstring first. Raises ``ValueError`` for sets outside the contract and for a subset larger than a set: a smaller one is
    another score, so the caller has to choose and name it.
    """
    check_features("kid", x, y, least=2)
    least = min(len(x), len(y))
    if not 2 <= subset_size <= least:
        raise ValueError(
            f"kid: subset_size must be from 2 to the smaller set's {least}, got {subset_size}. "
            f"Score more images, or pass subset_size={least} and name it beside the value."
        )
    if num_subsets < 1:
        raise ValueError(f"kid: num_subsets must be at least 1, got {num_subsets}. The default is 100.")
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(num_subsets, dtype=torch.float64)
    for i in range(num_subsets):
        of_x, of_y = (rows[torch.randperm(len(rows), generator=generator)[:subset_size].to(rows.device)] for rows in (x, y))
        values[i] = mmd_squared(of_x, of_y, Polynomial(), unbiased=True)
    full = mmd_squared(x, y, Polynomial(), unbiased=True)
    return Kid(mean=float(values.mean()), std=float(values.std(correction=0)), full=full)


def cmmd(x: Tensor, y: Tensor) -> float:
    """CMMD of CLIP embeddings [N, D] and [M, D] of any length: 1000 times the biased MMD^2 of unit rows, ``Gaussian(sigma=10)``.

    For comparison with papers. Unit rows are at most 2 apart, where this kernel is all but linear: the value is about
    ``10 |mean(x) - mean(y)|^2``, and it sees *only the mean embedding*. An even collapse about the mean does show, because unit
    rows that spread less have a longer mean (0.3 times the spread, made unit again: 0.63 over a floor of 0.005; D = 768,
    N = 2000, mean of length 0.71). Any other loss of variety is invisible: a model that draws two pictures, whose embeddings
    average to the reference's mean, scores 0.012 there, and ``rbf_mmd`` 0.077 over a floor of 0.00001. Print that and recall or
    coverage (``manifold``) beside it. Raises ``ValueError`` for sets outside the contract and for zero rows.
    """
    check_features("cmmd", x, y)
    x, y = unit_rows("cmmd", "first", x), unit_rows("cmmd", "second", y)
    return 1000 * mmd_squared(x, y, Gaussian(sigma=10.0), unbiased=False)


def jedi(x: Tensor, y: Tensor) -> float:
    """JEDi's distance of features [N, D] and [M, D]: 100 times the biased MMD^2 with the kernel ``(x . y / D) ** 2``, at least 0.

    That kernel compares second moments and nothing else: sets whose ``x x^T`` average alike are at distance 0, whatever their
    means, so features that differ by sign alone cannot be told apart. Raises ``ValueError`` for sets outside the contract.
    """
    return 100 * mmd_squared(x, y, Polynomial(degree=2, coef0=0.0), unbiased=False)


def median_bandwidth(x: Tensor, *, seed: int = 0) -> float:
    """The median distance between different rows of ``x`` [N, D], of 1000 rows drawn by ``seed`` where there are more.

    Raises ``ValueError`` for fewer than two rows and where the median is 0 (more than half of the pairs are equal).
    """
    check_features("median_bandwidth", x, least=2)
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:_MEDIAN_ROWS].to(x.device)
    median = float(torch.nn.functional.pdist(x.detach()[drawn].double()).median())
    if median == 0:
        raise ValueError("median_bandwidth: the median distance must be above 0, got 0. Most rows are equal; pass a sigma instead.")
    return median


def rbf_mmd(reference: Tensor, generated: Tensor, *, sigma: float | None = None, seed: int = 0, unbiased: bool = True) -> float:
    """MMD^2 with a Gaussian whose sigma is the reference's ``median_bandwidth`` (or ``sigma``): sees spread as well as mean.

    Gretton et al. take the median over both sets; here it is the reference's alone, so that all candidates are measured with
    one kernel. Not symmetric therefore, unless ``sigma`` is given. Raises ``ValueError`` as ``mmd_squared`` and
    ``median_bandwidth`` do.
    """
    check_features("rbf_mmd", reference, generated, least=2)
    kernel = Gaussian(sigma=median_bandwidth(reference, seed=seed) if sigma is None else sigma)
    return mmd_squared(reference, generated, kernel, unbiased=unbiased)


def _kernel_sums(x: Tensor, y: Tensor, kernel: Kernel, block: int) -> tuple[float, float]:
    """The sum of the kernel matrix and of its diagonal; of a set with itself only blocks on and above the diagonal are made."""
    total = diagonal = 0.0
    for i in range(0, len(x), block):
        rows = x[i : i + block].detach().double()
        for j in range(i if x is y else 0, len(y), block):
            values = kernel(rows, y[j : j + block].detach().to(rows))
            total += float(values.sum()) * (2 if x is y and j > i else 1)
            if i == j:
                diagonal += float(values.diagonal().sum())
    return total, diagonal


SCORES = (
    SetScore(
        name="kid",
        label="KID, all pictures",
        higher_is_better=False,
        digits=6,
        function=lambda generated, reference, paired: mmd_squared(generated, reference, Polynomial(), unbiased=True, paired=paired),
    ),
    SetScore(
        name="jedi",
        label="JEDi",
        higher_is_better=False,
        function=lambda generated, reference, paired: jedi(generated, reference),
        published=(("vjepa[vith16-ssv2]", "*"),),
    ),
    SetScore(
        name="cmmd",
        label="CMMD",
        higher_is_better=False,
        function=lambda generated, reference, paired: cmmd(generated, reference),
        # Jayasumana et al. 2024 define it with this network and no other.
        published=(("*vit-l*14*336*", "*"), ("*vit-large-patch14-336*", "*")),
    ),
)
