"""Precision, recall, density, coverage: plain loops, extremes, dropped modes, repeated images, blocks, error texts."""

import math

import pytest
import torch
from dqtk.metrics import manifold
from dqtk.metrics.manifold import density_coverage, precision_recall


def _features(num, dim, seed=0):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _clusters(num_clusters, num_each, seed=0):
    """Tight far-apart clusters in 6 dimensions."""
    centres = 100 * torch.eye(6, dtype=torch.float64)[:num_clusters].repeat_interleave(num_each, dim=0)
    return centres + _features(len(centres), 6, seed)


def _loops(reference, generated, k):
    """(precision, recall, density, coverage) by the definitions, with ``math.dist``."""
    x, y = reference.tolist(), generated.tolist()

    def radii(points):
        return [sorted(math.dist(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    in_x = [[math.dist(p, c) <= r for c, r in zip(x, radii(x), strict=True)] for p in y]
    in_y = [[math.dist(p, c) <= r for c, r in zip(y, radii(y), strict=True)] for p in x]
    precision, recall = (sum(map(any, rows)) / len(rows) for rows in (in_x, in_y))
    density = sum(map(sum, in_x)) / (k * len(y))
    coverage = sum(any(row[i] for row in in_x) for i in range(len(x))) / len(x)
    return precision, recall, density, coverage


def _all(reference, generated, k):
    a, b = precision_recall(reference, generated, k=k), density_coverage(reference, generated, k=k)
    return a.precision, a.recall, b.density, b.coverage


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("block", [1, 7, 30, 1024])
def test_is_the_definition(k, block, monkeypatch):
    monkeypatch.setattr(manifold, "_BLOCK", block)
    x, y = _features(30, 3), 1.3 * _features(25, 3, seed=1) + 0.5
    assert _all(x, y, k) == pytest.approx(_loops(x, y, k), abs=1e-12)


def test_identical_sets():
    x = _features(50, 4)
    assert precision_recall(x, x) == manifold.PrecisionRecall(precision=1.0, recall=1.0)
    found = density_coverage(x, x)
    assert found.coverage == 1
    assert found.density == pytest.approx(1.2)  # k neighbours and itself, over k = 5


def test_disjoint_sets():
    x = _features(50, 4)
    assert _all(x, x + 100, 3) == (0, 0, 0, 0)


def test_samples_of_one_distribution():
    x, y = _features(800, 4).split(400)
    found = density_coverage(x, y, k=2)
    assert found.coverage == pytest.approx(1 - 2**-2, abs=0.05)
    assert found.density == pytest.approx(1, abs=0.1)


def test_a_dropped_mode_costs_recall_and_coverage_but_no_precision():
    reference, generated = _clusters(5, 60), _clusters(3, 100, seed=1)
    pr, dc = precision_recall(reference, generated), density_coverage(reference, generated)
    assert pr.recall < 0.6 < 0.8 < pr.precision
    assert dc.coverage < 0.6
    assert dc.density > 0.8
    swapped = precision_recall(generated, reference)
    assert (swapped.precision, swapped.recall) == (pr.recall, pr.precision)


def test_an_outlier_in_the_reference_inflates_precision_and_hardly_density():
    """One far reference has a ball that holds everything between: what density was made against."""
    reference = torch.cat([_features(99, 4), torch.full((1, 4), 50.0)])
    generated = 2 * _features(100, 4, seed=1) + 25
    assert precision_recall(reference, generated).precision > 0.9
    assert density_coverage(reference, generated).density < 0.25


def test_a_collapse_to_one_image():
    reference = _features(50, 4)
    generated = reference[:1].expand(50, 4)
    pr, dc = precision_recall(reference, generated), density_coverage(reference, generated)
    assert (pr.precision, pr.recall) == (1.0, 1 / 50)
    assert dc.coverage < 0.4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_repeated_images_lie_in_their_own_balls(scale):
    """Radius 0: rounding must not decide. The features are far from the origin, as pooled activations are."""
    x = scale * (_features(20, 500) + 3).repeat_interleave(8, dim=0)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    assert precision_recall(x, shuffled) == manifold.PrecisionRecall(precision=1.0, recall=1.0)
    assert density_coverage(x, shuffled).coverage == 1.0
    near = x + 1e-5 * scale * _features(160, 500, seed=1)
    assert precision_recall(x, near).precision == 0.0  # near is not equal


@pytest.mark.parametrize("dim", [7, 50, 500])
def test_each_picture_twice_is_found_by_any_copy(dim):
    """Every reference ball has radius 0 and holds one picture: k = 1, so density counts both copies. Rounding alone gave 1.4."""
    pictures = _features(21, dim) + 3
    twice = pictures.repeat_interleave(2, dim=0)
    assert density_coverage(twice, pictures, k=1) == manifold.DensityCoverage(density=2.0, coverage=1.0)
    assert density_coverage(twice, pictures[:5], k=1) == manifold.DensityCoverage(density=2.0, coverage=10 / 42)
    few = precision_recall(twice, pictures[:5].repeat(2, 1), k=1)
    assert few == manifold.PrecisionRecall(precision=1.0, recall=10 / 42)


def test_common_shifts_scales_and_narrow_dtypes():
    x, y = _features(40, 6).bfloat16(), _features(40, 6, seed=1).bfloat16()
    found = _all(x.double(), y.double(), 3)
    assert _all(x, y, 3) == found
    assert _all(8 * x, 8 * y, 3) == found
    assert _all(x.double() + 1000, y.double() + 1000, 3) == found
    assert _all(x.T.contiguous().T, y, 3) == found


def test_errors():
    x = _features(10, 4)
    words = r"k must be at least 1 and below the number of features \(3\), got 3\. Score more images, or lower k\."
    with pytest.raises(ValueError, match=rf"^precision_recall: {words}"):
        precision_recall(x, x[:3])
    with pytest.raises(ValueError, match=rf"^density_coverage: {words}"):
        density_coverage(x[:3], x, k=3)
    with pytest.raises(ValueError, match=r"^precision_recall: k must be at least 1 .*, got 0\."):
        precision_recall(x, x, k=0)
    with pytest.raises(ValueError, match=r"^density_coverage: both sets must be of one D, got 4 and 5\."):
        density_coverage(x, _features(10, 5))
    assert density_coverage(x, x[:1]).coverage > 0  # the generated set needs no balls
