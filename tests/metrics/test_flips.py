"""Flips: the four counts, the exact McNemar test, error texts."""

import math

import pytest
import torch
from dqtk.metrics.bootstrap import paired_bootstrap
from dqtk.metrics.flips import Flips, change_interval, flips, never_seen_bound
from scipy.stats import binomtest


def _outcomes(right_to_wrong, wrong_to_right, both_right=0, both_wrong=0):
    sizes = torch.tensor([right_to_wrong, wrong_to_right, both_right, both_wrong])
    reference = torch.tensor([True, False, True, False]).repeat_interleave(sizes)
    candidate = torch.tensor([False, True, True, False]).repeat_interleave(sizes)
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))
    return reference[order], candidate[order]


def test_counts_gross_and_net():
    found = flips(*_outcomes(7, 4, 20, 10))
    assert (found.right_to_wrong, found.wrong_to_right, found.both_right, found.both_wrong) == (7, 4, 20, 10)
    assert (found.gross, found.net) == (11, -3)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [
        (1, 9, 0.021484375),  # 2 (1 + 10) / 2^10
        (0, 5, 0.0625),
        (0, 6, 0.03125),
        (2, 8, 0.109375),  # 2 (1 + 10 + 45) / 2^10
        (3, 12, 0.03515625),  # 2 (1 + 15 + 105 + 455) / 2^15
        (1, 0, 1.0),
        (4, 4, 1.0),
        (4, 5, 1.0),
    ],
)
def test_exact_mcnemar(b, c, p):
    assert flips(*_outcomes(b, c, 3, 2)).p_value == pytest.approx(p, abs=1e-12)
    assert flips(*_outcomes(c, b)).p_value == pytest.approx(p, abs=1e-12)


def test_is_the_sum_of_binomials_for_many_flips():
    n, b = 200, 80
    expected = 2 * sum(math.comb(n, i) for i in range(b + 1)) / 2**n
    assert flips(*_outcomes(b, n - b)).p_value == pytest.approx(expected, rel=1e-9)
    assert 0 <= flips(*_outcomes(0, 20_000)).p_value < 1e-300


def test_concordant_pairs_do_not_change_the_test():
    assert flips(*_outcomes(1, 9, 1000, 1000)).p_value == flips(*_outcomes(1, 9)).p_value


def test_nothing_flipped():
    assert flips([True, False, True], [True, False, True]) == Flips(
        right_to_wrong=0, wrong_to_right=0, both_right=2, both_wrong=1, p_value=1.0
    )


def test_churn_without_net_change_is_kept():
    found = flips(*_outcomes(50, 50))
    assert (found.net, found.gross, found.p_value) == (0, 100, pytest.approx(1))


def test_errors():
    with pytest.raises(ValueError, match=r"^flips: both must be of one length, got 2 and 3\. Compare the same prompts and seeds\."):
        flips([True, False], [True, False, True])
    with pytest.raises(
        ValueError, match=r"^flips: candidate must be bool, got torch\.float32\. Compare scores with a threshold first"
    ):
        flips([True, False], torch.tensor([0.4, 0.6]))
    with pytest.raises(
        ValueError, match=r"^flips: reference must be \[N\] and not empty, got \[0\]\. Pass one outcome per image\."
    ):
        flips([], [])
    with pytest.raises(ValueError, match=r"^flips: reference must be \[N\] and not empty, got \[2, 1\]\."):
        flips(torch.ones(2, 1).bool(), torch.ones(2, 1).bool())


def test_what_was_never_seen_is_bounded_by_the_number_of_tries():
    for num in (1, 5, 40):
        assert never_seen_bound(num) == pytest.approx(binomtest(0, num).proportion_ci(0.95).high)
    with pytest.raises(ValueError, match="never_seen_bound: num must be at least 1, got 0"):
        never_seen_bound(0)


def test_the_interval_of_a_change_that_all_share_is_what_so_many_prompts_can_rule_out():
    whose, bound = [0, 0, 1, 1, 2, 2], never_seen_bound(3)
    same = change_interval([1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0], whose)
    assert (same.low, same.estimate, same.high) == (-bound, 0, bound)
    all_wrong = change_interval([1.0] * 6, [0.0] * 6, whose)
    assert (all_wrong.low, all_wrong.estimate, all_wrong.high) == (-1, -1, -1 + bound)
    some = change_interval([1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1], whose, seed=4)
    assert some == paired_bootstrap([0.0, 0, -1, 0, -1, 1], whose, seed=4)
    assert change_interval([1, 0], [1, 0], [7, 7]).low is None  # of one prompt nothing is known


def test_the_interval_of_a_change_is_of_outcomes():
    with pytest.raises(ValueError, match=r"change_interval: outcomes must be 0 or 1, got 0\.5\."):
        change_interval([1, 0.5], [1, 1], [0, 1])
