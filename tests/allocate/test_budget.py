"""Budgets in words and numbers, and their division."""

import pytest

from dqtk.allocate.budget import Budget, divided, parse_budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("4.5bits", 4.5, "bits"),
        (" 300 MB ", 3e8, "bytes"),
        ("1.5GiB", 1.5 * 2**30, "bytes"),
        ("12ms", 12, "ms"),
        ("0.5s", 500, "ms"),
        ("2TBOPs", 2e12, "bops"),
        ("1e9bytes", 1e9, "bytes"),
    ],
)
def test_words(text, amount, unit):
    assert parse_budget(text) == Budget(amount=amount, unit=unit)


@pytest.mark.parametrize("text", ["4.5", "bits", "4,5bits", "-1bits", "0MB", "nanbits", "1.2.3bits", "4.5 bites", "1e999ms", ""])
def test_words_that_are_none(text):
    with pytest.raises(ValueError, match=r"allocate: budget must be a number with bits, .*, got .* For example 4\.5bits\."):
        parse_budget(text)


def test_total():
    assert Budget(amount=4.5, unit="bits").total(10) == 45
    assert Budget(amount=4.5, unit="bytes").total(10) == 4.5


def test_division_keeps_total_and_ratio():
    """MixDQ's formula: B_q = B (1 + r) / (1 + k r) with r the sizes' and k the bits' ratio."""
    sizes = {"content": 2.24 * 16, "quality": 16.0}
    parts = divided(4.0 * 3.24, sizes, {"content": 0.6})
    bits = {group: parts[group] / (sizes[group] / 16) for group in parts}
    assert sum(parts.values()) == pytest.approx(4.0 * 3.24)
    assert bits["quality"] == pytest.approx(4.0 * 3.24 / (1 + 0.6 * 2.24))
    assert bits["content"] == pytest.approx(0.6 * bits["quality"])
    assert divided(5.0, {"quality": 16.0}, {"content": 0.6}) == {"quality": 5.0}
    three = divided(9.0, {"text": 16.0, "temporal": 32.0, "spatial": 16.0}, {"text": 0.5, "temporal": 1.5})
    assert three == pytest.approx({"text": 1.0, "temporal": 6.0, "spatial": 2.0})


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_ratios_that_are_none(ratio):
    with pytest.raises(ValueError, match="allocate: ratio must be a number above 0, got"):
        divided(1.0, {"content": 1.0, "quality": 1.0}, {"content": ratio})
