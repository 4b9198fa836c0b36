"""Jobs from end to end on an untrained pipeline: after every kind of death, and by several processes, the same numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pandas
import pytest
import torch

from dqtk.cli import main
from dqtk.jobs.run import run
from dqtk.jobs.spec import read_job


def numbers(folder):
    """(model, name) -> value and interval of every result."""
    found = json.loads((folder / "results.json").read_text())["results"]
    return {(r["model"], r["name"]): (r["value"], r["low"], r["high"]) for r in found}


@pytest.fixture
def done(job_file, tmp_path):
    """(job file, output, its numbers) of a finished job."""
    file = job_file()
    run(read_job(file))
    return file, tmp_path / "out", numbers(tmp_path / "out")


def test_everything_is_written(done):
    _, out, found = done
    assert {path.name for path in out.iterdir()} == {
        *("job.json", "models", "images", "cache"),
        *("results.json", "samples.parquet", "report.md", "report.tex", "report.html"),
    }
    assert found["pixart-w8a8", "psnr@vs_original"][0] > 30
    assert ("pixart", "psnr@vs_original") not in found
    assert found["pixart", "oracle_mean"][0] < 0.6  # it was never trained
    data = json.loads((out / "results.json").read_text())
    before, after = (data["variants"][name]["bytes_at_16_bit"] for name in ("pixart", "pixart-w8a8"))
    assert after < 0.8 * before
    assert data["variants"]["pixart-w8a8"]["recipe"] == "w8a8"
    assert not list(out.rglob("*.partial"))
    samples = pandas.read_parquet(out / "samples.parquet")
    assert len(samples) == 10
    assert {"id", "prompt", "sha256", "psnr", "ssim", "clip_score[tiny-clip]", "oracle_mean"} <= set(samples)


def test_a_finished_job_is_not_run_again(done, monkeypatch):
    file, out, found = done
    monkeypatch.setattr("dqtk.jobs.generate.load_pipeline", lambda *a: pytest.fail("loaded a pipeline"))
    monkeypatch.setattr("dqtk.jobs.features.read_pictures", lambda *a: pytest.fail("read a picture"))
    run(read_job(file))
    assert numbers(out) == found


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: shutil.rmtree(out / "cache"),
        lambda out: (out / "images" / "pixart-w8a8" / "0002-0.png").write_bytes(b"corrupt"),
        lambda out: (out / "images" / "pixart" / "batch-0001.json").write_text("{"),
        lambda out: (out / "images" / "pixart" / "0004-0.png").unlink(),
        lambda out: next((out / "cache" / "features").iterdir()).write_bytes(b"x" * 9),
        lambda out: (out / "images" / "pixart" / ".0000-0.png.0011aabb.partial").write_bytes(b"half"),
    ],
)
def test_whatever_is_lost_or_damaged_is_made_again(done, damage):
    file, out, found = done
    damage(out)
    run(read_job(file))
    assert numbers(out) == found
    assert not list(out.rglob("*.partial"))


@pytest.mark.parametrize(
    ("where", "times"),
    [
        ("dqtk.jobs.generate.write_bytes", 3),  # between the pictures of a batch
        ("dqtk.jobs.generate.write_json", 2),  # before a manifest
        ("dqtk.jobs.features.save_file", 4),  # between features
        ("dqtk.jobs.results.write_bytes", 1),  # between reports
    ],
)
def test_killed_at_any_stage_and_resumed(job_file, tmp_path, done, where, times):
    """SIGKILL: nothing can be tidied up on the way out."""
    _, _, found = done
    file = job_file("other.yaml", output=str(tmp_path / "killed"))
    module, name = where.rsplit(".", 1)
    script = f"""
import importlib, os, signal, sys
module, left = importlib.import_module({module!r}), [{times}]
original = module.{name}
def kill(*args, **kwargs):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
module.{name} = kill
from dqtk.cli import main
sys.exit(main(["run", {str(file)!r}]))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists() or where.startswith("dqtk.jobs.results")
    run(read_job(file))
    assert numbers(tmp_path / "killed") == found


@pytest.mark.parametrize("stage", ["generate", "features", "results"])
def test_a_full_disk_is_one_line_and_resumes(job_file, tmp_path, monkeypatch, capsys, stage, done):
    _, _, found = done
    file = job_file("other.yaml", output=str(tmp_path / "full"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(f"dqtk.jobs.{stage}.{'save_file' if stage == 'features' else 'write_bytes'}", full)
        assert main(["run", str(file)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dqtk run: ")]
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert not list((tmp_path / "full").rglob("*.partial"))
    run(read_job(file))
    assert numbers(tmp_path / "full") == found


@pytest.mark.parametrize("num", [2, 3])
def test_several_processes_give_the_numbers_of_one(job_file, tmp_path, done, num):
    _, _, found = done
    file = job_file("many.yaml", output=str(tmp_path / "many"))
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", str(num)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done_ = subprocess.run([*launch, "-m", "dqtk", "run", str(file)], capture_output=True, text=True, timeout=400, env=environment)
    assert done_.returncode == 0, done_.stderr[-3000:]
    assert numbers(tmp_path / "many") == found


def test_the_folder_of_another_job_is_refused(done, job_file, tmp_path):
    with pytest.raises(ValueError, match=r"output .*out must belong to this job, got another's \(different: seed\)"):
        run(read_job(job_file(seed=9)))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"output must be a new or empty folder, or this job's own, got .*notes"):
        run(read_job(job_file(output=str(tmp_path / "notes"))))
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_more_metrics_need_no_new_pictures(done, job_file, monkeypatch):
    _, out, found = done
    monkeypatch.setattr("dqtk.jobs.generate.load_pipeline", lambda *a: pytest.fail("loaded a pipeline"))
    run(read_job(job_file(metrics=["psnr", "cmmd"])))
    assert numbers(out)["pixart-w8a8", "psnr@vs_original"] == found["pixart-w8a8", "psnr@vs_original"]
    assert ("pixart-w8a8", "cmmd[tiny-clip]@vs_original(paired)") in numbers(out)


def test_pictures_of_the_world_as_reference(job_file, pictures, tmp_path):
    file = job_file(references=str(pictures("photos", num=7)), metrics=["frechet", "kid", "recall"], recipes=[])
    run(read_job(file))
    found = numbers(tmp_path / "out")
    assert set(found) == {("pixart", f"{name}[tiny-clip]@vs_real") for name in ("frechet", "kid", "recall")}


@pytest.mark.parametrize("floor", ["kernels", "threads"])
def test_the_floor_of_other_kernels_and_threads(job_file, tmp_path, floor):
    """The same weights in the same dtype; what moves is the order of sums, if anything: far above what 8 bits do."""
    threads = torch.get_num_threads()
    run(read_job(job_file(floor=floor, metrics=["psnr"], threads=1)))
    found = numbers(tmp_path / "out")
    assert found[f"pixart-{floor}", "psnr@vs_original"][0] > found["pixart-w8a8", "psnr@vs_original"][0] + 10
    assert json.loads((tmp_path / "out" / "results.json").read_text())["variants"][f"pixart-{floor}"]["role"] == "floor"
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def test_wrong_names_fail_before_anything_is_painted(job_file, tmp_path, capsys):
    assert main(["run", str(job_file(metrics=["psnrr"]))]) == 2
    assert main(["run", str(job_file(recipes=["w9"]))]) == 2
    assert main(["run", str(job_file()), "--fail-if", "psnr"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dqtk run: error")]
    assert len(said) == 3
    assert not (tmp_path / "out" / "images").exists()


def test_the_page_shows_the_pictures_that_lost_most_and_every_score(done):
    _, out, found = done
    page = (out / "report.html").read_text()
    samples = pandas.read_parquet(out / "samples.parquet")
    worst = samples[samples.variant == "pixart-w8a8"].sort_values("psnr").id.tolist()
    places = [page.index(f"<small>{name}</small>") for name in worst]
    assert places == sorted(places)
    assert page.count("<img ") == 2 * len(worst)
    for _, name in found:
        assert name in page
