"""README's Python runs, on the embedded pipeline in place of the hub id; its commands are ones that the shell accepts."""

import re
import shlex
from pathlib import Path

import pytest

from dqtk.cli import parser
from dqtk.resolve import embedded_folder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    from diffusers import DiffusionPipeline

    monkeypatch.chdir(tmp_path)
    first, second, load, compare = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert HUB_ID in first
    folder = str(embedded_folder("tiny-pixart"))
    names: dict = {}
    exec(first.replace(HUB_ID, folder), names)
    assert (tmp_path / "pixart-w4a8" / "model_index.json").is_file()
    DiffusionPipeline.from_pretrained(tmp_path / "pixart-w4a8")

    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path / "second")
    names = {"dqtk": names["dqtk"], "pipe": names["dqtk"].load(folder), "prompts": ["a red circle"]}
    exec(second, names)
    assert (tmp_path / "second" / "pixart-w4a8" / "model_index.json").is_file()

    exec(load, names)
    names["original"] = names["dqtk"].load(folder)
    exec(compare, names | {"prompts": ["a large red circle in the top left on a plain white background"]})
    assert "PSNR (dB)" in capsys.readouterr().out


def test_python_blocks_of_the_page_on_attention_run():
    import dqtk

    page = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
    by_name, by_spec, _ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {"dqtk": dqtk, "pipe": dqtk.load(embedded_folder("tiny-pixart")), "prompts": ["a red circle"]}
    exec(by_spec, names)
    densities = [choice.spec.mask.density for choice in names["plan"].attention if choice.spec]
    assert densities == [0.9] + 5 * [0.5]
    exec(by_name, names)
    assert {choice.spec.mask.density for choice in names["plan"].attention if choice.spec} == {0.3}


@pytest.mark.parametrize(
    "page", ["README.md", "docs/recipes.md", "docs/streaming.md", "docs/bench.md", "docs/attention.md", "benchmarks/demo.sh"]
)
def test_commands_parse(page):
    lines = [line.strip().removeprefix("run ") for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("dqtk ") and "|" not in line]
    assert commands
    for words in commands:
        parser().parse_args(words[1:])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_recipe_table_is_complete():
    from dqtk.recipes import RECIPES

    assert set(re.findall(r"^\| `([\w-]+)` \|", README, flags=re.MULTILINE)) == set(RECIPES)


def test_no_page_was_left_with_a_place_to_fill():
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "notebooks" / "LOG.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b|\bTODO\b|\bTBD\b", prose), page
