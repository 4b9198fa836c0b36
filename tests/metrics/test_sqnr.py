"""SQNR and cosine: closed forms, merging, sample layout, extremes."""

import math

import pytest
import torch
from dqtk.metrics.sqnr import PairSums, cosine, sqnr_db


def test_known_ratio():
    y = torch.tensor([3.0, 4.0])
    assert sqnr_db(y * 1.1, y) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(torch.tensor([0.0, 5.0]), torch.tensor([5.0, 0.0])) == pytest.approx(10 * math.log10(25 / 50))
    assert cosine(torch.tensor([0.0, 5.0]), torch.tensor([5.0, 0.0])) == 0
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25, abs=1e-12)
    assert cosine(-y, y) == pytest.approx(-1)


def test_additive_noise_of_known_power():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(200_000, generator=generator)
    noisy = y + 10 ** (-30 / 20) * torch.randn(200_000, generator=generator)
    assert sqnr_db(noisy, y) == pytest.approx(30, abs=0.05)


def test_extremes():
    y = torch.randn(4, 4)
    assert sqnr_db(y, y) == math.inf
    assert cosine(y, y) == 1.0
    zero = torch.zeros(4, 4)
    assert sqnr_db(zero, zero) == math.inf
    assert cosine(zero, zero) == 1.0
    assert sqnr_db(y, zero) == -math.inf
    assert cosine(y, zero) == 0.0
    assert sqnr_db(zero, y) == pytest.approx(0)


def test_tiny_errors_are_not_lost_in_rounding():
    y = torch.full((1000,), 100.0)
    assert sqnr_db(y.double() * (1 + 1e-7), y) == pytest.approx(140, abs=1e-6)


def test_merged_shards_are_the_single_pass():
    torch.manual_seed(0)
    y = torch.randn(8, 5)
    y_hat = y + 0.1 * torch.randn(8, 5)
    whole = PairSums.of(y_hat, y, num_samples=1)
    parts = PairSums.zeros(1)
    for rows in (slice(0, 3), slice(3, 8)):
        parts = parts + PairSums.of(y_hat[rows], y[rows], num_samples=1)
    assert float(parts.sqnr_db()) == pytest.approx(float(whole.sqnr_db()), abs=1e-9)
    assert float(parts.cosine()) == pytest.approx(float(whole.cosine()), abs=1e-12)
    assert sqnr_db(y_hat, y) == pytest.approx(float(whole.sqnr_db()))


def test_samples_follow_the_layout_of_batched_guidance():
    """[uncond 0, uncond 1, cond 0, cond 1]: rows 0 and 2 belong to the first image."""
    torch.manual_seed(0)
    y = torch.randn(4, 6)
    error = torch.zeros(4, 6)
    error[0], error[2] = 0.1, 0.2
    sums = PairSums.of(y + error, y, num_samples=2)
    assert sums.sqnr_db()[1] == math.inf
    assert float(sums.sqnr_db()[0]) == pytest.approx(sqnr_db((y + error)[[0, 2]], y[[0, 2]]), abs=1e-9)
    pooled = sums.pooled()
    assert float(pooled.sqnr_db()) == pytest.approx(sqnr_db(y + error, y), abs=1e-9)
    both = sums.concatenated(PairSums.of(y[:1], y[:1], num_samples=1))
    assert len(both.product) == 3


def test_bf16_and_scalars():
    y = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert sqnr_db(y, y.float()) == math.inf
    assert sqnr_db(torch.tensor(2.0), torch.tensor(1.0)) == pytest.approx(0)


def test_errors():
    with pytest.raises(ValueError, match=r"PairSums\.of: both tensors must be of one shape, got \[2\] and \[3\]\. Compare outputs"):
        sqnr_db(torch.zeros(2), torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"num_samples must be at least 1 and divide the 4 rows, got 3\. Pass the number of images"
    ):
        PairSums.of(torch.zeros(4, 2), torch.zeros(4, 2), num_samples=3)
