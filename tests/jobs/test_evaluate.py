"""Two folders of pictures, without any model."""

import html
import importlib
import json
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from dqtk.metrics.bootstrap import paired_bootstrap
from dqtk.pipelines.tiny import extractor_folder
from PIL import Image

from dqtk.cli import main
from dqtk.jobs import asked
from dqtk.jobs.evaluate import evaluate


def by_name(records, model):
    return {record.name: record for record in records if record.model == model}


def test_pairs_and_sets(pictures, tmp_path):
    clean, soft, rough = pictures("clean"), pictures("soft", 6), pictures("rough", 40)
    found = {}
    for folder in (soft, rough):
        records = evaluate(
            clean,
            folder,
            tmp_path / f"out-{folder.name}",
            metrics=["psnr", "ssim", "oracle", "clip_score", "retrieval", "frechet", "kid", "cmmd", "precision", "coverage"],
            extractors=["tiny-clip"],
        )
        found[folder.name] = by_name(records, folder.name)
    for name in ("psnr@vs_original", "ssim@vs_original"):
        assert found["soft"][name].low > found["rough"][name].high
    for name in ("frechet[tiny-clip]@vs_original(paired)", "cmmd[tiny-clip]@vs_original(paired)"):
        assert found["soft"][name].value < found["rough"][name].value
        assert found["soft"][name].extra["comparable"] is False
    assert (
        "covariance is singular" in found["soft"]["frechet[tiny-clip]@vs_original(paired)"].extra["warning"]
    )  # 9 pictures, 128 features
    assert found["soft"]["oracle_all_correct"].value == 1.0
    assert found["soft"]["retrieval[tiny-clip]"].value > 0.7
    samples = pandas.read_parquet(tmp_path / "out-soft" / "samples.parquet")
    assert set(samples["variant"]) == {"clean", "soft"}
    assert samples.groupby("variant").size().to_dict() == {"clean": 9, "soft": 9}
    mean = samples[samples.variant == "soft"]["psnr"].mean()
    assert found["soft"]["psnr@vs_original"].value == pytest.approx(mean)
    stored = json.loads((tmp_path / "out-soft" / "results.json").read_text())
    assert stored["schema_version"] == 1
    assert len(stored["results"]) == len([r for r in stored["results"] if r["num_samples"] == 9])


def test_a_folder_against_itself_is_0_paired_and_not_unpaired(pictures, tmp_path):
    clean = pictures("clean")
    metrics = ["psnr", "frechet", "kid", "cmmd"]
    paired = by_name(evaluate(clean, clean, tmp_path / "p", metrics=metrics, extractors=["tiny-clip"]), "clean (candidate)")
    assert paired["psnr@vs_original"].value == 100.0
    assert paired["psnr@vs_original"].extra["exact_matches"] == 9
    for name, most in (("frechet", 1e-6), ("kid", 1e-12), ("cmmd", 1e-9)):
        assert abs(paired[f"{name}[tiny-clip]@vs_original(paired)"].value) <= most
    other = pictures("other", num=12)  # the same first nine scenes and three more: another set of the same world
    for i in range(9):
        (other / f"{i:04d}-0.png").unlink()
    apart = by_name(evaluate(clean, other, tmp_path / "u", metrics=metrics, extractors=["tiny-clip"], unpaired=True), "other")
    assert apart["frechet[tiny-clip]@vs_real"].value > 1
    assert not any(name.startswith("psnr") for name in apart)


def test_from_the_shell_with_a_gate(pictures, tmp_path, capsys):
    clean, rough = pictures("clean"), pictures("rough", 40)
    words = ["evaluate", str(clean), str(rough), "--output", str(tmp_path / "out")]
    assert main([*words, "--fail-if", "psnr < 10"]) == 0
    printed = capsys.readouterr()
    assert " rough |" in printed.out
    assert main([*words, "--fail-if", "psnr < 60", "--fail-if", "ssim < 0"]) == 3
    assert "fail: rough: psnr value is" in capsys.readouterr().err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "psnr@vs_original" in page
    assert r"\begin{tabular}" in (tmp_path / "out" / "report.tex").read_text()


def test_lossy_files_are_named(pictures, tmp_path):
    clean, lossy = pictures("clean"), pictures("lossy", suffix=".jpg")
    evaluate(clean, lossy, tmp_path / "out", metrics=["psnr"])
    assert "lossy: 9 lossy files, such as 0000-0.jpg" in (tmp_path / "out" / "report.md").read_text()


def test_sizes_that_differ_and_shapes_that_are_squashed_are_named(pictures, tmp_path):
    clean, wide = pictures("clean"), pictures("wide")
    for file in wide.glob("*.png"):
        Image.open(file).resize((96, 64)).save(file)
    evaluate(clean, wide, tmp_path / "out", metrics=["frechet"], extractors=["tiny-clip"], unpaired=True)
    said = (tmp_path / "out" / "report.md").read_text()
    assert "pictures differ in size (wide 96 x 64, references 64 x 64)" in said
    assert "pictures are not square, and extractors crop or squash them (tiny-clip:" in said


@pytest.fixture
def layout_blind(monkeypatch):
    """An extractor with a second feature that keeps places, as the 2015 Inception has, of a network that needs no weights."""

    class Means:
        name, version, source, sha256, preprocess, comparable, dim = "means", "1", "none", "0", "none", False, 3
        config_sha256 = ""
        heads = ("spatial",)

        def encode_images(self, images):
            return images.float().mean((2, 3))

        def encode_all(self, images):
            return SimpleNamespace(spatial=torch.nn.functional.adaptive_avg_pool2d(images.float(), 4)[:, 0].flatten(1))

    monkeypatch.setattr("dqtk.jobs.asked.extractor_for", lambda name, device: Means())


def test_sfid_sees_places_that_the_mean_of_a_picture_does_not(pictures, tmp_path, layout_blind):
    clean, turned = pictures("clean", num=30), pictures("turned", num=30)
    for file in turned.glob("*.png"):
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    records = evaluate(clean, turned, tmp_path / "out", metrics=["frechet", "sfid", "inception_score"], extractors=["means"])
    found = by_name(records, "turned")
    assert found["frechet[means]@vs_original(paired)"].value < 1e-6
    assert found["sfid[means]@vs_original(paired)"].value > 10
    assert found["sfid[means]@vs_original(paired)"].extra["dim"] == 16
    assert "inception_score" not in " ".join(found)
    (missing,) = [record for record in records if record.not_measured]
    assert missing.not_measured == "Inception Score needs logits features of an extractor such as inception2015, got means"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda a, b: (b / "0003-0.png").unlink(), "got 1 without a partner, such as 0003-0"),
        (lambda a, b: (b / "0003-0.png").write_bytes(b"x"), "picture .*0003-0.png must be readable"),
        (
            lambda a, b: (b / "0003-0.png").write_bytes((a / "0003-0.png").read_bytes()[:-40]),
            "picture .*0003-0.png must be readable",
        ),
        (lambda a, b: Image.new("RGB", (32, 64)).save(b / "0003-0.png"), r"0003-0.png must have the size of the others \(64, 64\)"),
    ],
)
def test_spoiled_folders_name_the_file(pictures, tmp_path, spoil, says):
    clean, other = pictures("clean"), pictures("other", 3)
    spoil(clean, other)
    with pytest.raises(ValueError, match=says):
        evaluate(clean, other, tmp_path / "out", metrics=["psnr"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"metrics": ["psnrr"]}, r"metrics: name must be one of .*, got 'psnrr'\. Did you mean 'psnr'\?"),
        ({"metrics": ["frechet"]}, r"metrics: frechet must have an extractor of features, got none\. For example tiny-clip\."),
        ({"metrics": ["frechet"], "extractors": ["resnet"]}, "extractor: name must be one of inception2015"),
    ],
)
def test_wrong_names(pictures, tmp_path, words, says):
    clean = pictures("clean")
    with pytest.raises(ValueError, match=says):
        evaluate(clean, clean, tmp_path / "out", **words)


def test_what_lacks_its_weights_is_not_measured(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    clean = pictures("clean")
    records = evaluate(clean, clean, tmp_path / "out", metrics=["psnr", "lpips", "frechet"], extractors=["inception2015"])
    reasons = {record.name: record.not_measured for record in records if record.not_measured}
    assert set(reasons) == {"lpips@vs_original", "frechet[inception2015]@vs_original(paired)"}
    assert "must be a file" in reasons["lpips@vs_original"]


def test_one_prompt_has_no_retrieval(pictures, tmp_path):
    clean = pictures("clean", num=1)
    records = evaluate(clean, clean, tmp_path / "out", metrics=["clip_score", "retrieval"], extractors=["tiny-clip"])
    assert {r.name: r.not_measured for r in records if r.not_measured} == {
        "retrieval[tiny-clip]": "Retrieval at 1 needs at least 2 different prompts, got 1"
    }


def reasons(records):
    return {record.name: record.not_measured for record in records if record.not_measured}


def run_words(a, b, out, *more):
    return ["evaluate", str(a), str(b), "--output", str(out), *more]


# --- what is not measured is said --------------------------------------------------------------------------------------


def test_sets_without_a_score_of_sets_are_an_error_and_pairs_are_named(pictures, tmp_path, capsys):
    clean, other = pictures("clean"), pictures("other", 3)
    assert main(run_words(clean, other, tmp_path / "out", "--unpaired")) == 2
    assert "metrics must hold a score of sets with --unpaired, got psnr, ssim, ms_ssim, which need pairs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    found = evaluate(clean, other, tmp_path / "out", metrics=["psnr", "frechet"], extractors=["tiny-clip"], unpaired=True)
    assert reasons(found) == {"psnr@vs_original": "it compares pictures of one name, and --unpaired takes the folders for sets"}


def test_text_scores_without_a_text_tower_or_without_prompts_say_so(pictures, tmp_path, layout_blind):
    clean, soft = pictures("clean"), pictures("soft", 6)
    found = evaluate(clean, soft, tmp_path / "a", metrics=["clip_score", "frechet"], extractors=["means"])
    assert reasons(found) == {"clip_score[means]": "CLIP score needs an extractor with a text tower, got means"}


def test_text_scores_where_some_prompts_are_unknown_say_so(pictures, tmp_path):
    clean, soft = pictures("clean"), pictures("soft", 6)
    for folder in (clean, soft):
        rows = (folder / "prompts.jsonl").read_text().splitlines()
        (folder / "prompts.jsonl").write_text("\n".join(rows[:-2]) + "\n")
    found = evaluate(clean, soft, tmp_path / "a", metrics=["clip_score", "psnr"], extractors=["tiny-clip"])
    said = {(r.name, r.model): r.not_measured for r in found if r.not_measured}
    why = "CLIP score needs the prompt of every picture, got none for 2, such as 0007-0"
    assert said == {("clip_score[tiny-clip]", "clean"): why, ("clip_score[tiny-clip]", "soft"): why}


def test_reports_name_what_was_not_measured_what_is_doubtful_and_what_is_not_comparable(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    clean, soft = pictures("clean"), pictures("soft", 6)
    more = ["--metrics", "lpips", "frechet", "--extractors", "tiny-clip", "inception2015"]
    assert main(run_words(clean, soft, tmp_path / "out", *more)) == 0
    printed, said = capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())["warnings"]
    tex, page = (tmp_path / "out" / "report.tex").read_text(), (tmp_path / "out" / "report.html").read_text()
    for words in (
        "not measured: lpips@vs_original: lpips: backbone weights must be a file",
        "not measured: frechet[inception2015]@vs_original(paired): inception2015: weights must be a file",
        "frechet[tiny-clip]@vs_original(paired): 9 features of 128 numbers: their covariance is singular",
        "not comparable with published numbers: frechet[tiny-clip]@vs_original(paired)",
    ):
        assert words in printed
        assert any(words in line for line in said)
        assert words.replace("_", r"\_") in tex
    assert "| frechet[tiny-clip]@vs_original(paired) \N{DAGGER} |" in printed
    assert r"frechet[tiny-clip]@vs\_original(paired) \textdagger{}" in tex
    assert "covariance is singular" in page


def test_a_missing_extractor_fails_the_gate_with_3(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    clean = pictures("clean")
    more = ["--metrics", "frechet", "--extractors", "inception2015"]
    for name in ("frechet", "frechet[inception2015]", "frechet[inception2015]@vs_original(paired)"):
        assert main(run_words(clean, clean, tmp_path / "out", *more, "--fail-if", f"{name} > 10")) == 3
        assert "was not measured" in capsys.readouterr().err


def test_nothing_against_the_original_is_comparable_with_published_numbers(pictures, tmp_path, monkeypatch, layout_blind):
    made = asked.extractor_for("means", "cpu")
    type(made).comparable = True
    clean, soft = pictures("clean"), pictures("soft", 6)
    shared = {"metrics": ["frechet", "cmmd"], "extractors": ["means"]}
    monkeypatch.setattr(asked, "extractor_for", lambda name, device: made)
    paired = evaluate(clean, soft, tmp_path / "p", **shared)
    assert {r.extra["comparable"] for r in paired} == {False}
    apart = {r.name: r.extra["comparable"] for r in evaluate(clean, soft, tmp_path / "u", **shared, unpaired=True)}
    assert apart == {"frechet[means]@vs_real": True, "cmmd[means]@vs_real": False}


def test_no_flip_in_few_pictures_is_no_certainty(pictures, tmp_path):
    """As in ``compare``: what nine prompts can rule out, and not 0 to 0."""
    found = by_name(evaluate(pictures("clean"), pictures("soft", 2), tmp_path / "out", metrics=["oracle"]), "soft")
    change = found["oracle_all_correct@change"]
    assert (change.extra["right_to_wrong"], change.extra["wrong_to_right"]) == (0, 0)
    assert (change.value, change.high) == (0, pytest.approx(1 - 0.025 ** (1 / 9)))
    assert change.low == -change.high


# --- whose pictures these are ------------------------------------------------------------------------------------------


def test_prompts_and_their_pictures_come_from_a_jobs_manifests(pictures, tmp_path):
    clean, soft = pictures("clean", num=6), pictures("soft", 6, num=6)
    (soft / "prompts.jsonl").unlink()
    rows = [json.loads(line) for line in (clean / "prompts.jsonl").read_text().splitlines()]
    (clean / "prompts.jsonl").unlink()
    rows[3]["prompt"] = rows[0]["prompt"]  # a list may repeat a prompt
    for index, part in enumerate((rows[:3], rows[3:])):
        (clean / f"batch-000{index}.json").write_text(json.dumps({"samples": part}))
    out = tmp_path / "out"
    found = by_name(evaluate(clean, soft, out, metrics=["psnr", "clip_score"], extractors=["tiny-clip"]), "soft")
    assert "clip_score[tiny-clip]@change" in found
    values = pandas.read_parquet(out / "samples.parquet").query("variant == 'soft'").psnr.tolist()
    wanted = paired_bootstrap(values, [0, 1, 2, 0, 4, 5], seed=0)
    assert (found["psnr@vs_original"].low, found["psnr@vs_original"].high) == (wanted.low, wanted.high)


def test_pictures_without_a_prompt_stand_alone(pictures, tmp_path):
    """With some prompts known, the others shared a number with them, and so a draw of the bootstrap."""
    clean, soft = pictures("clean", num=6), pictures("soft", 6, num=6)
    for folder in (clean, soft):
        rows = (folder / "prompts.jsonl").read_text().splitlines()
        (folder / "prompts.jsonl").write_text("\n".join(rows[3:]) + "\n")
    found = by_name(evaluate(clean, soft, tmp_path / "out", metrics=["psnr"]), "soft")["psnr@vs_original"]
    values = pandas.read_parquet(tmp_path / "out" / "samples.parquet").query("variant == 'soft'").psnr.tolist()
    wanted = paired_bootstrap(values, seed=0)
    assert (found.value, found.low, found.high) == (wanted.estimate, wanted.low, wanted.high)


def test_another_evaluations_folder_and_a_folder_of_other_things_are_refused(pictures, tmp_path):
    clean, soft, rough = pictures("clean"), pictures("soft", 6), pictures("rough", 40)
    evaluate(clean, soft, tmp_path / "out", metrics=["psnr"])
    evaluate(clean, soft, tmp_path / "out", metrics=["ssim"])
    with pytest.raises(ValueError, match=r"output .*out must belong to this evaluation, got another's \(different: candidate\)"):
        evaluate(clean, rough, tmp_path / "out", metrics=["psnr"])
    with pytest.raises(ValueError, match=r"output must be a new or empty folder, or this evaluation's own, got .*rough"):
        evaluate(clean, soft, rough, metrics=["psnr"])
    assert not (rough / "results.json").exists()
    (tmp_path / "out" / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation.json must be readable, got a damaged one\. Choose another output"):
        evaluate(clean, soft, tmp_path / "out", metrics=["psnr"])


def other_prompt(folder):
    rows = (folder / "prompts.jsonl").read_text().splitlines()
    (folder / "prompts.jsonl").write_text("\n".join([json.dumps({"id": "0000-0", "prompt": "a dog"}), *rows[1:]]) + "\n")


def save_16_bit(path):
    """An RGB PNG of 16 bits per channel, which Pillow cannot write: the header, one row after another, the end."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * 64) for _ in range(64))
    head = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda b: Image.new("RGB", (64, 64)).save(b / "0003-0.jpg"),
            "names in .*other must differ, got 0003-0.jpg and 0003-0.png",
        ),
        (
            lambda b: (b / "prompts.jsonl").write_text('{"prompt": "x"}\n'),
            r'prompts.jsonl:1 must be {"id": ..., "prompt": ...}, got',
        ),
        (lambda b: (b / "prompts.jsonl").write_text("3\n"), r"prompts.jsonl:1 must be .*, got 3\."),
        (lambda b: (b / "batch-0000.json").write_text("[]"), r"batch-0000.json must be a job's manifest"),
        (other_prompt, "pictures of one name must be of one prompt, got 'a .* and 'a dog' for 0000-0"),
        (lambda b: Image.new("I;16", (64, 64)).save(b / "0003-0.png"), "0003-0.png must be readable, got: 16 bits per channel"),
        (lambda b: save_16_bit(b / "0003-0.png"), "0003-0.png must be readable, got: 16 bits per channel"),
        (
            lambda b: Image.new("RGBA", (64, 64), (0, 0, 0, 9)).save(b / "0003-0.png"),
            "0003-0.png must be readable, got: 4096 transparent pixels",
        ),
        (
            lambda b: Image.new("P", (64, 64)).save(b / "0003-0.png", transparency=0),
            "0003-0.png must be readable, got: 4096 transparent pixels",
        ),
        (lambda b: (b / "0003-0.png").write_bytes(b"x"), r"0003-0.png must be readable, .*\. Replace the file\."),
    ],
)
def test_what_would_be_a_traceback_or_a_silent_conversion(pictures, tmp_path, spoil, says):
    clean, other = pictures("clean"), pictures("other", 3)
    spoil(other)
    with pytest.raises(ValueError, match=says):
        evaluate(clean, other, tmp_path / "out", metrics=["psnr"])


def test_opaque_alpha_grey_and_palettes_lose_nothing(pictures, tmp_path):
    clean, other = pictures("clean"), pictures("other")
    Image.open(other / "0000-0.png").convert("RGBA").save(other / "0000-0.png")
    for folder, mode in ((clean, "RGB"), (other, "L")):
        Image.open(clean / "0001-0.png").convert("L").convert(mode).save(folder / "0001-0.png")
    found = by_name(evaluate(clean, other, tmp_path / "out", metrics=["psnr"]), "other")
    assert found["psnr@vs_original"].extra["exact_matches"] == 9


def test_sizes_are_compared_over_batches(pictures, tmp_path, monkeypatch):
    """One picture of another size in a chunk of its own was equal to all the others there."""
    monkeypatch.setattr("dqtk.jobs.folders.CHUNK", 4)
    clean, other = pictures("clean"), pictures("other", 3)
    Image.new("RGB", (96, 96)).save(other / "0008-0.png")
    with pytest.raises(ValueError, match=r"0008-0.png must have the size of the others \(64, 64\), got \(96, 96\)"):
        evaluate(clean, other, tmp_path / "out", metrics=["frechet"], extractors=["tiny-clip"], unpaired=True)


def test_an_extractor_in_a_folder_with_brackets(pictures, tmp_path):
    folder = tmp_path / "clip [v2]"
    shutil.copytree(extractor_folder("tiny-clip"), folder)
    clean, soft = pictures("clean"), pictures("soft", 6)
    found = evaluate(clean, soft, tmp_path / "out", metrics=["clip_score", "cmmd"], extractors=[f"open_clip:{folder}"])
    assert f"clip_score[open_clip:{folder}]@change" in {record.name for record in found}


def test_a_negative_seed(pictures, tmp_path):
    with pytest.raises(ValueError, match="evaluate: seed must be 0 or more, got -1"):
        evaluate(pictures("clean"), tmp_path / "clean", tmp_path / "out", metrics=["psnr"], seed=-1)


def test_short_names_of_gates_without_pairs_and_wrong_ones_at_once(pictures, tmp_path, capsys):
    clean, soft = pictures("clean"), pictures("soft", 6)
    more = ["--unpaired", "--metrics", "kid", "psnr", "--extractors", "tiny-clip"]
    assert main(run_words(clean, soft, tmp_path / "out", *more, "--fail-if", "kidd > 9")) == 2
    assert "got 'kidd'. Did you mean 'kid'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(run_words(clean, soft, tmp_path / "out", *more, "--fail-if", "kid > 9")) == 0
    assert main(run_words(clean, soft, tmp_path / "out", *more, "--fail-if", "kid < 9", "--fail-if", "psnr > 0")) == 3
    said = capsys.readouterr().err
    assert "fail: soft: kid value is" in said
    assert "fail: soft: psnr was not measured" in said


def test_samples_are_generated_pictures_and_references_are_counted_beside(pictures, tmp_path):
    few, many = pictures("few", num=3), pictures("many", 4, num=9)
    metrics = ["frechet", "kid", "precision"]
    found = by_name(evaluate(few, many, tmp_path / "out", metrics=metrics, extractors=["tiny-clip"], unpaired=True), "many")
    for record in found.values():
        assert (record.num_samples, record.extra["num_reference"]) == (9, 3)
    assert found["frechet[tiny-clip]@vs_real"].extra["warning"].startswith("9 generated and 3 reference features of 128 numbers")
    assert (
        found["precision[tiny-clip]@vs_real"].not_measured == "Precision, k = 3 needs at least 4 pictures, got 9 and 3 references"
    )


def test_equal_pictures_are_called_identical_and_their_cap_is_said(pictures, tmp_path):
    clean, other = pictures("clean"), pictures("other", 3)
    evaluate(clean, clean, tmp_path / "same", metrics=["psnr", "ssim"])
    head, rule, *rows = [line for line in (tmp_path / "same" / "report.md").read_text().splitlines() if line.startswith("|")]
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    column = [cell.strip() for cell in head.split("|")].index("clean (candidate)")
    assert [line.split("|")[column].strip() for line in rows] == ["\N{EN DASH}", "identical", "1.0000 (1.0000 to 1.0000)"]
    (other / "0002-0.png").write_bytes((clean / "0002-0.png").read_bytes())
    evaluate(clean, other, tmp_path / "out", metrics=["psnr"])
    words = "other: psnr@vs_original: 1 of 9 pictures equals the original's and counts as 100 dB"
    for name in ("report.md", "report.html"):
        assert words in html.unescape((tmp_path / "out" / name).read_text()), name


def test_the_metric_of_ones_own_in_the_docs_runs(pictures, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text(encoding="utf-8")
    (tmp_path / "brightness.py").write_text(text.split("## A metric of your own")[1].split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    (score,) = importlib.import_module("brightness").SCORES
    known = asked.scores()
    monkeypatch.setattr(asked, "scores", lambda: known | {score.name: score})
    clean, lighter = pictures("clean", num=2), pictures("lighter", num=2)
    for file in lighter.glob("*.png"):
        Image.fromarray((np.asarray(Image.open(file)) // 2 + 40).astype(np.uint8)).save(file)
    (record,) = evaluate(clean, lighter, tmp_path / "out", metrics=["brightness"])
    wanted = [
        abs(np.asarray(Image.open(lighter / name)).mean() - np.asarray(Image.open(clean / name)).mean())
        for name in ("0000-0.png", "0001-0.png")
    ]
    assert record.value == pytest.approx(np.mean(wanted), rel=1e-4)
