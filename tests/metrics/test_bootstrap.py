"""The bootstrap interval: coverage, clusters, determinism, error texts."""

import pytest
import torch
from dqtk.metrics.bootstrap import paired_bootstrap


def test_covers_the_true_mean_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(300, 40, generator=generator, dtype=torch.float64).exp()  # skewed on purpose
    true_mean = float(torch.tensor(0.5).exp())
    intervals = [paired_bootstrap(values, num_resamples=500, seed=i) for i, values in enumerate(samples)]
    covered = sum(i.low <= true_mean <= i.high for i in intervals) / 300
    assert 0.85 <= covered <= 0.97  # 95 % nominal, less for 40 skewed values


def test_matches_the_normal_interval_where_it_should():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 7
    found = paired_bootstrap(values)
    half = 1.96 * float(values.std()) / 20
    assert found.estimate == pytest.approx(float(values.mean()))
    assert found.low == pytest.approx(found.estimate - half, abs=0.06)
    assert found.high == pytest.approx(found.estimate + half, abs=0.06)


def test_prompts_are_drawn_and_not_images():
    """Ten prompts with ten equal images each tell as much as ten images."""
    means = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clustered = paired_bootstrap(means.repeat_interleave(10), [i // 10 for i in range(100)])
    plain = paired_bootstrap(means)
    assert (clustered.low, clustered.high) == pytest.approx((plain.low, plain.high), abs=1e-12)
    naive = paired_bootstrap(means.repeat_interleave(10))
    assert naive.high - naive.low < 0.5 * (clustered.high - clustered.low)


def test_uneven_prompts_count_equally():
    assert paired_bootstrap([0.0, 0.0, 0.0, 1.0], [7, 7, 7, 3]).estimate == 0.5


def test_deterministic_seeded_and_ordered():
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    assert paired_bootstrap(values, seed=1) == paired_bootstrap(values, seed=1)
    assert paired_bootstrap(values, seed=1) != paired_bootstrap(values, seed=2)
    wide, narrow = paired_bootstrap(values, confidence=0.99), paired_bootstrap(values, confidence=0.5)
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_chunks_do_not_change_the_answer(monkeypatch):
    values = torch.rand(30, generator=torch.Generator().manual_seed(0))
    whole = paired_bootstrap(values, num_resamples=1000)
    monkeypatch.setattr("dqtk.metrics.bootstrap._CHUNK", 30 * 64)
    assert paired_bootstrap(values, num_resamples=1000) == whole


def test_one_prompt_has_no_interval():
    found = paired_bootstrap([1.0, 2.0], [0, 0])
    assert (found.estimate, found.low, found.high) == (1.5, None, None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), r"values must be at least one number, got none"),
        (([1.0, float("inf"), float("nan")],), r"values must be finite, got 2 that are not\. Cap infinite scores first"),
        (([1.0, 2.0], [0]), r"prompts must be one per value \(2\), got 1\. Repeat the prompt"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=f"^paired_bootstrap: {words}"):
        paired_bootstrap(*arguments)
    with pytest.raises(ValueError, match=r"num_resamples must be at least 100, got 5"):
        paired_bootstrap([1.0, 2.0], num_resamples=5)
    with pytest.raises(ValueError, match=r"confidence must be between 0 and 1, got 95"):
        paired_bootstrap([1.0, 2.0], confidence=95)
