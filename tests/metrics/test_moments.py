"""Moments: against numpy in one pass, merged shards of every kind, far-off means, blocks, error texts."""

import numpy as np
import pytest
import torch
from dqtk.metrics.moments import Moments, check_features


def _features(num, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=generator, dtype=torch.float64) @ torch.randn(dim, dim, generator=generator).double() + 3


def _assert_same(a, b, tolerance=1e-9):
    assert a.num == b.num
    assert torch.allclose(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    assert torch.allclose(a.scatter, b.scatter, rtol=tolerance, atol=tolerance)


def test_is_numpys_mean_and_covariance():
    x = _features(57, 9)
    found = Moments.of(x)
    assert (found.num, found.mean.dtype, found.scatter.dtype) == (57, torch.float64, torch.float64)
    assert np.allclose(found.mean, x.numpy().mean(axis=0), atol=1e-12)
    assert np.allclose(found.covariance(), np.cov(x.numpy(), rowvar=False), atol=1e-12)


@pytest.mark.parametrize(
    "sizes", [(20, 20, 17), (1, 56), (56, 1), (0, 57), (57, 0), (0, 0, 57, 0), (1, 1, 1, 54), (1,) * 57, (13, 0, 1, 40, 3)]
)
def test_merged_shards_are_the_single_pass(sizes):
    x = _features(57, 9)
    shards = [Moments.of(part) for part in x.split(sizes)]
    merged = Moments.empty(9)
    for shard in shards:
        merged = merged + shard
    _assert_same(merged, Moments.of(x))
    halves = [Moments.empty(9), Moments.empty(9)]
    for i, shard in enumerate(shards):
        halves[i % 2] = shard + halves[i % 2]
    _assert_same(halves[1] + halves[0], Moments.of(x))


@pytest.mark.parametrize("block", [1, 2, 10, 56, 57, 58, 1000])
def test_blocks_do_not_change_the_moments(block):
    x = _features(57, 9)
    _assert_same(Moments.of(x, block=block), Moments.of(x, block=57))


def test_a_mean_far_from_zero_costs_no_digits():
    """Raw sums of outer products would lose 2 * 7 digits here, that is all of them but two."""
    x = _features(500, 4)
    shifted = Moments.of(x[:200] + 1e7) + Moments.of(x[200:] + 1e7)
    assert torch.allclose(shifted.scatter, Moments.of(x).scatter, rtol=1e-6)


def test_empty_and_single_row_shards():
    nothing = Moments.of(torch.zeros(0, 5))
    assert (nothing.num, nothing.mean.tolist(), float(nothing.scatter.abs().sum())) == (0, [0.0] * 5, 0.0)
    both = nothing + Moments.empty(5)
    assert (both.num, float(both.scatter.abs().sum())) == (0, 0.0)
    one = Moments.of(torch.tensor([[1.0, -2.0]]))
    assert (one.num, one.mean.tolist(), one.scatter.tolist()) == (1, [1.0, -2.0], [[0.0, 0.0], [0.0, 0.0]])
    two = one + Moments.of(torch.tensor([[3.0, -2.0]]))
    assert two.covariance().tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_merging_leaves_its_arguments_alone():
    a, b = Moments.of(_features(5, 3)), Moments.of(_features(6, 3, seed=1))
    before = [x.clone() for x in (a.mean, a.scatter, b.mean, b.scatter)]
    _ = a + b
    assert all(torch.equal(x, y) for x, y in zip(before, (a.mean, a.scatter, b.mean, b.scatter), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_and_strided_features_are_taken_as_the_numbers_they_hold(dtype):
    x = _features(40, 6).to(dtype)
    _assert_same(Moments.of(x), Moments.of(x.double()))
    _assert_same(Moments.of(x.T.contiguous().T), Moments.of(x))
    _assert_same(Moments.of(x[::2, ::3]), Moments.of(x[::2, ::3].clone()))


def test_errors():
    with pytest.raises(
        ValueError, match=r"^Moments\.of: the first set must be features \[N, D\], got \[2, 3, 4\]\. Flatten or pool"
    ):
        Moments.of(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"the first set must be features \[N, D\], got \[2, 0\]\."):
        Moments.of(torch.zeros(2, 0))
    with pytest.raises(ValueError, match=r"the first set must be floating point, got torch\.uint8\. Pass features, not images\."):
        Moments.of(torch.zeros(2, 3, dtype=torch.uint8))
    broken = torch.zeros(4, 3)
    broken[1, 0], broken[1, 2], broken[3, 1] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(ValueError, match=r"the first set must be finite, got 2 rows that are not\. Look at those images"):
        Moments.of(broken)
    with pytest.raises(ValueError, match=r"^Moments\.of: block must be at least 1 row, got 0\. The default is 1024\."):
        Moments.of(torch.zeros(2, 3), block=0)
    with pytest.raises(ValueError, match=r"^Moments: both must be of one D, got 2 and 3\. Merge shards of one extractor\."):
        Moments.empty(2) + Moments.empty(3)
    with pytest.raises(ValueError, match=r"^Moments\.covariance: num must be at least 2, got 1\. Score more images\."):
        Moments.of(torch.ones(1, 3)).covariance()
    with pytest.raises(ValueError, match=r"^Moments: mean and scatter must be \[D\] and \[D, D\], got \[2\] and \[3, 3\]\."):
        Moments(num=3, mean=torch.zeros(2), scatter=torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"^Moments: mean and scatter must be float64, got torch\.float64 and torch\.float32\."):
        Moments(num=3, mean=torch.zeros(2).double(), scatter=torch.zeros(2, 2))


def test_the_contract_of_two_sets():
    check_features("here", torch.zeros(2, 3), torch.zeros(5, 3), least=2)
    with pytest.raises(ValueError, match=r"^here: both sets must be of one D, got 3 and 4\. Use one feature extractor\."):
        check_features("here", torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"^here: the second set must be at least 2 rows, got 1\. Score more images\."):
        check_features("here", torch.zeros(2, 3), torch.zeros(1, 3), least=2)
