"""Conditions that fail a job."""

import pytest

from dqtk.jobs.gates import parse_gate, tripped
from dqtk.report.records import Record


def record(name, value, model="q", **fields):
    shared = {"unit": "", "higher_is_better": True, "num_samples": 4, "seed": 0, "created": ""}
    return Record(name=name, value=value, model=model, **shared, **fields)


RECORDS = [
    record("psnr@vs_original", 31.0, low=28.0, high=33.0),
    record("psnr@vs_original", 50.0, model="other", low=49.0, high=51.0),
    record("oracle_mean", 0.9),
    record("oracle_mean@change", -0.03),
    record("lpips", None, model="", not_measured="no weights"),
]


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("psnr < 30", []),
        ("psnr<31.5", ["q"]),
        ("psnr@vs_original.low < 30", ["q"]),
        ("psnr.high >= 33", ["q", "other"]),
        ("psnr > 3.1e1", ["other"]),
        ("oracle_mean < 0.5", ["other"]),  # not measured for "other": nothing proves that it holds
        ("oracle_mean@change <= -0.03", ["q", "other"]),
        ("lpips > 0.1", ["q", "other"]),
    ],
)
def test_conditions(text, fails):
    said = tripped([parse_gate(text)], RECORDS, ["q", "other"])
    assert [line.split(":")[0] for line in said] == fails


def test_words():
    (line,) = tripped([parse_gate("psnr.low < 30")], RECORDS, ["q"])
    assert line == "q: psnr low is 28, and 'psnr.low < 30' fails the job"
    with pytest.raises(ValueError, match=r"--fail-if: name must be that of a result, got 'psnrr'\. Did you mean 'psnr'\?"):
        tripped([parse_gate("psnrr < 1")], RECORDS, ["q"])
    for text in ("psnr = 3", "psnr", "< 3", "psnr < three", "psnr < 1.2.3", "psnr < ."):
        with pytest.raises(ValueError, match="--fail-if: condition must be NAME OP NUMBER"):
            parse_gate(text)


def test_a_short_name_must_mean_one_result():
    """``frechet`` of two extractors, or against two references, is two numbers: the first would be judged for the other."""
    names = ["frechet[a]@vs_original(paired)", "frechet[a]@vs_real", "kid[a]@vs_real", "kid[b]@vs_real", "clip_score[a]"]
    records = [record(name, 1.0) for name in [*names, "clip_score[a]@change"]]
    for text, first in (("frechet > 0", "frechet"), ("frechet[a] > 0", r"frechet\[a\]"), ("kid > 0", "kid")):
        with pytest.raises(
            ValueError, match=rf"--fail-if: name must be that of one result, got '{first}' for {first}.*, .* full name"
        ):
            tripped([parse_gate(text)], records, ["q"])
    for text in ("frechet[a]@vs_real > 0", "kid[a] > 0", "clip_score > 0", "clip_score[a]@change > 0"):
        assert len(tripped([parse_gate(text)], records, ["q"])) == 1
