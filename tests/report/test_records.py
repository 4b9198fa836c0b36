"""Records: round trip, strictness, error texts."""

import dataclasses
import json
import math

import pytest

from dqtk.report.records import Record, append_records, read_records

RECORD = Record(
    name="psnr",
    value=31.5,
    unit="dB",
    higher_is_better=True,
    num_samples=24,
    seed=0,
    model="out/pixart-w4a8",
    created="2026-01-01T00:00:00+00:00",
    low=30.0,
    high=33.0,
    plan_hash="abc",
    versions={"torch": "2.9"},
    hardware={"processor": "EPYC"},
    extra={"worst": 20.5, "note": "zwölf", "nested": [1, {"a": None}]},
)


def test_round_trip_through_a_growing_file(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    infinite = dataclasses.replace(RECORD, value=math.inf, low=-math.inf, high=math.inf)
    absent = dataclasses.replace(RECORD, name="lpips", value=None, low=None, high=None, not_measured="no weights")
    assert append_records(path, [RECORD]) == 1
    assert append_records(path, [infinite, absent]) == 2
    assert read_records(path) == [RECORD, infinite, absent]
    assert append_records(path, []) == 0
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_fields_are_frozen_by_name():
    """A changed field changes the files that people keep: say so in the changelog."""
    assert [f.name for f in dataclasses.fields(Record)] == [
        "name", "value", "unit", "higher_is_better", "num_samples", "seed", "model", "created", "low", "high", "plan_hash",
        "not_measured", "versions", "hardware", "extra",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": math.nan}, r"value must be a number or None, not NaN, got nan"),
        ({"value": True}, r"value must be a number"),
        ({"value": "31"}, r"value must be a number"),
        ({"value": None}, r"not_measured must be the reason when value is None, and None otherwise, got None"),
        ({"not_measured": "why"}, r"not_measured must be the reason"),
        ({"low": None}, r"low and high must be given together, got \(None, 33\.0\)"),
        ({"higher_is_better": "yes"}, r"higher_is_better must be True, False or None, got 'yes'"),
        ({"num_samples": -1}, r"num_samples must be a count, got -1"),
        ({"seed": 1.5}, r"seed must be a count or None, got 1\.5"),
        ({"unit": None}, r"unit must be text, got None"),
        ({"versions": {"torch": 2}}, r"versions must be a mapping of text to text"),
    ],
)
def test_wrong_fields_are_refused(change, words):
    with pytest.raises(ValueError, match=f"^Record 'psnr': {words}"):
        dataclasses.replace(RECORD, **change)


@pytest.mark.parametrize("extra", [{"x": math.nan}, {"x": math.inf}, {"x": object()}, {"x": {1, 2}}])
def test_extra_must_be_json_and_nothing_is_written_otherwise(tmp_path, extra):
    path = tmp_path / "records.jsonl"
    with pytest.raises(ValueError, match=r"Record 'psnr': extra must be plain JSON without NaN or infinity"):
        append_records(path, [RECORD, dataclasses.replace(RECORD, extra=extra)])
    assert not path.exists()


def _line(**changes):
    return json.dumps(json.loads(RECORD.to_json()) | changes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"the line must be one JSON object, got '\{'"),
        (RECORD.to_json().replace("31.5", "NaN"), r"the line must be one JSON object.*NaN is not JSON"),
        ("[1]", r"a record must be an object with exactly the fields of Record"),
        (_line(colour="red"), r"got unknown \['colour'\] and missing \[\]\. It may come from another version of dqtk\."),
        (json.dumps({"name": "psnr"}), r"missing \['created', 'extra'"),
        (_line(num_samples="many"), r"Record 'psnr': num_samples must be a count, got 'many'"),
        (_line(value="31.5"), r"value must be a number or None"),
    ],
)
def test_reading_is_strict_and_names_the_line(tmp_path, line, words):
    path = tmp_path / "records.jsonl"
    path.write_text(RECORD.to_json() + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"records\.jsonl:2: .*{words}"):
        read_records(path)


def test_a_cut_off_last_line_is_an_error(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(RECORD.to_json(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the last line must end with a line break, got a cut-off line"):
        read_records(path)
