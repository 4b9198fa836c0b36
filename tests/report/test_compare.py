"""``compare`` on small real pipelines: pairing, ordering, independence of the batch, hooks, error texts."""

import copy
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dqtk.report.compare import compare
from dqtk.report.generate import image_seed
from dqtk.report.measures import score_measures
from dqtk.report.records import read_records
from dqtk.report.scores import ImageScore, capped, one_number, one_per_picture, resolve_scores
from dqtk.report.trajectory import Call, TrajectoryMismatch, same_inputs
from dqtk.report.verdict import verdict

SETTINGS = {"num_inference_steps": 2, "use_resolution_binning": False, "clean_caption": False}
PROMPTS = [
    "a large red circle in the top left on a striped background",
    "two small blue squares on a plain white background",
    "a green cross above a purple triangle on a gradient background",
]


def run(reference, candidate, prompts=PROMPTS, **arguments):
    defaults = {"call_kwargs": SETTINGS, "scores": ("psnr", "ssim", "ms_ssim"), "progress": False}
    return compare(reference, candidate, prompts, **(defaults | {"num_trajectory": 2, "batch_size": 2} | arguments))


def num_hooks(pipe):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())


@pytest.fixture(scope="module")
def compared(pixart, perturbed):
    return run(pixart, perturbed(0.1), floor=copy.deepcopy(pixart).to(torch.bfloat16), reference_name="original")


def test_a_pipeline_equals_itself(pixart):
    found = run(pixart, pixart, floor=pixart)
    assert [row.scores["psnr"] for row in found.rows] == [math.inf] * 3
    assert [row.floor["psnr"] for row in found.rows] == [math.inf] * 3
    psnr = found.measure("psnr")
    assert (psnr.estimate.value, psnr.estimate.low, psnr.detail["exact_matches"]) == (100.0, 100.0, 3)
    assert found.measure("ssim").estimate.value == pytest.approx(1, abs=1e-6)
    assert [curve.sqnr_db for curve in found.curves] == [(math.inf, math.inf)] * 4
    assert [curve.cosine for curve in found.curves] == [(1.0, 1.0)] * 4
    assert "equal to the last bit" in found.table()


def test_the_reference_with_other_kernels_is_a_floor(pixart, perturbed):
    found = run(pixart, perturbed(0.1), floor="kernels", floor_name="other kernels")
    psnr = found.measure("psnr")
    assert psnr.floor.value > psnr.estimate.value + 10
    assert found.measure("sqnr_same").floor.value > 80
    for curve in found.curves:  # float32: 24 bits of mantissa, sums of some hundred terms; infinite if nothing was changed
        assert curve.pipeline != "floor" or all(110 < value < 160 for value in curve.sqnr_db)
    with pytest.raises(ValueError, match="floor: rounding must be one of kernels, threads, got 'more'"):
        run(pixart, pixart, floor="more")


def test_more_noise_is_further_away(pixart, perturbed):
    near, far = (run(pixart, perturbed(amount)) for amount in (0.02, 0.3))
    for name in ("psnr", "ssim", "ms_ssim", "sqnr_own", "sqnr_same"):
        assert near.measure(name).estimate.value > far.measure(name).estimate.value, name


def test_rows_tell_prompt_and_seed_and_the_seed_reproduces_the_image(pixart, compared):
    assert [row.prompt for row in compared.rows] == PROMPTS
    assert [row.id for row in compared.rows] == ["0000-0", "0001-0", "0002-0"]
    row = compared.rows[1]
    assert row.seed == image_seed(0, 1, 0)
    generator = torch.Generator().manual_seed(row.seed)
    image = pixart(row.prompt, generator=generator, **SETTINGS).images[0]
    kept = np.asarray(Image.open(io.BytesIO(row.images["reference"])), dtype=int)
    assert np.abs(kept - np.asarray(image, dtype=int)).max() <= 1  # batched and single matrix products round differently


def test_scores_do_not_depend_on_the_batch_size(pixart, perturbed):
    candidate = perturbed(0.1)
    ones, threes = run(pixart, candidate, batch_size=1), run(pixart, candidate, batch_size=3)
    for a, b in zip(ones.rows, threes.rows, strict=True):
        assert a.seed == b.seed
        assert a.scores["psnr"] == pytest.approx(b.scores["psnr"], abs=0.05)
    for a, b in zip(ones.curves, threes.curves, strict=True):
        assert a.sqnr_db == pytest.approx(b.sqnr_db, abs=0.01)


def test_first_step_has_only_its_own_error_and_later_ones_more(compared):
    own, same = (next(c for c in compared.curves if (c.pipeline, c.kind) == ("candidate", kind)) for kind in ("own", "same"))
    assert own.timesteps == same.timesteps
    assert len(own.timesteps) == 2
    assert own.num_images == 2
    # Both pipelines begin with the same noise and text, so the first step's inputs are equal.
    assert own.sqnr_db[0] == pytest.approx(same.sqnr_db[0], abs=1e-6)
    assert own.sqnr_db[1] < same.sqnr_db[1]


def test_the_floor_in_bf16_is_scored_beside(compared):
    psnr = compared.measure("psnr")
    assert psnr.floor.value > psnr.estimate.value
    assert compared.measure("sqnr_same").floor.value == pytest.approx(42, abs=6)  # bf16: 8 bits of mantissa
    records = {row.name: row for row in compared.records()}
    assert set(records) >= {"psnr", "psnr_floor", "sqnr_own_floor"}
    assert (records["psnr"].extra["dtype"], records["psnr_floor"].extra["dtype"]) == ("float32", "bfloat16")


def test_replay_keeps_timesteps_out_of_the_cast(pixart):
    """999 is 1000 in bf16: a cast timestep would show as an error far above bf16's."""
    half = copy.deepcopy(pixart).to(torch.bfloat16)
    found = run(pixart, half, prompts=PROMPTS[:1])
    assert found.measure("sqnr_same").estimate.value > 36


def test_seeds_per_prompt_are_different_pictures_of_one_prompt(pixart):
    found = run(pixart, pixart, prompts=PROMPTS[:1], seeds_per_prompt=2, num_trajectory=0)
    assert [row.id for row in found.rows] == ["0000-0", "0000-1"]
    assert found.rows[0].images["reference"] != found.rows[1].images["reference"]
    assert found.measure("psnr").estimate.low is None  # one prompt: no interval over prompts
    assert found.measure("sqnr_own").not_measured.startswith("no denoiser calls were recorded")
    assert found.curves == ()


def test_another_seed_gives_other_noise():
    assert len({image_seed(s, i, r) for s in range(5) for i in range(5) for r in range(5)}) == 125


def test_oracle_and_flips(pixart):
    seen = []

    @dataclasses.dataclass
    class Verdict:
        mean: float
        all_correct: bool

    def oracle(image, prompt):
        seen.append((image.size, prompt))
        candidate = len(seen) % 2 == 0
        return Verdict(mean=0.25 if candidate else 0.75, all_correct=not candidate)

    found = run(pixart, pixart, oracle=oracle, num_trajectory=0, batch_size=1)
    assert seen[0] == ((64, 64), PROMPTS[0])
    assert found.measure("oracle_change").estimate.value == -0.5
    assert found.measure("all_correct_change").detail == {"right_to_wrong": 3, "wrong_to_right": 0, "mcnemar_p": 0.25}
    number = run(pixart, pixart, prompts=PROMPTS[:1], oracle=lambda image, prompt: 0.5, num_trajectory=0)
    assert number.measure("oracle_reference").estimate.value == 0.5
    assert not any(m.name.startswith("all_correct") for m in number.measures)


def test_own_scores_and_missing_lpips(pixart, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def difference(a, b):
        return (a - b).abs().mean(dim=(1, 2, 3))

    brightness = ImageScore(name="brightness", label="Brightness", unit="", higher_is_better=False, function=difference)
    found = run(pixart, pixart, prompts=PROMPTS[:1], scores=(brightness, "lpips"), num_trajectory=0)
    assert found.rows[0].scores == {"brightness": 0.0}
    lpips = found.measure("lpips")
    assert lpips.estimate is None
    assert "Download https://" in lpips.not_measured
    assert next(r for r in found.records() if r.name == "lpips").value is None


def test_hooks_and_progress_bar_are_put_back(pixart, perturbed):
    candidate = perturbed(0.1)
    candidate.set_progress_bar_config(desc="mine")
    run(pixart, candidate, prompts=PROMPTS[:1])
    assert num_hooks(pixart) == num_hooks(candidate) == 0
    assert candidate._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize("when", ["denoiser", "decoder"])
def test_hooks_are_removed_when_generation_fails(pixart, when, monkeypatch):
    failing = copy.copy(pixart)
    module = pixart.transformer if when == "denoiser" else pixart.vae.decoder

    def fail(*args, **kwargs):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(module, "forward", fail)
    before = vars(pixart).get("_progress_bar_config")
    with pytest.raises(RuntimeError, match="out of paper"):
        run(failing, pixart, prompts=PROMPTS[:1])
    assert num_hooks(pixart) == 0
    assert vars(pixart).get("_progress_bar_config") == before


def test_torchs_global_generator_is_left_alone(pixart):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(pixart, pixart, prompts=PROMPTS[:1])
    assert torch.equal(before, torch.get_rng_state())


def test_different_numbers_of_steps_are_reported_and_not_invented(pixart):
    class OneStepMore(type(pixart)):
        def __call__(self, prompt, num_inference_steps, **kwargs):
            return super().__call__(prompt, num_inference_steps=num_inference_steps + 1, **kwargs)

    found = run(pixart, OneStepMore(**pixart.components), prompts=PROMPTS[:1])
    own = found.measure("sqnr_own")
    assert own.estimate is None
    assert own.not_measured.startswith("the reference made 2 denoiser calls and the candidate 3")
    assert found.measure("sqnr_same").estimate.value == 100.0  # the same weights on the same inputs


def test_saved_files_hold_the_numbers_and_nothing_is_overwritten(compared, tmp_path):
    folder = compared.save(tmp_path / "out")
    assert read_records(folder / "records.jsonl") == compared.records()
    assert len((folder / "rows.jsonl").read_text().splitlines()) == 3
    assert (folder / "images" / "0001-0-candidate.png").read_bytes() == compared.rows[1].images["candidate"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(
        ValueError, match=r"Comparison\.save: folder must be new or empty, got .*out'\. Choose another, or remove it\."
    ):
        compared.save(folder)


def test_times_are_medians_per_image_of_interleaved_batches(pixart):
    found = run(pixart, pixart, num_trajectory=0, batch_size=1, floor=None)
    assert found.timing.num_batches == 2  # the first of three is warm-up
    assert 0 < found.timing.candidate < 60
    assert "first batch" in found.timing.note
    for num_trajectory in (0, 8):  # one warm-up batch, hooked or not: the batch is made again for its time
        alone = run(pixart, pixart, prompts=PROMPTS[:1], num_trajectory=num_trajectory, floor=None)
        assert alone.timing.num_batches == 2
        assert len(alone.rows) == 1


@pytest.mark.parametrize(
    ("prompts", "changes", "words"),
    [
        ([], {}, r"prompts must hold at least one prompt, got none\. Pass --prompts or prompts=\[\.\.\.\]\."),
        ("a cat", {}, r"prompts must be a list of texts, got one text 'a cat'\."),
        (["a cat", " "], {}, r"prompts must be non-empty texts, got ' ' at index 1\."),
        (["a"], {"batch_size": 0}, r"batch_size must be at least 1, got 0\."),
        (["a"], {"seeds_per_prompt": 0}, r"seeds_per_prompt must be at least 1, got 0\."),
        (["a"], {"num_trajectory": -1}, r"num_trajectory must be at least 0, got -1\."),
        (["a"], {"call_kwargs": {"generator": None}}, r"call_kwargs must be free of .*, got \['generator'\]\."),
        (["a"], {"call_kwargs": {"output_type": "latent"}}, r"output_type must be an image type, got 'latent'\."),
        (
            ["a"],
            {"scores": ("fid",)},
            r"scores must be among \['frame_changes', 'lpips', 'ms_ssim', 'psnr', 'ssim'\] or ImageScore objects, got 'fid'\.",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_runs(prompts, changes, words):
    with pytest.raises(ValueError, match=f"^compare: {words}"):
        run(object(), object(), prompts, **changes)


def test_a_difference_beyond_the_cap_is_not_worse_than_none():
    score = resolve_scores(("psnr",))[0][0]
    assert capped([113.1, math.inf, 40.0], score.cap) == [100.0, 100.0, 40.0]


def test_closeness_to_the_floor_is_judged_pair_by_pair(made_up, row):
    """Prompts differ by far more than candidate and floor do: only the paired difference shows that each is 3 dB worse."""
    values = [float(v) for v in range(20, 60, 4)]
    rows = tuple(dataclasses.replace(row(i, v), floor={"psnr": v + 3}) for i, v in enumerate(values))
    scores, _ = resolve_scores(("psnr",))
    (measure, *_) = score_measures(rows, scores, {}, 0)
    assert measure.estimate.high > measure.floor.value
    assert measure.detail["beyond_floor"] == {"value": pytest.approx(3), "low": pytest.approx(3), "high": pytest.approx(3)}
    assert "no further away" not in verdict(made_up(measures=(measure,), rows=rows))


def test_no_flip_in_few_pictures_is_no_certainty(row):
    rows = [row(i, 30.0) for i in range(24)]
    change = next(m for m in score_measures(rows, [], {}, 0) if m.name == "all_correct_change")
    assert (change.estimate.value, change.estimate.high) == (0, pytest.approx(0.1425, abs=1e-3))  # 1 - 0.025^(1/24)
    assert change.estimate.low == -change.estimate.high


def test_a_model_that_computes_nan_is_named(pixart):
    broken = copy.deepcopy(pixart)
    broken.transformer.proj_out.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"compare: outputs of transformer .* must be finite, got NaN or infinity at timestep"):
        run(pixart, broken)


def test_models_of_another_shape_have_no_steps_in_common(pixart):
    latents = torch.zeros(1, 9, 16, 16)
    call = Call(component="transformer", timestep=1.0, args=(latents,), kwargs={}, output=torch.zeros(1, 4, 16, 16))
    with pytest.raises(TrajectoryMismatch, match="the candidate's transformer does not take the original's inputs"):
        same_inputs(pixart, [call], 1)


def test_the_bound_of_no_flip_counts_prompts_and_not_pictures(row):
    """Four pictures of one prompt are not four tries."""
    rows = [dataclasses.replace(row(i, 30.0), prompt_index=i // 4) for i in range(24)]
    change = next(m for m in score_measures(rows, [], {}, 0) if m.name == "all_correct_change")
    assert change.estimate.high == pytest.approx(1 - 0.025 ** (1 / 6))


def test_a_negative_seed_is_refused_before_anything_is_painted(pixart):
    with pytest.raises(ValueError, match=r"compare: seed must be at least 0, got -1\."):
        run(pixart, pixart, seed=-1)


def test_the_reference_with_other_threads_is_a_floor(pixart):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = run(pixart, pixart, floor="threads")
    finally:
        torch.set_num_threads(before)
    floors = [value for curve in found.curves if curve.pipeline == "floor" for value in curve.sqnr_db]
    assert all(value > 110 for value in floors)
    assert min(floors) < 160


def test_arguments_that_the_pipeline_would_swallow_are_refused(pixart):
    says = r"compare: call_kwargs must be arguments of PixArt.*, got 'guidence_scale'\. Did you mean 'guidance_scale'\?"
    with pytest.raises(ValueError, match=says):
        run(pixart, pixart, call_kwargs={"guidence_scale": 3.0})


@pytest.mark.parametrize(
    ("returned", "got"),
    [(lambda a, b: (a - b).mean(), r"\[\]"), (lambda a, b: 3.0, "float"), (lambda a, b: a, r"\[3, 3, 64, 64\]")],
)
def test_a_score_of_ones_own_that_is_not_per_picture_is_named(returned, got):
    score = ImageScore(name="mine", label="Mine", unit="", higher_is_better=True, function=returned)
    image = torch.zeros(3, 3, 64, 64)
    with pytest.raises(ValueError, match=rf"metrics: mine \(.*test_compare\.py\) must return one number per .* \[3\], got {got}\."):
        one_per_picture(score.name, score.function, score.function(image, image), 3)
    with pytest.raises(ValueError, match=r"metrics: mine \(.*test_compare\.py\) must return one number, got \[2\]"):
        one_number("mine", returned, torch.zeros(2))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def score(:\n", r"metrics.mine\.py:1 must be importable, got SyntaxError: "),
        ("x = 1\nSCORES = (PairScore(name='x'),)\n", r"metrics.mine\.py:2 must be importable, got NameError: name 'PairScore'"),
    ],
)
def test_a_broken_file_of_metrics_is_named(tmp_path, monkeypatch, text, says):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics" / "mine.py").write_text(text)

    def load():
        path = tmp_path / "metrics" / "mine.py"
        exec(compile(path.read_text(), str(path), "exec"), {})

    monkeypatch.setattr("dqtk.report.scores.scores_in_files", load)
    with pytest.raises(ValueError, match=says):
        resolve_scores(("psnr",))
