"""From files to choices, by function and from the shell."""

import json

import pytest

from dqtk.allocate.budget import Budget
from dqtk.allocate.from_logs import allocate_from_logs
from dqtk.cli import main

SCORES = {
    "a.ff": {2: 10.0, 4: 20.0, 8: 40.0},
    "a.attn": {2: 5.0, 4: 25.0, 8: 41.0},
    "b.ff": {2: 18.0, 4: 21.0, 8: 42.0},
    "conv_in": {2: 1.0, 4: 3.0, 8: 9.0},
}
SIZES = {"a.ff": 400.0, "a.attn": 100.0, "b.ff": 400.0, "conv_in": 10.0}


def bits(budget, **how):
    return allocate_from_logs(SCORES, SIZES, Budget(amount=budget, unit="bits"), **how).bits


def test_the_widest_and_the_narrowest():
    assert set(bits(8).values()) == {8}
    assert set(bits(2).values()) == {2}
    with pytest.raises(ValueError, match=r"budget must be at least 2 bits per weight, .* got 1\.9 bits per weight"):
        bits(1.9)


def test_scores_add_up_or_noise_does():
    """2800 bits are 60 over everything at 2 bits and small layers at 8: one of the two large ones gets 4.

    By dB the one with the steeper score (10 dB for a.ff, 3 for b.ff); so too by noise (0.1 -> 0.01, 0.016 -> 0.008). At 20 dB more
    a.ff is still the steeper, but its noise no longer counts.
    """
    total = (100 + 10) * 8 + 400 * 2 + 400 * 4
    amount = total / sum(SIZES.values())
    assert bits(amount) == {"a.ff": 4, "a.attn": 8, "b.ff": 2, "conv_in": 8}
    assert bits(amount, loss="noise") == bits(amount)
    quiet = SCORES | {"a.ff": {2: 30.0, 4: 40.0, 8: 60.0}}
    found = {
        loss: allocate_from_logs(quiet, SIZES, Budget(amount=amount, unit="bits"), loss=loss).bits for loss in ("score", "noise")
    }
    assert (found["score"]["a.ff"], found["score"]["b.ff"]) == (4, 2)
    assert (found["noise"]["a.ff"], found["noise"]["b.ff"]) == (2, 4)


def test_bytes_are_bits_of_all():
    chosen = allocate_from_logs(SCORES, SIZES, Budget(amount=910 * 4 / 8, unit="bytes"))
    assert chosen.bits == bits(4)
    assert chosen.average() <= 4


def test_protected_layers_count_at_16_bits():
    found = bits(5, protect=10.0)
    assert found["conv_in"] == 16
    assert sum(found[layer] * size for layer, size in SIZES.items()) <= 5 * 910
    with pytest.raises(ValueError, match=r"budget must be at least 2\.154 bits per weight"):
        bits(2, protect=10.0)


def test_groups_have_their_own_budgets():
    chosen = allocate_from_logs(SCORES, SIZES, Budget(amount=4.0, unit="bits"), groups={"content": ["*.ff"]}, ratio=0.5)
    data = chosen.to_json()
    content, quality = data["groups"]["content"], data["groups"]["quality"]
    assert content["budget_bits"] == pytest.approx(0.5 * quality["budget_bits"])
    assert content["average_bits"] <= content["budget_bits"]
    assert quality["average_bits"] <= quality["budget_bits"]
    assert chosen.bits["a.attn"] == 4  # 7.1 bits for quality: 8 for conv_in, 4 for the larger
    with pytest.raises(
        ValueError, match=r"^allocate: of group content with ratio 0\.1, budget must be at least 1.758 bits per weight"
    ):
        allocate_from_logs(SCORES, SIZES, Budget(amount=4.0, unit="bits"), groups={"content": ["*.ff"]}, ratio=0.1)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ratio": 0.5}, r"a ratio and the patterns of groups must be given together, got ratio 0\.5 and \{\}"),
        ({"groups": {"content": ["*.ff"]}}, r"given together, got ratio None and \{'content': \['\*\.ff'\]\}"),
        (
            {"groups": {"contents": ["*.ff"]}, "ratio": 1.0},
            "must be one of content, quality, got 'contents'. Did you mean 'content'",
        ),
        (
            {"groups": {"content": ["*.mlp"]}, "ratio": 1.0},
            r"pattern must match one of 4 layers, got '\*\.mlp'. They are named like 'a\.ff'",
        ),
    ],
)
def test_groups_that_are_none(how, said):
    with pytest.raises(ValueError, match=said):
        bits(4, **how)


@pytest.mark.parametrize("unit", ["ms", "bops"])
def test_a_log_knows_no_time(unit):
    with pytest.raises(ValueError, match=rf"budget for a log must be in bits or bytes, got 4 {unit}"):
        allocate_from_logs(SCORES, SIZES, Budget(amount=4, unit=unit))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "log.yaml").write_text("".join(f"{layer}: {list(row.values())}\n" for layer, row in SCORES.items()))
    (tmp_path / "sizes.yaml").write_text("".join(f"{layer}: {size}\n" for layer, size in SIZES.items()))
    return ["--sensitivity", str(tmp_path / "log.yaml"), "--sizes", str(tmp_path / "sizes.yaml")]


def test_from_the_shell(files, tmp_path, capsys):
    output = tmp_path / "choices.json"
    words = ["allocate", *files, "--budget", "4bits", "--output", str(output)]
    assert main(words) == 0
    data, text = json.loads(output.read_text()), capsys.readouterr().out
    assert data["choices"] == bits(4)
    assert f"4 layers, {data['average_bits']:.3f} bits per weight; budget 4 bits\n{output}: the choices" in text
    assert main(words) == 2
    assert "allocate: output must be a new file" in capsys.readouterr().err


def test_mistakes_in_the_shell(files, tmp_path, capsys):
    words = ["allocate", *files, "--output", str(tmp_path / "choices.json")]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--budget", "4.5"])
    assert "budget must be a number with bits, MB" in capsys.readouterr().err
    assert main([*words, "--budget", "4bits", "--widths", "4", "8"]) == 2
    assert "must be a list of 2 scores, for 4, 8 bits, got 3 scores" in capsys.readouterr().err
    assert main([*words, "--budget", "1bits"]) == 2
    assert "budget must be at least 2 bits per weight, the cheapest choice everywhere, got 1 bits" in capsys.readouterr().err
    assert not (tmp_path / "choices.json").exists()
