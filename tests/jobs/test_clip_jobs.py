"""Jobs and evaluations of clips: stored frame by frame without loss, scored as clips, the same from any number of processes."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from dqtk.metrics.dynamic_degree import is_dynamic
from dqtk.metrics.extractors.lucas_kanade import LucasKanade
from dqtk.metrics.frame_consistency import consistency
from dqtk.metrics.motion_smoothness import motion_smoothness
from dqtk.metrics.psnr import psnr
from dqtk.metrics.temporal_flickering import steadiness
from dqtk.pipelines.tiny import extractor_folder
from dqtk.pipelines.tiny.motion import captions, judge, parse_caption, render
from PIL import Image

from dqtk.cli import main
from dqtk.jobs import asked
from dqtk.jobs.evaluate import evaluate
from dqtk.jobs.features import read_pictures, score_pairs
from dqtk.jobs.folders import folder_pictures
from dqtk.jobs.gates import parse_gate, tripped
from dqtk.jobs.run import read_results, run
from dqtk.jobs.spec import read_job
from dqtk.jobs.vbench_files import first_still
from dqtk.resolve import extractor_for

CLIP_SCORES = ["subject_consistency", "background_consistency", "dynamic_degree", "temporal_flickering_unfiltered"]
METRICS = ["psnr", "oracle", "clip_score", "overall_consistency", "frechet", *CLIP_SCORES]
EXTRACTORS = ["tiny-clip", "frames:tiny-clip", "lucas-kanade"]


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """An untrained miniature of Wan, saved."""
    from dqtk.pipelines.tiny.build_wan import new_wan
    from dqtk.pipelines.tiny.train_wan_vae import new_wan_vae

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("video") / "wan"
    new_wan(new_wan_vae()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write_job(wan_folder, tmp_path_factory):
    """Function (output, **changes) -> path of a job file."""

    def write(output, **changes):
        job = {
            "name": "clips",
            "models": [str(wan_folder)],
            "recipes": ["w4a8-rtn"],
            "prompts": captions(3, seed=5),
            "call": {"num_inference_steps": 1},
            "metrics": METRICS,
            "extractors": EXTRACTORS,
            "batch_size": 2,
            "fps": 8,
            "output": str(output),
        }
        path = tmp_path_factory.mktemp("job") / "job.yaml"
        path.write_text(yaml.safe_dump(job | changes))
        return path

    return write


@pytest.fixture(scope="module")
def done(write_job, tmp_path_factory):
    """Output folder of a finished job; not to be changed."""
    out = tmp_path_factory.mktemp("done") / "out"
    run(read_job(write_job(out)))
    return out


def numbers(folder):
    found = json.loads((folder / "results.json").read_text())["results"]
    return {(r["model"], r["name"]): (r["value"], r["low"], r["high"]) for r in found}


def frames(folder, name):
    """uint8 [F, 3, H, W] of the stored frames of a clip."""
    files = sorted(folder.glob(f"{name}-*.png"))
    return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)


def test_clips_are_stored_as_lossless_frames_and_noted(done):
    rows = json.loads((done / "images" / "wan" / "batch-0000.json").read_text())["samples"]
    assert [row["id"] for row in rows] == ["0000-0", "0001-0"]
    assert [frame["file"] for frame in rows[0]["frames"]] == [f"0000-0-{i:02d}.png" for i in range(17)]
    samples = pandas.read_parquet(done / "samples.parquet")
    assert samples["frames"].tolist() == [17] * 6
    assert samples["file"][0] == "images/wan/0000-0-00.png"


def test_every_score_is_what_its_function_says_of_the_stored_frames(done):
    samples = pandas.read_parquet(done / "samples.parquet").set_index(["variant", "id"])
    for name, caption in zip(("0000-0", "0002-0"), np.array(captions(3, seed=5))[[0, 2]], strict=True):
        mine, theirs = frames(done / "images" / "wan-w4a8-rtn", name), frames(done / "images" / "wan", name)
        row = samples.loc["wan-w4a8-rtn", name]
        assert row["psnr"] == pytest.approx(float(psnr(mine / 255, theirs / 255).clamp_max(100).mean()))
        assert row["subject_consistency[tiny-clip]"] == pytest.approx(consistency(extractor_for("tiny-clip").encode_images(mine)))
        assert row["dynamic_degree[lucas-kanade]"] == float(is_dynamic(mine, 8, LucasKanade()))
        assert row["temporal_flickering_unfiltered"] == pytest.approx(steadiness(mine))
        verdict = judge(mine.permute(0, 2, 3, 1).numpy(), str(caption))
        assert row["oracle_mean"] == pytest.approx(verdict.mean)
        clip = extractor_for("frames:tiny-clip")
        cosine = torch.cosine_similarity(clip.encode_clips(mine[None]), clip.encode_texts([str(caption)]))
        assert row["overall_consistency[frames:tiny-clip]"] == pytest.approx(float(cosine), abs=1e-6)
        each = torch.cosine_similarity(extractor_for("tiny-clip").encode_images(mine), clip.encode_texts([str(caption)]))
        assert row["clip_score[tiny-clip]"] == pytest.approx(100 * float(each.clamp_min(0).mean()), abs=1e-4)


def test_records_are_named_paired_and_stamped(done):
    records = {(r.model, r.name): r for r in read_results(done / "results.json")}
    for name in ("subject_consistency[tiny-clip]", "dynamic_degree[lucas-kanade]"):
        assert records["wan-w4a8-rtn", name].extra["comparable"] is False
        change = records["wan-w4a8-rtn", f"{name}@change"]
        assert change.low <= change.value <= change.high
        assert ("wan", f"{name}@change") not in records
    assert records["wan-w4a8-rtn", "frechet[tiny-clip]@vs_original(paired)"].num_samples == 3 * 17
    assert records["wan-w4a8-rtn", "frechet[frames:tiny-clip]@vs_original(paired)"].num_samples == 3
    assert not any("frechet[lucas-kanade]" in name or "clip_score[lucas-kanade]" in name for _, name in records)
    assert {"right_to_wrong", "wrong_to_right"} <= set(records["wan-w4a8-rtn", "dynamic_degree[lucas-kanade]@change"].extra)
    assert all(r.not_measured is None for r in records.values()), [r for r in records.values() if r.not_measured]


def test_a_finished_job_is_not_made_again_and_a_lost_frame_is(done, write_job, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    with monkeypatch.context() as patch:
        patch.setattr("dqtk.jobs.generate.load_pipeline", lambda *a: pytest.fail("loaded a pipeline"))
        patch.setattr("dqtk.jobs.clip_scores.read_pictures", lambda *a: pytest.fail("read frames"))
        run(read_job(write_job(out)))
    assert numbers(out) == numbers(done)
    (out / "images" / "wan" / "0002-0-16.png").unlink()
    next((out / "cache" / "clips").iterdir()).write_text("{")
    run(read_job(write_job(out)))
    assert numbers(out) == numbers(done)


def test_three_processes_give_the_numbers_of_one(done, write_job, tmp_path, launched):
    launched(3, "run", write_job(tmp_path / "many"))
    assert numbers(tmp_path / "many") == numbers(done)


def test_evaluating_the_folders_of_a_job_gives_its_numbers(done, tmp_path):
    folders = [done / "images" / name for name in ("wan", "wan-w4a8-rtn")]
    metrics = ["psnr", "dynamic_degree", "temporal_flickering_unfiltered", "motion_smoothness"]
    tools = ["lucas-kanade", "warp:lucas-kanade"]
    records = evaluate(*folders, tmp_path / "e", metrics=metrics, extractors=tools, fps=8)
    found = {(r.model, r.name): r.value for r in records}
    wanted = motion_smoothness(frames(folders[0], "0001-0"), None, extractor_for("warp:lucas-kanade"))
    samples = pandas.read_parquet(tmp_path / "e" / "samples.parquet").set_index(["variant", "id"])
    assert samples.loc["wan", "0001-0"]["motion_smoothness[warp:lucas-kanade]"] == pytest.approx(wanted)
    for name in ("psnr@vs_original", "dynamic_degree[lucas-kanade]@change", "temporal_flickering_unfiltered"):
        assert found["wan-w4a8-rtn", name] == pytest.approx(numbers(done)["wan-w4a8-rtn", name][0])


def test_models_of_clips_beside_models_of_pictures_are_refused_before_painting(
    write_job, wan_folder, tiny_folders, tmp_path, monkeypatch
):
    pixart, out = str(tiny_folders["pixart"]), tmp_path / "out"
    says = rf"job: models must all make clips, or all pictures, got clips from {wan_folder} and pictures from {pixart}\."
    with monkeypatch.context() as patch:
        patch.setattr("dqtk.jobs.generate.load_pipeline", lambda *a: pytest.fail("loaded a pipeline"))
        for changes in ({"models": [str(wan_folder), pixart]}, {"models": [pixart], "candidates": {"mine": str(wan_folder)}}):
            with pytest.raises(ValueError, match=says):
                run(read_job(write_job(out, **changes)))
    assert not out.exists()


def test_a_mix_that_only_its_samples_show_is_refused_too(write_job, wan_folder, tiny_folders, tmp_path, monkeypatch):
    """As of pipelines of somebody's own, whose class says nothing."""
    monkeypatch.setattr("dqtk.jobs.generate.pipeline_class", lambda model: None)
    changes = {"models": [str(tiny_folders["pixart"]), str(wan_folder)], "prompts": captions(1, seed=5), "recipes": []}
    with pytest.raises(ValueError, match="got clips from wan and pictures from pixart"):
        run(read_job(write_job(tmp_path / "out", metrics=["psnr"], extractors=[], **changes)))


def test_a_clip_of_one_frame_is_a_picture():
    from diffusers import WanPipeline

    from dqtk.jobs.generate import _num_frames

    assert [_num_frames(WanPipeline, call) for call in ({}, {"num_frames": 1})] == [81, 1]


# --- folders of clips ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path):
    """Function (name, change of the frames) -> folder of 3 rendered clips as ``dqtk generate`` writes them."""

    def make(name, change=lambda x: x, suffix=".png"):
        folder, lines = tmp_path / name, []
        folder.mkdir()
        for i, caption in enumerate(captions(3, seed=11)):
            for number, frame in enumerate(change(render(parse_caption(caption), 11, i))):
                own = f"{i:04d}-0-{number:02d}"
                Image.fromarray(frame).save(folder / f"{own}{suffix}")
                lines.append(json.dumps({"id": own, "clip": f"{i:04d}-0", "prompt": caption, "seed": i}))
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        return folder

    return make


def reasons(records):
    return {record.name: record.not_measured for record in records if record.not_measured is not None}


def test_what_clips_lack_is_said(clips, pictures, tmp_path):
    clean = clips("clean")
    metrics = ["dynamic_degree", "appearance_style", "motion_smoothness", "aesthetic_quality", "overall_consistency"]
    said = reasons(evaluate(clean, clean, tmp_path / "a", metrics=metrics, extractors=["tiny-clip", "lucas-kanade"]))
    assert said == {
        "dynamic_degree[lucas-kanade]": "Dynamic degree needs the frame rate that the clips are made for, got none; set fps, --fps",
        "appearance_style[tiny-clip]": "Appearance style needs the style of every clip, got none for 3, such as 0000-0",
        "motion_smoothness": "Motion smoothness needs an interpolator of frames, such as warp:lucas-kanade, "
        "got tiny-clip, lucas-kanade",
        "aesthetic_quality": "Aesthetic quality needs an aesthetic head, such as tiny-aesthetic, got tiny-clip, lucas-kanade",
        "overall_consistency[tiny-clip]": "Overall consistency needs an extractor of clips, got tiny-clip, lucas-kanade",
        "overall_consistency[lucas-kanade]": "Overall consistency needs an extractor of clips, got tiny-clip, lucas-kanade",
    }
    still = pictures("still")
    metrics = ["subject_consistency", "overall_consistency"]
    said = reasons(evaluate(still, still, tmp_path / "b", metrics=metrics, extractors=["tiny-clip", "frames:tiny-clip"]))
    assert said == {
        "subject_consistency[tiny-clip]": "Subject consistency needs clips, got pictures",
        "overall_consistency[frames:tiny-clip]": "Overall consistency by frames:tiny-clip needs clips, got pictures",
    }


def test_distances_by_extractors_of_clips_say_why_pictures_have_none(pictures, tmp_path):
    clean, noisy, tools = pictures("clean"), pictures("noisy", noise=40), ["tiny-clip", "motion:tiny-clip"]
    gates = [parse_gate("frechet[motion:tiny-clip] > 1")]
    records = evaluate(clean, noisy, tmp_path / "a", metrics=["frechet"], extractors=tools, gates=gates)
    (by_clips,) = (r for r in records if r.not_measured is not None)
    assert by_clips.name == "frechet[motion:tiny-clip]@vs_original(paired)"
    assert by_clips.not_measured == "Fr\u00e9chet distance by motion:tiny-clip needs clips, got pictures"
    assert {r.name for r in records if r.value is not None} == {"frechet[tiny-clip]@vs_original(paired)"}
    assert "was not measured" in tripped(gates, records, ["noisy"])[0]
    said = reasons(evaluate(clean, noisy, tmp_path / "b", metrics=["frechet"], extractors=tools, unpaired=True))
    assert said == {"frechet[motion:tiny-clip]@vs_real": by_clips.not_measured}


def test_clips_against_references_that_are_pictures(done, write_job, pictures, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    changes = {"recipes": [], "metrics": ["frechet"], "references": str(pictures("photos"))}
    records = run(read_job(write_job(out, extractors=["frames:tiny-clip"], **changes)))
    why = "Fr\u00e9chet distance by frames:tiny-clip needs clips, got references that are pictures"
    assert [(r.model, r.name, r.not_measured) for r in records] == [("wan", "frechet[frames:tiny-clip]@vs_real", why)]


def test_missing_weights_are_told_where_they_would_count(clips, tmp_path, monkeypatch):
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    clean = clips("clean")
    metrics = ["dynamic_degree", "imaging_quality", "subject_consistency", "frechet", "aesthetic_quality"]
    records = evaluate(clean, clean, tmp_path / "a", metrics=metrics, extractors=["tiny-clip", "raft", "musiq"], fps=8)
    said = reasons(records)
    assert set(said) == {"dynamic_degree[raft]", "imaging_quality[musiq]", "aesthetic_quality"}
    assert "raft_large_C_T_V1-22a6c225.pth" in said["dynamic_degree[raft]"]
    assert said["aesthetic_quality"].endswith("needs an aesthetic head, such as tiny-aesthetic, got tiny-clip, raft, musiq")
    assert {"frechet[tiny-clip]@vs_original(paired)", "subject_consistency[tiny-clip]"} < {record.name for record in records}
    said = reasons(evaluate(clean, clean, tmp_path / "b", metrics=["frechet"], extractors=["raft"]))
    assert said == {"frechet[raft]@vs_original(paired)": "Fréchet distance needs an extractor of pictures, got raft"}


def test_a_still_clip_and_a_moving_one(clips, tmp_path):
    moving, still = clips("moving"), clips("still", lambda x: np.repeat(x[:1], len(x), axis=0))
    metrics = ["subject_consistency", "temporal_flickering", "dynamic_degree"]
    records = evaluate(moving, still, tmp_path / "out", metrics=metrics, extractors=["tiny-clip", "lucas-kanade"], fps=8)
    found = {(r.model, r.name): r for r in records}
    assert found["still", "subject_consistency[tiny-clip]"].value == pytest.approx(1)
    assert found["moving", "subject_consistency[tiny-clip]"].value < 0.999
    assert found["still", "dynamic_degree[lucas-kanade]@change"].value == -1
    assert found["still", "dynamic_degree[lucas-kanade]@change"].extra["right_to_wrong"] == 3
    assert found["still", "temporal_flickering[lucas-kanade]"].value == 1
    assert found["moving", "temporal_flickering[lucas-kanade]"].not_measured == "Temporal flickering is of none of the 3 clips"
    samples = pandas.read_parquet(tmp_path / "out" / "samples.parquet").set_index("variant")
    assert samples.loc["moving", "temporal_flickering[lucas-kanade]"].isna().all()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda folder: (folder / "0001-0-03.png").unlink(),
            r"must hold every frame that is noted .*, got 1 missing, first 0001-0-03",
        ),
        (
            lambda folder: shutil.copy(folder / "0001-0-03.png", folder / "x.png"),
            "must hold clips only, got 1 other pictures, first x",
        ),
        (
            lambda folder: (folder / "prompts.jsonl").unlink(),
            "both folders must hold clips, or both pictures|must hold pictures of the",
        ),
    ],
)
def test_incomplete_clips_are_refused(clips, tmp_path, spoil, said):
    good, bad = clips("good"), clips("bad")
    spoil(bad)
    with pytest.raises(ValueError, match=said):
        evaluate(good, bad, tmp_path / "out", metrics=["psnr"])


def test_lossy_frames_and_unequal_lengths_are_refused(clips, tmp_path):
    good, lossy, short = clips("good"), clips("lossy", suffix=".jpg"), clips("short", lambda x: x[:9])
    with pytest.raises(ValueError, match=r"frames of clips must be lossless files, got 51 lossy ones, such as .*0000-0-00\.jpg"):
        evaluate(good, lossy, tmp_path / "a", metrics=["psnr"])
    with pytest.raises(ValueError, match="must have one number of frames, got 9 in 0000-0-00 and 17 in 0000-0-00"):
        evaluate(good, short, tmp_path / "b", metrics=["psnr"])
    with pytest.raises(ValueError, match=r"fps must be a positive frame rate, got -1"):
        evaluate(good, good, tmp_path / "c", metrics=["psnr"], fps=-1)


def test_frames_of_long_clips_are_scored_some_at_a_time(pictures, tmp_path):
    mine, theirs = (folder_pictures(pictures(name, noise)) * 8 for name, noise in (("clean", 0), ("noisy", 40)))
    sizes = []

    def score(a, b):
        sizes.append(len(a))
        return psnr(a, b)

    values = score_pairs(tmp_path, "psnr", score, mine, theirs)
    assert sizes == [32, 32, 8]
    wanted = psnr(*(read_pictures(side[:9]).float() / 255 for side in (mine, theirs)))
    assert values == pytest.approx(wanted.tolist() * 8)


def test_long_clips_keep_their_order_in_the_shell(clips, tmp_path, capsys):
    """Frame 100 comes after 99, not after 10: the notes say the order."""
    long = clips("long", lambda x: np.concatenate([x] * 6 + [x[:3]]))
    assert main(["evaluate", str(long), str(long), "--metrics", "psnr", "--fps", "8", "--output", str(tmp_path / "out")]) == 0
    assert "identical" in capsys.readouterr().out
    samples = pandas.read_parquet(tmp_path / "out" / "samples.parquet")
    assert samples["frames"].tolist() == [105] * 6


def test_the_score_of_ones_own_in_the_docs_runs(clips, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "video.md").read_text(encoding="utf-8")
    (tmp_path / "motion_energy.py").write_text(text.split("## A score of your own")[1].split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    (score,) = importlib.import_module("motion_energy").SCORES
    known = asked.scores()
    monkeypatch.setattr(asked, "scores", lambda: known | {score.name: score})
    moving, still = clips("moving"), clips("still", lambda x: np.repeat(x[:1], len(x), axis=0))
    records = {(r.model, r.name): r for r in evaluate(moving, still, tmp_path / "out", metrics=["motion_energy"])}
    energy = records["moving", "motion_energy"].value
    assert energy == pytest.approx(255 * np.mean([1 - steadiness(frames(moving, f"{i:04d}-0")) for i in range(3)]))
    assert records["still", "motion_energy@change"].value == pytest.approx(-energy)
    assert records["still", "motion_energy"].extra["comparable"] is False


# --- suites --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suite_done(write_job, tmp_path_factory):
    """Output folder of a finished job on two prompts of a suite, each of other dimensions."""
    root = tmp_path_factory.mktemp("suite")
    words = captions(3, seed=5)
    style = {"appearance_style": {"appearance_style": "a striped background"}}
    rows = [
        {"prompt_en": words[0], "dimension": ["subject_consistency", "dynamic_degree", "overall_consistency"]},
        {"prompt_en": words[1], "dimension": ["appearance_style", "overall_consistency"], "auxiliary_info": style},
        {"prompt_en": words[2], "dimension": ["scene"]},
        {"prompt_en": words[0], "dimension": ["imaging_quality"]},
    ]
    (root / "suite.json").write_text(json.dumps(rows))
    named = ["subject_consistency", "dynamic_degree", "overall_consistency", "appearance_style", "imaging_quality"]
    prompts = {"suite": str(root / "suite.json"), "dimensions": ["overall_consistency", "imaging_quality"]}
    extractors = ["tiny-clip", "frames:tiny-clip", "lucas-kanade", "immerkaer"]
    changes = {"prompts": prompts, "seeds_per_prompt": 2, "metrics": ["psnr", *named], "extractors": extractors}
    run(read_job(write_job(root / "out", **changes)))
    return root / "out"


def test_scores_are_of_the_prompts_that_the_suite_names(suite_done):
    records = {(r.model, r.name): r for r in read_results(suite_done / "results.json")}
    assert {name: records["wan", name].num_samples for (model, name) in records if model == "wan"} == {
        "subject_consistency[tiny-clip]": 2,
        "dynamic_degree[lucas-kanade]": 2,
        "appearance_style[tiny-clip]": 2,
        "imaging_quality[immerkaer]": 2,
        "overall_consistency[frames:tiny-clip]": 4,
    }
    assert records["wan", "appearance_style[tiny-clip]"].extra["left_out"] == 2
    assert records["wan-w4a8-rtn", "psnr@vs_original"].num_samples == 4
    samples = pandas.read_parquet(suite_done / "samples.parquet")
    assert len(set(samples["prompt"])) == 2  # of the third prompt the job wants no dimension
    first = samples[samples["prompt"] == captions(3, seed=5)[0]]
    assert first["appearance_style[tiny-clip]"].isna().all()
    assert first["imaging_quality[immerkaer]"].notna().all()


def test_the_style_is_the_suites_word(suite_done):
    samples = pandas.read_parquet(suite_done / "samples.parquet").set_index(["variant", "id"])
    encoder = extractor_for("tiny-clip")
    rows, text = (
        encoder.encode_images(frames(suite_done / "images" / "wan", "0001-1")),
        encoder.encode_texts(["a striped background"]),
    )
    wanted = float(torch.cosine_similarity(rows, text).mean())
    assert samples.loc["wan", "0001-1"]["appearance_style[tiny-clip]"] == pytest.approx(wanted, abs=1e-6)


def test_results_lie_there_in_vbenchs_format(suite_done):
    from dqtk.metrics.vbench.changes import paired_changes
    from dqtk.metrics.vbench.results import read_results as read_vbench

    own, other = (read_vbench(suite_done / "vbench" / f"{name}_eval_results.json") for name in ("wan", "wan-w4a8-rtn"))
    names = ["subject_consistency", "dynamic_degree", "appearance_style", "imaging_quality", "overall_consistency"]
    assert sorted(own) == sorted(names)
    words = captions(3, seed=5)
    assert set(own["subject_consistency"].videos) >= {f"{words[0]}-0.mp4", f"{words[0]}-1.mp4"}
    records = {(r.model, r.name): r for r in read_results(suite_done / "results.json")}
    changes = paired_changes(other, own)
    for name, tool in {"subject_consistency": "tiny-clip", "imaging_quality": "immerkaer"}.items():
        assert own[name].score == pytest.approx(records["wan", f"{name}[{tool}]"].value)
        change = records["wan-w4a8-rtn", f"{name}[{tool}]@change"]
        assert changes[name].interval.estimate == pytest.approx(change.value)
        assert changes[name].num_videos == 2
    told = json.loads((suite_done / "vbench" / "wan_dqtk_provenance.json").read_text())
    assert told["tools"]["dynamic_degree"]["name"] == "lucas-kanade"
    assert told["tools"]["dynamic_degree"]["comparable"] is False
    entries = json.loads((suite_done / "vbench" / "wan_full_info.json").read_text())
    assert [len(entry["video_list"]) for entry in entries] == [2, 2]
    assert "appearance_style" not in entries[0]["dimension"]


def test_of_two_extractors_the_published_one_counts_or_none(write_job, tmp_path, suite_done, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(suite_done, out)
    job = json.loads((out / "job.json").read_text())["job"]
    changes = {"prompts": {k: v for k, v in job["prompts"].items() if v}, "seeds_per_prompt": 2, "recipes": []}
    shutil.copytree(extractor_folder("tiny-clip"), tmp_path / "twin")
    changes |= {"metrics": ["subject_consistency"], "extractors": ["tiny-clip", f"open_clip:{tmp_path / 'twin'}"]}
    (out / "vbench" / "wan_eval_results.json").unlink()
    run(read_job(write_job(out, **changes)))
    assert not (out / "vbench" / "wan_eval_results.json").exists()
    monkeypatch.setattr("dqtk.jobs.vbench_files.as_published", lambda score, extractor: extractor.name == "open_clip[twin]")
    run(read_job(write_job(out, **changes)))
    told = json.loads((out / "vbench" / "wan_dqtk_provenance.json").read_text())
    assert told["tools"]["subject_consistency"]["name"] == "open_clip[twin]"
    assert told["left_out"] == {}


def test_of_still_clips_the_first_five_of_a_prompt_count():
    prompts = ["a"] * 8 + ["b"] * 2
    column = [None, 0.1, 0.2, None, 0.3, 0.4, 0.5, 0.6, None, 0.7]
    assert first_still(prompts, column) == [None, 0.1, 0.2, None, 0.3, 0.4, 0.5, None, None, 0.7]
    mixed = first_still([prompts[i] for i in (8, 0, 1, 9)], [0.1, 0.2, 0.3, 0.4], num=1)
    assert mixed == [0.1, 0.2, None, None]


def test_what_vbench_would_trip_over_is_said(write_job, tmp_path):
    words = captions(3, seed=5)[0]
    prompts = [words, words.upper()]
    changes = {"prompts": prompts, "recipes": [], "metrics": ["subject_consistency"], "extractors": ["tiny-clip"], "fps": 3}
    run(read_job(write_job(tmp_path / "new", **changes)))
    said = json.loads((tmp_path / "new" / "results.json").read_text())["warnings"]
    assert f"videos of {words!r} and {words.upper()!r} have one name where capitals do not count" in said
    assert any(line.startswith("clips of 5.66667 s: VBench measures those of 5 s and more in parts") for line in said)
