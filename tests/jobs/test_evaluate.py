"""Two folders of pictures, without any model."""

import json
from types import SimpleNamespace

import pandas
import pytest
import torch
from PIL import Image

from dqtk.cli import main
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
    assert "| rough |" in printed.out
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

    monkeypatch.setattr("dqtk.jobs.measure.extractor_for", lambda name, device: Means())


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
