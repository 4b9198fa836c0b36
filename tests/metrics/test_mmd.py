"""MMD: a double loop, torchmetrics, bias, blocks, seeds, pairs; KID, CMMD and its blind spot, bandwidth, error texts."""

import math

import pytest
import torch
from dqtk.metrics.mmd import Gaussian, Polynomial, cmmd, kid, median_bandwidth, mmd_squared, rbf_mmd
from torchmetrics.image.kid import poly_mmd

KERNELS = [Polynomial(), Polynomial(degree=2, coef0=0.5), Gaussian(sigma=1.5)]


def _features(num, dim, seed=0, dtype=torch.float64):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _value(kernel, x, y):
    """The kernel of two vectors, in Python numbers."""
    x, y = x.tolist(), y.tolist()
    if isinstance(kernel, Polynomial):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + kernel.coef0) ** kernel.degree
    return math.exp(-sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / (2 * kernel.sigma**2))


def _double_loop(x, y, kernel, *, unbiased, paired=False):
    def mean(a, b, with_equal_indices):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if with_equal_indices or i != j]
        return sum(_value(kernel, a[i], b[j]) for i, j in pairs) / len(pairs)

    return mean(x, x, not unbiased) + mean(y, y, not unbiased) - 2 * mean(x, y, not paired)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_is_the_double_loop(kernel, unbiased):
    x, y = _features(11, 5), _features(8, 5, seed=1) + 0.3
    found = mmd_squared(x, y, kernel, unbiased=unbiased)
    assert found == pytest.approx(_double_loop(x, y, kernel, unbiased=unbiased), abs=1e-12)
    assert mmd_squared(y, x, kernel, unbiased=unbiased) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_paired_is_the_double_loop_without_the_pairs(kernel):
    x = _features(9, 5)
    y = x + 0.1 * _features(9, 5, seed=1)
    found = mmd_squared(x, y, kernel, unbiased=True, paired=True, block=4)
    assert found == pytest.approx(_double_loop(x, y, kernel, unbiased=True, paired=True), abs=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", [1, 3, 10, 29, 30, 31])
def test_blocks_do_not_change_the_value(kernel, block):
    x, y = _features(30, 5), _features(29, 5, seed=1)
    for unbiased in (True, False):
        whole = mmd_squared(x, y, kernel, unbiased=unbiased)
        assert mmd_squared(x, y, kernel, unbiased=unbiased, block=block) == pytest.approx(whole, abs=1e-12)
    whole = mmd_squared(x[:29], y, kernel, unbiased=True, paired=True)
    assert mmd_squared(x[:29], y, kernel, unbiased=True, paired=True, block=block) == pytest.approx(whole, abs=1e-12)


def test_polynomial_agrees_with_torchmetrics():
    x, y = _features(50, 16), _features(50, 16, seed=1) + 0.2
    assert mmd_squared(x, y, Polynomial(), unbiased=True) == pytest.approx(float(poly_mmd(x, y)), rel=1e-10)


def test_unbiased_is_zero_on_average_and_biased_is_not():
    """100 pairs of samples of one distribution."""
    samples = _features(100 * 40, 8).reshape(100, 2, 20, 8)
    unbiased, biased = (
        torch.tensor([mmd_squared(x, y, Polynomial(), unbiased=choice) for x, y in samples]) for choice in (True, False)
    )
    assert abs(float(unbiased.mean())) < 3 * float(unbiased.std()) / 10
    assert float(unbiased.min()) < 0
    assert float(biased.mean()) > 10 * float(biased.std()) / 10
    assert float(biased.min()) > 0


def test_pairs_of_equal_prompts_and_seeds():
    """Taken for independent, a set is below zero from itself; with the pairs left out it is at zero, and noise above."""
    x = _features(40, 8)
    assert mmd_squared(x, x.clone(), Polynomial(), unbiased=True) < -0.01
    assert mmd_squared(x, x.clone(), Polynomial(), unbiased=True, paired=True) == pytest.approx(0, abs=1e-12)
    assert mmd_squared(x, x.clone(), Polynomial(), unbiased=False) == pytest.approx(0, abs=1e-12)
    values = [mmd_squared(x, x * (1 + amount), Polynomial(), unbiased=True, paired=True) for amount in (0.1, 0.2, 0.4)]
    assert 0 < values[0] < values[1] < values[2]


def test_paired_is_unbiased_where_only_the_pairs_are_alike():
    """y is drawn from x's distribution, but each row near its partner: 200 samples of 15 pairs average to zero."""
    x, z = _features(200 * 30, 4).reshape(2, 200, 15, 4)
    y = 0.9 * x + (1 - 0.9**2) ** 0.5 * z
    paired, naive = (
        torch.tensor([mmd_squared(a, b, Polynomial(), unbiased=True, paired=choice) for a, b in zip(x, y, strict=True)])
        for choice in (True, False)
    )
    assert abs(float(paired.mean())) < 3 * float(paired.std()) / 200**0.5
    assert float(naive.mean()) < -10 * float(naive.std()) / 200**0.5


def test_kid_is_seeded_and_full_is_not_random():
    x, y = _features(60, 8), _features(50, 8, seed=1) + 0.5
    first = kid(x, y, num_subsets=20, subset_size=25)
    torch.manual_seed(123)  # the global generator has no say
    assert kid(x, y, num_subsets=20, subset_size=25) == first
    other = kid(x, y, num_subsets=20, subset_size=25, seed=1)
    assert other.mean != first.mean
    assert other.full == first.full == mmd_squared(x, y, Polynomial(), unbiased=True)
    assert first.mean == pytest.approx(first.full, abs=3 * first.std)
    assert first.std > 0


def test_kid_of_whole_sets_has_no_spread():
    x, y = _features(30, 8), _features(30, 8, seed=1)
    found = kid(x, y, num_subsets=3, subset_size=30)
    assert found.mean == pytest.approx(found.full, abs=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_kid_is_zero_on_average_for_one_distribution():
    samples = _features(60 * 60, 8).reshape(60, 2, 30, 8)
    values = torch.tensor([kid(x, y, num_subsets=5, subset_size=20).mean for x, y in samples])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 60**0.5


@pytest.fixture
def embeddings():
    """Two samples of unit rows about one direction, float64 [1000, 64] each; mean of length 0.7."""
    rows = _features(2000, 64) / 8
    rows[:, 0] += 1
    return torch.nn.functional.normalize(rows, dim=1).split(1000)


def test_cmmd_is_all_but_the_shift_of_the_mean(embeddings):
    x, same = embeddings
    for amount in (0.1, 0.5):
        shifted = torch.nn.functional.normalize(same + amount * torch.eye(64, dtype=torch.float64)[1], dim=1)
        assert cmmd(x, shifted) == pytest.approx(10 * float((x.mean(dim=0) - shifted.mean(dim=0)).square().sum()), rel=0.05)


def test_cmmd_does_not_see_two_pictures_with_the_references_mean(embeddings):
    """As documented: all variety gone, and the score is where two samples of one distribution are. rbf_mmd tells."""
    x, same = embeddings
    mean = x.mean(dim=0)
    across = torch.eye(64, dtype=torch.float64)[1]
    across = torch.nn.functional.normalize(across - mean * (across @ mean) / mean.square().sum(), dim=0)
    offset = (1 - mean.square().sum()).sqrt() * across
    two_pictures = torch.stack([mean + offset, mean - offset]).repeat(500, 1)
    assert torch.allclose(two_pictures.norm(dim=1), torch.ones(1000, dtype=torch.float64))
    assert cmmd(x, two_pictures) < 4 * cmmd(x, same) < 0.05
    assert rbf_mmd(x, two_pictures) > 100 * abs(rbf_mmd(x, same))


def test_cmmd_sees_an_even_collapse_through_the_length_of_the_mean(embeddings):
    x, same = embeddings
    mean = x.mean(dim=0)
    collapsed = mean + 0.3 * (x - mean)
    assert cmmd(x, collapsed) > 50 * cmmd(x, same)
    # Not so before the rows are made unit again: the kernel alone, with the mean kept, does not see the spread.
    assert 1000 * mmd_squared(x, collapsed, Gaussian(sigma=10.0), unbiased=False) < cmmd(x, same)


def test_cmmd_is_of_directions():
    x, y = _features(30, 8) + 1, _features(20, 8, seed=1) + 2
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    assert cmmd(x * lengths, 7 * y) == pytest.approx(cmmd(x, y), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-10)
    unit = [torch.nn.functional.normalize(z, dim=1) for z in (x, y)]
    assert cmmd(x, y) == pytest.approx(1000 * _double_loop(*unit, Gaussian(sigma=10.0), unbiased=False), rel=1e-9)


def test_median_bandwidth():
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    x = _features(3000, 50)
    assert median_bandwidth(x) == pytest.approx(10, rel=0.02)  # sqrt(2 D)
    assert median_bandwidth(x) == median_bandwidth(x)
    assert median_bandwidth(x) != median_bandwidth(x, seed=1)
    assert median_bandwidth(2 * x) == pytest.approx(2 * median_bandwidth(x))


def test_rbf_mmd_takes_the_references_width_for_every_candidate():
    x, y = _features(60, 6), 3 * _features(60, 6, seed=1)
    sigma = median_bandwidth(x)
    assert rbf_mmd(x, y) == mmd_squared(x, y, Gaussian(sigma=sigma), unbiased=True)
    assert rbf_mmd(x, y, sigma=2.0) == mmd_squared(x, y, Gaussian(sigma=2.0), unbiased=True)
    assert rbf_mmd(x, y, unbiased=False) == mmd_squared(x, y, Gaussian(sigma=sigma), unbiased=False) > rbf_mmd(x, y)
    assert rbf_mmd(5 * x, 5 * y) == pytest.approx(rbf_mmd(x, y), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_and_strided_features_are_taken_as_the_numbers_they_hold(dtype):
    x, y = _features(20, 8, dtype=dtype), _features(20, 8, seed=1, dtype=dtype)
    for kernel in KERNELS:
        wide = mmd_squared(x.double(), y.double(), kernel, unbiased=True)
        assert mmd_squared(x, y, kernel, unbiased=True) == pytest.approx(wide, abs=1e-12)
        assert mmd_squared(x.T.contiguous().T, y, kernel, unbiased=True) == pytest.approx(wide, abs=1e-12)


def test_one_row_each():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert mmd_squared(x, y, Gaussian(sigma=1.0), unbiased=False) == pytest.approx(2 - 2 * math.exp(-1))
    with pytest.raises(ValueError, match=r"^mmd_squared: the first set must be at least 2 rows, got 1\. Score more images\."):
        mmd_squared(x, y, Gaussian(sigma=1.0), unbiased=True)


def test_errors():
    x = _features(10, 4)
    with pytest.raises(
        ValueError, match=r"^kid: subset_size must be from 2 to the smaller set's 10, got 1000\. .*subset_size=10 and"
    ):
        kid(x, _features(2000, 4))
    with pytest.raises(ValueError, match=r"^kid: subset_size must be from 2 to the smaller set's 10, got 1\."):
        kid(x, x, subset_size=1)
    with pytest.raises(ValueError, match=r"^kid: num_subsets must be at least 1, got 0\. The default is 100\."):
        kid(x, x, subset_size=5, num_subsets=0)
    with pytest.raises(
        ValueError, match=r"^mmd_squared: paired must be with unbiased=True and sets of one length, got .*False, 10 and"
    ):
        mmd_squared(x, x, Polynomial(), unbiased=False, paired=True)
    with pytest.raises(ValueError, match=r"got unbiased=True, 10 and 9 rows\. Leave paired out\."):
        mmd_squared(x, x[1:], Polynomial(), unbiased=True, paired=True)
    with pytest.raises(ValueError, match=r"^mmd_squared: block must be at least 1 row, got 0\."):
        mmd_squared(x, x, Polynomial(), unbiased=True, block=0)
    with pytest.raises(ValueError, match=r"^mmd_squared: both sets must be of one D, got 4 and 5\."):
        mmd_squared(x, _features(10, 5), Polynomial(), unbiased=True)
    with pytest.raises(
        ValueError, match=r"^cmmd: the second set must be rows other than zero, got 1 zero rows\. Look at those images"
    ):
        cmmd(x, torch.cat([x, torch.zeros(1, 4)]))
    with pytest.raises(ValueError, match=r"^median_bandwidth: the median distance must be above 0, got 0\. Most rows are equal"):
        median_bandwidth(torch.ones(5, 3))
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^Gaussian: sigma must be above 0 and finite, got .*\. CMMD's is 10"):
            Gaussian(sigma=sigma)
    with pytest.raises(ValueError, match=r"^Polynomial: degree must be at least 1, got 0\. KID's is 3\."):
        Polynomial(degree=0)
