"""Fréchet distance: closed forms, both routes, scipy and torchmetrics, invariances, singular covariances, error texts."""

import pytest
import torch
from dqtk.metrics.frechet import frechet_distance, frechet_distance_of, rank_warning
from dqtk.metrics.moments import Moments
from scipy.linalg import sqrtm
from torchmetrics.image.fid import _compute_fid


def _gaussian(mean, covariance, num=1000):
    """The moments of a set with exactly this mean and unbiased covariance."""
    return Moments(num=num, mean=mean, scatter=covariance * (num - 1))


def _features(num, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ mixing / dim**0.5 + seed


def _rotation(dim):
    generator = torch.Generator().manual_seed(7)
    return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q


def _closed_form(mean_a, mean_b, a, b):
    return float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())


def test_diagonal_gaussians_have_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(64, generator=generator, dtype=torch.float64) * 5 for _ in range(2))
    a[:3] = 0  # directions without any variance
    mean_a, mean_b = (torch.randn(64, generator=generator, dtype=torch.float64) for _ in range(2))
    found = frechet_distance(_gaussian(mean_a, a.diag()), _gaussian(mean_b, b.diag()))
    assert found == pytest.approx(_closed_form(mean_a, mean_b, a, b), abs=1e-6)
    assert frechet_distance(_gaussian(mean_b, b.diag(), 50), _gaussian(mean_a, a.diag())) == pytest.approx(found, abs=1e-6)


def test_commuting_covariances_have_the_closed_form_of_their_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    a, b = (10 ** (4 * torch.rand(48, generator=generator, dtype=torch.float64) - 3) for _ in range(2))
    mean, q = torch.zeros(48, dtype=torch.float64), _rotation(48)
    found = frechet_distance(_gaussian(mean, q @ a.diag() @ q.T), _gaussian(mean + 0.1, q @ b.diag() @ q.T))
    assert found == pytest.approx(_closed_form(mean, mean + 0.1, a, b), abs=1e-6)


def test_one_dimension():
    one = torch.ones(1, dtype=torch.float64)
    assert frechet_distance(_gaussian(one, 4 * one[None]), _gaussian(-one, 9 * one[None])) == pytest.approx(5, abs=1e-12)


@pytest.mark.parametrize("num", [2, 10, 40, 41, 300])
def test_a_set_against_itself_is_zero(num):
    x = _features(num, 40, seed=2)
    assert 0 <= frechet_distance(Moments.of(x), Moments.of(x)) < 1e-6
    assert 0 <= frechet_distance_of(x, x) < 1e-6
    assert 0 <= frechet_distance_of(x, x[torch.randperm(num, generator=torch.Generator().manual_seed(0))]) < 1e-6


@pytest.mark.parametrize(("num_x", "num_y"), [(2, 2), (20, 20), (20, 39), (39, 20), (3, 30)])
def test_both_routes_agree_where_covariances_are_singular(num_x, num_y):
    x, y = _features(num_x, 40), _features(num_y, 40, seed=1)
    assert frechet_distance_of(x, y) == pytest.approx(frechet_distance(Moments.of(x), Moments.of(y)), abs=1e-8)


@pytest.mark.parametrize(("num_x", "num_y"), [(20, 200), (200, 20), (40, 40), (300, 200)])
def test_from_forty_features_on_the_moments_are_used(num_x, num_y):
    x, y = _features(num_x, 40), _features(num_y, 40, seed=1)
    assert frechet_distance_of(x, y) == frechet_distance(Moments.of(x), Moments.of(y))


def test_agrees_with_torchmetrics_and_with_scipys_square_root():
    x, y = _features(300, 24), 0.7 * _features(200, 24, seed=1)
    a, b = Moments.of(x), Moments.of(y)
    found = frechet_distance(a, b)
    assert found == pytest.approx(float(_compute_fid(a.mean, a.covariance(), b.mean, b.covariance())), rel=1e-9)
    root = sqrtm((a.covariance() @ b.covariance()).numpy()).real.trace()
    expected = (a.mean - b.mean).square().sum() + a.covariance().trace() + b.covariance().trace() - 2 * root
    assert found == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("num", [100, 127, 2000])
def test_small_distances_survive_variances_over_eight_decades(num):
    """Pairs 1 % apart: the root of an eigenvalue's rounding is larger than some of these terms."""
    generator = torch.Generator().manual_seed(0)
    deviations = 10 ** (-4 * torch.rand(128, generator=generator, dtype=torch.float64))
    x, noise = torch.randn(2, num, 128, generator=generator, dtype=torch.float64) * deviations
    y = x + 0.01 * noise
    factors = [torch.linalg.qr((z - z.mean(dim=0)) / (num - 1) ** 0.5, mode="r").R for z in (x, y)]
    expected = (x.mean(dim=0) - y.mean(dim=0)).square().sum() + sum(r.square().sum() for r in factors)
    expected = float(expected - 2 * torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    assert 0 < expected < 1e-3
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, abs=1e-11)
    assert frechet_distance_of(x, y) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("block", [64, 1000, 3000])
def test_large_sets_reduce_block_by_block_to_the_value_of_one_shot(block):
    x, y = _features(3000, 96), _features(3000, 96, seed=1)
    one_shot = frechet_distance(Moments.of(x, block=3000), Moments.of(y, block=3000))
    assert frechet_distance(Moments.of(x, block=block), Moments.of(y, block=block)) == pytest.approx(one_shot, rel=1e-12)


def test_equal_images_have_no_spread():
    x, y = torch.ones(5, 3), torch.zeros(9, 3)
    assert frechet_distance_of(x, y) == frechet_distance_of(y, x) == 3.0
    assert frechet_distance_of(x.repeat(1, 4), y.repeat(1, 4)) == 12.0
    assert frechet_distance_of(x, x) == 0.0


def test_symmetric_and_unmoved_by_a_common_shift_or_rotation():
    x, y = _features(100, 24), _features(60, 24, seed=1)
    found = frechet_distance_of(x, y)
    assert frechet_distance_of(y, x) == pytest.approx(found, rel=1e-10)
    assert frechet_distance_of(x + 5, y + 5) == pytest.approx(found, rel=1e-9)
    assert frechet_distance_of(x @ _rotation(24), y @ _rotation(24)) == pytest.approx(found, rel=1e-9)
    assert frechet_distance_of(3 * x, 3 * y) == pytest.approx(9 * found, rel=1e-10)


def test_it_sees_shift_and_spread_in_order():
    x = _features(400, 16)
    centre = x.mean(dim=0)
    shifted = [frechet_distance_of(x, x + amount) for amount in (0.01, 0.1, 1.0)]
    assert shifted == pytest.approx([16 * amount**2 for amount in (0.01, 0.1, 1.0)], rel=1e-6)
    shrunk = [frechet_distance_of(x, centre + factor * (x - centre)) for factor in (0.9, 0.5, 0.0)]
    trace = float(Moments.of(x).covariance().trace())
    assert shrunk == pytest.approx([trace * (1 - factor) ** 2 for factor in (0.9, 0.5, 0.0)], rel=1e-6)


def test_pairing_takes_the_bias_out():
    """10 % noise on the same features is seen; the same noise on independent features drowns in what independence costs."""
    x, other = torch.randn(2, 128, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.1 * torch.randn(128, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    floor, unpaired, paired = (frechet_distance_of(x, y) for y in (other, other + noise, x + noise))
    assert paired < 0.03 * floor
    assert unpaired == pytest.approx(floor, rel=0.05)


def test_shards_give_the_value_of_the_whole():
    x, y = _features(100, 24), _features(60, 24, seed=1)
    merged = Moments.of(x[:1]) + Moments.of(x[1:70]) + Moments.of(x[70:70]) + Moments.of(x[70:])
    assert frechet_distance(merged, Moments.of(y)) == pytest.approx(frechet_distance_of(x, y), abs=1e-9)


@pytest.mark.parametrize("num", [30, 300])
def test_bf16_features_are_taken_as_the_numbers_they_hold(num):
    x, y = _features(num, 40).bfloat16(), _features(num, 40, seed=1).bfloat16()
    assert frechet_distance_of(x, y) == pytest.approx(frechet_distance_of(x.double(), y.double()), rel=1e-12)


def test_rank_warning():
    assert rank_warning(2049, 2048) is None
    assert rank_warning(3000, 2048, 3000) is None
    assert rank_warning(3000, 2048, 50).startswith("3000 generated and 50 reference features of 2048 numbers: ")
    for num in (2048, 2):
        text = rank_warning(num, 2048)
        assert text is not None
        assert text.startswith(f"{num} features of 2048 numbers: their covariance is singular and the Fréchet distance biased")
        assert text.endswith("or score more than 2048.")


def test_errors():
    good = Moments.of(_features(10, 3))
    with pytest.raises(
        ValueError, match=r"^frechet_distance: the second moments must be of at least 2 features, got 1\. Score more"
    ):
        frechet_distance(good, Moments.of(torch.ones(1, 3)))
    with pytest.raises(
        ValueError, match=r"^frechet_distance: both moments must be of one D, got 3 and 4\. Use one feature extractor"
    ):
        frechet_distance(good, Moments.of(_features(10, 4)))
    broken = Moments(num=10, mean=good.mean * float("nan"), scatter=good.scatter)
    with pytest.raises(ValueError, match=r"^frechet_distance: the first moments must be finite, got NaN or infinity\."):
        frechet_distance(broken, good)
    x = _features(10, 3)
    with pytest.raises(
        ValueError, match=r"^frechet_distance_of: the second set must be at least 2 rows, got 1\. Score more images"
    ):
        frechet_distance_of(x, x[:1])
    with pytest.raises(ValueError, match=r"^frechet_distance_of: both sets must be of one D, got 3 and 4\."):
        frechet_distance_of(x, _features(10, 4))
    with pytest.raises(ValueError, match=r"^frechet_distance_of: the first set must be finite, got 10 rows that are not\."):
        frechet_distance_of(x * float("nan"), x)
