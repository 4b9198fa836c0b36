"""Jobs from end to end on an untrained pipeline: after every kind of death, and by several processes, the same numbers."""

import dataclasses
import html
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys

import pandas
import pytest
import torch
from dqtk.metrics.bootstrap import paired_bootstrap

from dqtk.cli import main
from dqtk.jobs import asked, generate
from dqtk.jobs.run import read_results, run
from dqtk.jobs.spec import read_job, to_json
from dqtk.processes import Processes, processes
from dqtk.report.generate import image_seed


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
def test_several_processes_give_the_numbers_of_one(job_file, tmp_path, done, num, launched):
    _, _, found = done
    file = job_file("many.yaml", output=str(tmp_path / "many"))
    launched(num, "run", file)
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


def test_the_floor_of_other_kernels(job_file, tmp_path):
    """In bf16 other kernels move 8-bit pixels for certain; what changes nothing would be 100 dB."""
    run(read_job(job_file(floor="kernels", dtype="bfloat16", metrics=["psnr"], recipes=[])))
    assert 30 < numbers(tmp_path / "out")["pixart-kernels", "psnr@vs_original"][0] < 90
    assert json.loads((tmp_path / "out" / "results.json").read_text())["variants"]["pixart-kernels"]["role"] == "floor"


def test_the_floor_of_other_threads(job_file, tmp_path, monkeypatch):
    """Whether so small a pipeline rounds otherwise on one thread is chance; that it is painted with so many is not."""
    before, seen, own = torch.get_num_threads(), [], generate.generate
    monkeypatch.setattr(generate, "generate", lambda *a: (seen.append(torch.get_num_threads()), own(*a))[1])
    run(read_job(job_file(floor="threads", metrics=["psnr"], recipes=["w8a8"], threads=1)))
    assert seen == [1, 1, 1, 2, 2, 2, 1, 1, 1]  # original, floor, w8a8
    found = numbers(tmp_path / "out")
    assert found["pixart-threads", "psnr@vs_original"][0] > found["pixart-w8a8", "psnr@vs_original"][0] + 10
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


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


def test_the_page_says_what_one_cites(done):
    _, out, _ = done
    page = html.unescape(re.sub(r"<[^>]+>", " ", (out / "report.html").read_text().split("<body>")[1]))
    page = re.sub(r"\s+", " ", page)
    for words in (
        *("How to reproduce", " prompts 5 ", "pictures per variant 5", " seed 0 ", "seeds per prompt 1", "num_inference_steps 2"),
        *("computed in, pixart-w8a8 float32", "count in psnr@vs_original as 100 dB", "equal pictures, pixart-w8a8 0 of 5"),
        *(f"torch {importlib.metadata.version('torch')}", " processor ", " threads 1 ", "metrics psnr, ssim, oracle"),
        "have no interval",
    ):
        assert words in page, words


def test_samples_say_where_pictures_lie_and_their_seeds(done):
    _, out, _ = done
    samples = pandas.read_parquet(out / "samples.parquet")
    assert all((out / file).is_file() for file in samples["file"])
    assert set(samples[samples.variant == "pixart"]["file"]) == {f"images/pixart/{i:04d}-0.png" for i in range(5)}
    assert samples["seed"].tolist() == [image_seed(0, i) for i in range(5)] * 2


def test_tex_has_a_row_per_score(done):
    _, out, _ = done
    tex = (out / "report.tex").read_text()
    assert tex.startswith("\\begin{tabular}{lrr}\n\\hline\nscore & pixart & pixart-w8a8 \\\\\n\\hline\nweights & ")
    assert re.search(r"^psnr@vs\\_original & -- & [\d.]+ \([\d.]+ to [\d.]+\) \\\\$", tex, re.MULTILINE)


# --- whose pictures these are ------------------------------------------------------------------------------------------


def repainted(out, before):
    """Variants of which some picture is another now."""
    return {path.parent.name for path in out.glob("images/*/*.png") if path.read_bytes() != before[path]}


def painted(out):
    return {path: path.read_bytes() for path in out.glob("images/*/*.png")}


def test_another_model_under_the_same_name_is_painted_and_quantized_again(job_file, tiny_folders, load_tiny, tmp_path):
    model, out = tmp_path / "pixart", tmp_path / "out"
    shutil.copytree(tiny_folders["pixart"], model)
    file = job_file(models=[str(model)])
    run(read_job(file))
    before, note = painted(out), (out / "models" / "pixart-w8a8.json").read_text()
    pipe = load_tiny("pixart")
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.5)
    pipe.save_pretrained(model)
    run(read_job(file))
    assert repainted(out, before) == {"pixart", "pixart-w8a8"}
    assert (out / "models" / "pixart-w8a8.json").read_text() != note
    facts = json.loads((out / "results.json").read_text())["variants"]
    assert facts["pixart"]["maker"]["model"] in (out / "images" / "pixart" / "batch-0000.json").read_text()


def test_an_output_type_of_pictures_is_taken_and_the_pictures_are_pictures(job_file, tmp_path):
    run(read_job(job_file(call={"num_inference_steps": 1, "output_type": "np"}, metrics=["psnr"])))
    assert numbers(tmp_path / "out")["pixart-w8a8", "psnr@vs_original"][0] > 20


def test_another_quantized_model_in_its_folder_is_painted_again(done):
    """Somebody put a recipe's result of his own into OUTPUT/models."""
    file, out, _ = done
    before = painted(out)
    folder = out / "models" / "pixart-w8a8"
    shutil.rmtree(folder)
    main(["quantize", str(read_job(file).models[0]), "--recipe", "w4a8-rtn", "--output", str(folder)])
    run(read_job(file))
    assert repainted(out, before) == {"pixart-w8a8"}


def test_another_prompt_file_of_the_same_name_is_painted_again(job_file, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    words = ["a small red circle on a blue background", "a large green square on a white background"]
    prompts.write_text("\n".join(words))
    file = job_file(prompts={"file": str(prompts)}, metrics=["psnr"])
    run(read_job(file))
    before = painted(out)
    prompts.write_text("\n".join([words[0], "a large yellow triangle on a black background"]))
    run(read_job(file))
    changed = {path.name for path in before if path.read_bytes() != before[path]}
    assert changed == {"0001-0.png"}
    assert "yellow" in (out / "images" / "pixart" / "batch-0000.json").read_text()


def test_another_version_paints_again(done, monkeypatch):
    file, out, found = done
    versions = generate.environment.versions()
    monkeypatch.setattr("dqtk.report.environment.versions", lambda: versions | {"diffusers": "0.0.1"})
    loaded, load = [], generate.load_pipeline
    monkeypatch.setattr(generate, "load_pipeline", lambda model, *a: (loaded.append(model), load(model, *a))[1])
    run(read_job(file))
    assert len(loaded) == 3  # quantized anew, and both painted
    assert numbers(out) == found
    (record, *_) = read_results(out / "results.json")
    assert record.versions["diffusers"] == "0.0.1"


def test_records_say_where_their_pictures_were_painted(job_file, tmp_path):
    """Not where the records were computed: another dtype, and another machine."""
    file, out = job_file(floor="bfloat16", metrics=["psnr", "oracle"]), tmp_path / "out"
    run(read_job(file))
    for manifest in (out / "images" / "pixart-w8a8").glob("batch-*.json"):
        data = json.loads(manifest.read_text())
        data["hardware"] = {"accelerator": "a card of elsewhere"}
        manifest.write_text(json.dumps(data))
    run(read_job(file))
    records = {(r.model, r.name): r for r in read_results(out / "results.json")}
    small, floor, original = (records[model, "oracle_mean"] for model in ("pixart-w8a8", "pixart-bfloat16", "pixart"))
    assert [r.extra["dtype"] for r in (small, floor, original)] == ["float32", "bfloat16", "float32"]
    assert small.hardware == {"accelerator": "a card of elsewhere"}
    assert "processor" in floor.hardware
    plan = json.loads((out / "images" / "pixart-w8a8" / "variant.json").read_text())["plan_hash"]
    assert (small.plan_hash, floor.plan_hash, original.plan_hash) == (plan, None, None)
    assert plan is not None


def test_a_candidate_that_paints_nan_is_not_measured_and_the_others_are(job_file, load_tiny, tmp_path, capsys, monkeypatch):
    broken = load_tiny("pixart")
    with torch.no_grad():
        broken.transformer.proj_out.bias.fill_(torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    file = job_file(candidates={"mine": str(tmp_path / "broken")}, metrics=["psnr", "oracle", "frechet"])
    assert main(["run", str(file), "--fail-if", "psnr < 1"]) == 3
    assert "fail: mine: psnr was not measured" in capsys.readouterr().err
    out = tmp_path / "out"
    said = {r.name: r.not_measured for r in read_results(out / "results.json") if r.model == "mine"}
    assert set(said) == {"psnr@vs_original", "oracle_mean", "oracle_all_correct", "frechet[tiny-clip]@vs_original(paired)"}
    assert all("pictures must be finite" in why for why in said.values())
    assert numbers(out)["pixart-w8a8", "psnr@vs_original"][0] > 30
    assert "not measured of mine: psnr@vs_original" in (out / "report.md").read_text()
    monkeypatch.setattr("dqtk.jobs.generate.load_pipeline", lambda *a: pytest.fail("painted NaN again"))
    run(read_job(file))
    broken.save_pretrained(tmp_path / "worse")
    alone = job_file("alone.yaml", models=[str(tmp_path / "worse")], recipes=[], output=str(tmp_path / "alone"))
    monkeypatch.undo()
    assert main(["run", str(alone)]) == 2
    assert "at least one original must paint pictures, got none: generate: pictures must be finite" in capsys.readouterr().err


# --- several seeds, several processes ----------------------------------------------------------------------------------


def test_images_of_one_prompt_stay_together_in_the_bootstrap(job_file, tmp_path):
    words = ["a small red circle on a blue background", "a large green square on a white background"]
    run(read_job(job_file(prompts=[*words, words[0]], seeds_per_prompt=2, metrics=["ssim"])))
    samples = pandas.read_parquet(tmp_path / "out" / "samples.parquet")
    mine = samples[samples.variant == "pixart-w8a8"]
    values = mine["ssim"].tolist()
    together = paired_bootstrap(values, [0, 0, 1, 1, 0, 0], seed=0)  # the repeated prompt is one prompt
    apart = paired_bootstrap(values, seed=0)
    assert numbers(tmp_path / "out")["pixart-w8a8", "ssim@vs_original"] == (together.estimate, together.low, together.high)
    assert (together.low, together.high) != (apart.low, apart.high)


def test_only_the_first_process_reduces_and_decides(done, monkeypatch, capsys):
    file, _, found = done
    monkeypatch.setattr("dqtk.jobs.run.processes", lambda: Processes(1, 2, torch.device("cpu"), lambda: None))
    monkeypatch.setattr("dqtk.jobs.run.reduce", lambda *a, **k: pytest.fail("reduced"))
    records = run(read_job(file))
    assert {(r.model, r.name): (r.value, r.low, r.high) for r in records} == found
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    assert main(["run", str(file), "--fail-if", "psnr < 99"]) == 0
    assert "fail:" not in capsys.readouterr().err


def test_prompts_are_encoded_once_each_and_kept(job_file, tmp_path, monkeypatch):
    from dqtk.metrics.extractors.clip import OpenClip

    seen, encode = [], OpenClip.encode_texts
    monkeypatch.setattr(OpenClip, "encode_texts", lambda self, texts: (seen.append(list(texts)), encode(self, texts))[1])
    monkeypatch.setattr("dqtk.jobs.features.TEXT_CHUNK", 2)
    words = ["a small red circle on a blue background", "a large green square on a white background", "a", "b"]
    file = job_file(prompts=[*words, words[0]], metrics=["clip_score", "retrieval"])
    run(read_job(file))
    assert sorted(text for chunk in seen for text in chunk) == sorted(words)
    assert [len(chunk) for chunk in seen] == [2, 2]
    found = numbers(tmp_path / "out")
    run(read_job(file))
    assert len(seen) == 2
    assert numbers(tmp_path / "out") == found


def test_processes_wait_for_hours(monkeypatch):
    import accelerate

    said = {}

    class State:
        process_index, num_processes, device = 0, 2, torch.device("cpu")

        def __init__(self, **kwargs):
            said.update(kwargs)

        def wait_for_everyone(self):
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", State)
    assert processes().world == 2
    assert said["timeout"].days >= 7


# --- caches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "oracle", "texts", "features"])
@pytest.mark.parametrize("damage", [b"{", b"[1", b'["x", "y"]', b"[]", b"\xff\xfe"])
def test_a_damaged_cache_file_is_made_again(done, kind, damage):
    file, out, found = done
    for path in (out / "cache" / kind).iterdir():
        path.write_bytes(damage)
    run(read_job(file))
    assert numbers(out) == found


@pytest.mark.parametrize("change", ["version", "identity"])
def test_pair_scores_are_kept_by_the_version_of_their_code_and_the_files_they_read(done, monkeypatch, change):
    file, out, found = done
    known = dict(asked.scores())

    def other(a, b):
        return torch.full((len(a),), 7.0)

    if change == "identity":
        other.identity = "other weights"
    version = "2" if change == "version" else "1"
    psnr = dataclasses.replace(known["psnr"], version=version, load=lambda **options: other)
    monkeypatch.setattr(asked, "scores", lambda: known | {"psnr": psnr})
    run(read_job(file))
    assert numbers(out)["pixart-w8a8", "psnr@vs_original"][0] == 7.0
    assert numbers(out)["pixart-w8a8", "ssim@vs_original"] == found["pixart-w8a8", "ssim@vs_original"]


# --- what may change, and what is refused before a folder is claimed ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipes": ["w8a9"]}, "got 'w8a9'.*Did you mean 'w8a8'"),
        ({"models": ["tiny-pixartt"]}, "got 'tiny-pixartt'.*Did you mean 'tiny-pixart'"),
        ({"candidates": {"mine": "no-where"}}, "MODEL must be .*, got 'no-where'"),
        (
            {"call": {"num_inferance_steps": 2}},
            "job: call must be .*, got 'num_inferance_steps'. Did you mean 'num_inference_steps'",
        ),
        ({"metrics": ["fid"]}, "metrics: name must be one of .*, got 'fid'. Take frechet with the extractor inception2015"),
        ({"extractors": ["tinyclip"]}, "extractor: name must be one of .*, got 'tinyclip'. Did you mean 'tiny-clip'"),
        ({"prompts": "nowhere.txt"}, "prompts: file must exist, got nowhere.txt"),
        ({"references": "nowhere"}, "folder must exist, got nowhere"),
    ],
)
def test_what_is_wrong_claims_no_folder(job_file, tmp_path, capsys, changes, says):
    assert main(["run", str(job_file(**changes))]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dqtk run: error:")]
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


def test_a_gate_of_another_name_is_refused_before_anything_is_painted(job_file, tmp_path, capsys):
    file = job_file()
    for words, says in (
        ("psnrr < 1", "got 'psnrr'. Did you mean 'psnr'"),
        ("lpips > 1", "name must be that of a result, got 'lpips'"),  # not among the metrics
        ("frechet[tiny-clip]@vs_real > 1", "Did you mean 'frechet[tiny-clip]'"),
    ):
        assert main(["run", str(file), "--fail-if", words]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_recipes_and_candidates_on_the_same_pictures(done, job_file, tiny_folders, monkeypatch):
    _, out, found = done
    before, loaded, load = painted(out), [], generate.load_pipeline
    monkeypatch.setattr(generate, "load_pipeline", lambda model, *a: (loaded.append(str(model)), load(model, *a))[1])
    run(read_job(job_file(recipes=["w8a8", "w4a8-rtn"], candidates={"mine": str(tiny_folders["pixart"])})))
    now = numbers(out)
    assert {key: now[key] for key in found} == found
    assert not repainted(out, {**{path: path.read_bytes() for path in painted(out)}, **before})
    assert now["mine", "psnr@vs_original"][0] == 100.0
    assert now["pixart-w4a8-rtn", "psnr@vs_original"][0] < now["pixart-w8a8", "psnr@vs_original"][0]
    assert len(loaded) == 3  # to be quantized, that, and the candidate


def test_a_refusal_names_what_matters_and_nothing_else(job_file, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    job = read_job(job_file())
    (tmp_path / "out" / "job.json").write_text(json.dumps({"hash": job.hash, "job": to_json(job)}))
    assert main(["run", str(job_file(batch_size=3, metrics=["psnr"], recipes=[], name="other"))]) == 2
    assert "got another's (different: batch_size). Choose" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_an_output_that_cannot_be_written_is_named_as_it_was_given(job_file, tiny_folders, tmp_path, capsys, pictures, verb):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "deep" / "out"
    clean = str(pictures("clean", num=1))
    words = {"run": [str(job_file(output=str(output)))], "evaluate": [clean, clean, "--output", str(output)]}[verb]
    assert main([verb, *words]) == 2
    assert f"output {output} must be a folder to write in, got: Not a directory." in capsys.readouterr().err


def test_recipes_that_learn_on_scored_prompts_are_named(job_file, tmp_path):
    run(read_job(job_file(recipes=["w8a8", "w8a8-static"], metrics=["psnr"], extractors=[])))
    said = json.loads((tmp_path / "out" / "results.json").read_text())["warnings"]
    (line,) = [text for text in said if "calibrated on" in text]
    assert line.startswith("w8a8-static: calibrated on the first prompts of this job, which are scored too")
