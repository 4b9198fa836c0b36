"""Inception score: its bounds, a plain numpy reference, splits, seeds, error texts."""

import numpy as np
import pytest
import torch
from dqtk.metrics.inception_score import inception_score


def _logits(num, classes, seed=0):
    return 3 * torch.randn(num, classes, generator=torch.Generator().manual_seed(seed))


def _reference(logits):
    """exp(H(marginal) - mean H(conditional)): the same number by the other route."""
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    marginal = p.mean(axis=0)
    return np.exp(-(marginal * np.log(marginal)).sum() + (p * np.log(p)).sum(axis=1).mean())


def test_uniform_logits_score_one():
    assert inception_score(torch.full((40, 7), 3.0)) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize("height", [100.0, 1e5])  # the second underflows to exact zeros
def test_balanced_and_certain_classes_score_their_number(height):
    logits = height * torch.eye(6).repeat(5, 1)
    assert inception_score(logits, splits=1) == pytest.approx((6, 0), abs=1e-9)


def test_one_class_for_all_scores_one_however_certain():
    assert inception_score(100 * torch.eye(6)[[2] * 30], splits=3) == pytest.approx((1, 0), abs=1e-9)


def test_is_the_difference_of_entropies():
    logits = _logits(50, 12)
    mean, std = inception_score(logits, splits=1)
    assert mean == pytest.approx(_reference(logits), rel=1e-9)
    assert std == 0
    assert 1 < mean < 12


def test_splits_are_of_the_shuffled_images():
    logits = _logits(50, 12)
    mean, std = inception_score(logits, splits=4, seed=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    parts = [_reference(logits[part]) for part in np.array_split(order.numpy(), 4)]
    assert (mean, std) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    assert inception_score(logits, splits=4, seed=3) == (mean, std)
    assert inception_score(logits, splits=4) != (mean, std)


def test_images_sorted_by_class_are_not_punished():
    logits = 100 * torch.eye(5).repeat_interleave(40, dim=0)
    assert inception_score(logits, splits=5)[0] > 4.5


def test_a_split_of_one_image_scores_one():
    assert inception_score(_logits(10, 5)) == pytest.approx((1, 0), abs=1e-9)


def test_a_common_offset_and_half_precision():
    logits = _logits(50, 12).bfloat16()
    found = inception_score(logits)
    assert found == pytest.approx(inception_score(logits.double()), rel=1e-12)
    assert inception_score(logits.double() + 500) == pytest.approx(found, rel=1e-9)


def test_errors():
    with pytest.raises(
        ValueError, match=r"^inception_score: splits must be from 1 to the number of images \(9\), got 10\. The default"
    ):
        inception_score(_logits(9, 5))
    with pytest.raises(ValueError, match=r"^inception_score: splits must be from 1 .*, got 0\."):
        inception_score(_logits(9, 5), splits=0)
    with pytest.raises(ValueError, match=r"^inception_score: the first set must be finite, got 1 rows that are not\."):
        inception_score(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]))
