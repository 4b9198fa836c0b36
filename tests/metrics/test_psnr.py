"""PSNR against closed forms, the pooled shortcut, and torchmetrics."""

import math

import pytest
import torch
from dqtk.metrics.psnr import pool_db, pooled_psnr, psnr
from torchmetrics.functional.image import peak_signal_noise_ratio


def test_known_error_gives_the_closed_form_per_image():
    reference = torch.full((3, 3, 5, 7), 0.5)
    candidate = reference + torch.tensor([0.1, 0.01, 0.25]).reshape(3, 1, 1, 1)
    expected = [20.0, 40.0, -20 * math.log10(0.25)]
    assert psnr(candidate, reference).tolist() == pytest.approx(expected, abs=1e-4)  # 0.5 + 0.01 is rounded in fp32


def test_equal_images_are_infinite_and_only_those():
    images = torch.rand(3, 3, 8, 8)
    other = images.clone()
    other[1, 0, 0, 0] = (other[1, 0, 0, 0] + 0.5) % 1
    values = psnr(other, images)
    assert values.dtype == torch.float64
    assert torch.isinf(values).tolist() == [True, False, True]


def test_symmetric_batch_independent_and_any_memory_layout():
    torch.manual_seed(0)
    a, b = torch.rand(4, 3, 9, 6), torch.rand(4, 3, 9, 6)
    assert torch.equal(psnr(a, b), psnr(b, a))
    assert torch.equal(psnr(a, b)[1:2], psnr(a[1:2], b[1:2]))
    assert torch.allclose(psnr(a.to(memory_format=torch.channels_last), b), psnr(a, b))


def test_pooling_is_ruled_by_the_worst_image():
    torch.manual_seed(0)
    reference = torch.full((10, 3, 8, 8), 0.5)
    candidate = reference + 1e-3
    candidate[0] += 0.4
    mean, pooled = float(psnr(candidate, reference).mean()), pooled_psnr(candidate, reference)
    assert mean == pytest.approx((9 * 60 + 7.937) / 10, abs=0.01)
    assert pooled == pytest.approx(17.94, abs=0.01)
    assert pool_db(psnr(candidate, reference)) == pytest.approx(pooled, abs=1e-9)
    assert pooled == pytest.approx(float(peak_signal_noise_ratio(candidate, reference, data_range=1.0)), abs=1e-3)


def test_pool_db_takes_exact_matches():
    assert pool_db(torch.tensor([math.inf, 20.0])) == pytest.approx(20 + 10 * math.log10(2))
    assert pool_db(torch.tensor([math.inf, math.inf])) == math.inf


def test_bf16_images_are_scored_as_the_numbers_they_hold():
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, 8, 8).bfloat16(), torch.rand(2, 3, 8, 8).bfloat16()
    assert torch.equal(psnr(a, b), psnr(a.double(), b.double()))


def test_agrees_with_torchmetrics_per_image():
    torch.manual_seed(0)
    a, b = torch.rand(5, 3, 16, 16).double(), torch.rand(5, 3, 16, 16).double()
    theirs = peak_signal_noise_ratio(a, b, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert torch.allclose(psnr(a, b), theirs, atol=1e-6)
