"""Sensitivity logs and sizes: round trips, and what is refused by name."""

import pytest

from dqtk.allocate.logs import read_sensitivity, read_sizes, write_sensitivity, write_sizes


@pytest.fixture
def written(tmp_path):
    """Function (text) -> path of a file with it."""

    def write(text, name="log.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_both_ways_of_writing_lists(written):
    text = "down.0.ff: [1.5, 3, 1e-5]\nmid.attn:\n- -2\n- 4.0\n- 8.25\n"
    assert read_sensitivity(written(text)) == {"down.0.ff": {2: 1.5, 4: 3.0, 8: 1e-5}, "mid.attn": {2: -2.0, 4: 4.0, 8: 8.25}}
    assert read_sensitivity(written("a: [1, 2]"), widths=(4, 8)) == {"a": {4: 1.0, 8: 2.0}}


def test_round_trip(tmp_path):
    scores = {"z": {2: 0.1 + 0.2, 4: 1e-17, 8: 1e300}, "a": {8: 3.0, 4: 2.0, 2: -1.0}}
    write_sensitivity(tmp_path / "log.yaml", scores)
    assert read_sensitivity(tmp_path / "log.yaml") == scores
    assert list(read_sensitivity(tmp_path / "log.yaml")) == ["z", "a"]
    write_sizes(tmp_path / "sizes.yaml", {"z": 11520, "a": 3})
    assert read_sizes(tmp_path / "sizes.yaml", ["a", "z"]) == {"a": 3.0, "z": 11520.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1, .nan, 3]", r"score of a at 4 bits in .*log\.yaml must be a finite number, got nan\. Measure"),
        ("a: [1, nan, 3]", r"score of a at 4 bits in .* must be a finite number, got nan"),
        ("a: [1, 2, .inf]", r"score of a at 8 bits in .* must be a finite number, got inf"),
        ("a: [1, 2, true]", r"score of a at 8 bits in .* must be a finite number, got True"),
        ("a: [1, 2, null]", r"score of a at 8 bits in .* must be a finite number, got None"),
        ("a: [1, 2, many]", r"score of a at 8 bits in .* must be a finite number, got 'many'"),
        ("a: [1, 2, 3]\nb: [1, 2]", r"b in .* must be a list of 3 scores, for 2, 4, 8 bits, got 2 scores\. Say which"),
        ("a: 1", r"a in .* must be a list of 3 scores, .* got 1\. Say"),
        ("a: [1, 2, 3]\nb: [4, 5, 6]\na: [7, 8, 9]", r"must be YAML that .*, got: a twice, again in line 3\. Mend"),
        ("[1, 2]", r"must be YAML that maps each layer's name to a list of scores, got list\. Mend"),
        ("", "got NoneType"),
        ("{}", "got dict"),
        ("1: [1, 2, 3]", r"got the keys \[1\]"),
        ("a: [1, 2", "must be YAML that maps each layer to a list of scores, got: while parsing"),
        ("? [a]\n: [1, 2, 3]", "must be YAML that maps each layer to a list of scores, got: unhashable"),
        ("a: !!python/object/apply:os.getcwd []", "must be YAML .* got: could not determine a constructor"),
    ],
)
def test_bad_logs(written, text, said):
    with pytest.raises(ValueError, match=said):
        read_sensitivity(written(text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"allocate: file must exist, got .*none\.yaml\. Check the path"):
        read_sensitivity(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ff.0: 4", r"every layer must be one with a size, got ff\.2 in only one .* Did you mean 'ff\.0'\?"),
        ("ff.0: 4\nff.2: 4\nx: 1\ny: 2", r"must be one of the sensitivity log, got x and 1 more in only one of the files"),
        ("ff.0: 4\nff.2: 0", r"size of ff\.2 in .* must be above 0, got 0\. It is a number"),
        ("ff.0: 4\nff.2: .nan", r"size of ff\.2 in .* must be a finite number, got nan"),
        ("ff.0: 4\nff.2: [1]", r"size of ff\.2 in .* must be a finite number, got \[1\]"),
    ],
)
def test_bad_sizes(written, text, said):
    with pytest.raises(ValueError, match=said):
        read_sizes(written(text, "sizes.yaml"), ["ff.0", "ff.2"])
