"""Presets: they name what exists, fill what a job leaves out, and say where a job departs from them."""

import pytest
import yaml
from dqtk.metrics.extractors.find import KINDS

from dqtk.cli import main
from dqtk.jobs.presets import PRESETS, deviations
from dqtk.jobs.spec import read_job, to_json
from dqtk.report.scores import scores_on_offer


@pytest.fixture
def job(tmp_path):
    """A function (**fields) -> the job of a file with those and the least that it needs."""

    def read(**fields):
        least = {"name": "x", "models": ["tiny-pixart"], "prompts": ["a", "b"], "output": str(tmp_path / "out")}
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(least | fields))
        return read_job(path)

    return read


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_what_exists(name, job):
    preset = PRESETS[name]
    assert set(preset.metrics) <= set(scores_on_offer())
    kinds = {kind.partition(":")[0] for kind in KINDS}
    assert {extractor.partition(":")[0] for extractor in preset.extractors} <= kinds
    assert preset.known
    assert preset.open
    found = job(preset=name)
    assert (found.metrics, found.extractors) == (preset.metrics, preset.extractors)
    assert found.call == preset.call


def test_what_the_job_says_goes_before_the_preset(job):
    found = job(preset="vqdm", metrics=["psnr"], call={"num_inference_steps": 4, "eta": 1.0})
    assert found.metrics == ("psnr",)
    assert found.call == {"num_inference_steps": 4, "guidance_scale": 5.0, "eta": 1.0}
    assert found.extractors == PRESETS["vqdm"].extractors
    said = deviations(to_json(found), 2)
    assert said[:3] == [
        "preset vqdm: 2 prompts, the protocol has 5000 (COCO captions)",
        "preset vqdm: without metrics frechet, clip_score, pickscore_cosine",
        "preset vqdm: num_inference_steps is 4, the protocol's 50",
    ]
    assert [line for line in said if line.startswith("preset vqdm, not known: ")] == said[3:]
    assert len(said[3:]) == len(PRESETS["vqdm"].open)


def test_the_protocol_itself_departs_in_nothing(job):
    workers = dict.fromkeys(PRESETS["svdquant"].workers, "python worker.py")
    said = deviations(to_json(job(preset="svdquant", workers=workers)), 5000)
    assert said == [f"preset svdquant, not known: {line}" for line in PRESETS["svdquant"].open]
    assert deviations(to_json(job(preset="svdquant")), 5000)[0] == "preset svdquant: without the worker image_reward"
    assert deviations(to_json(job(metrics=["psnr"])), 3) == []


def test_names_are_checked(job):
    with pytest.raises(
        ValueError, match=r"job: preset must be one of mixdq, .*svdquant, got 'svdquan'\. Did you mean 'svdquant'\?"
    ):
        job(preset="svdquan")
    with pytest.raises(ValueError, match=r"preset must be str \| None, got 3"):
        job(preset=3, metrics=["psnr"])


def test_a_job_of_a_preset_may_go_on_in_its_folder(job):
    """What moves pictures is the call that the preset fills in, not its name."""
    preset = PRESETS["vqdm"]
    spelled = job(metrics=list(preset.metrics), extractors=list(preset.extractors), call=dict(preset.call))
    assert job(preset="vqdm").hash == spelled.hash


def test_the_command_line_lists_them(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--presets"])
    text = capsys.readouterr().out
    assert all(f"{name}: " in text for name in PRESETS)
    assert "not known" in text
