"""Pairs of clips: frames before any codec, scores per frame, changes between frames, an oracle of whole clips, the page."""

import copy
import dataclasses
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dqtk.metrics.frame_changes import frame_changes
from dqtk.metrics.psnr import psnr
from dqtk.pipelines.tiny.build_wan import new_wan
from dqtk.pipelines.tiny.motion import judge, render, sample_clip
from dqtk.pipelines.tiny.train_wan_vae import new_wan_vae
from PIL import Image

import dqtk
from dqtk.report.clips import MAX_PAGE
from dqtk.report.compare import compare
from dqtk.report.film import columns_of, frames_of, sheet_of
from dqtk.report.generate import generate, make_tasks
from dqtk.report.page import render_page
from dqtk.report.player import MAX_BYTES, Player, stride_of, thinned
from dqtk.report.scores import mean_over_frames, values_of_frames
from dqtk.resolve import oracle_for

FRAMES, HEIGHT, WIDTH = 5, 12, 20


class Projector:
    """A pipeline without a model: clips are what ``paint(task index, frame index)`` gives, [H, W, 3] in 0..255."""

    def __init__(self, paint, num_frames=FRAMES):
        self.paint, self.num_frames, self.components = paint, num_frames, {}

    def set_progress_bar_config(self, **settings):
        self._progress_bar_config = settings

    def __call__(self, prompt, generator, output_type):
        frames = [[self.paint(i, f) for f in range(self.num_frames)] for i in range(len(prompt))]
        images = [[Image.fromarray(np.asarray(frame, dtype=np.uint8)) for frame in clip] for clip in frames]
        return SimpleNamespace(frames=images)


def noise(i, f, scale=40.0, seed=0):
    return np.clip(128 + scale * np.random.default_rng([seed, i, f]).standard_normal((HEIGHT, WIDTH, 3)), 0, 255).round()


def run(reference, candidate, prompts=("one", "two"), **arguments):
    return compare(reference, candidate, list(prompts), **{"scores": ("psnr", "frame_changes"), "progress": False, **arguments})


@pytest.fixture(scope="module")
def projected():
    """Frame f of the candidate is f + 1 levels brighter; its first clip is the original's."""
    return run(Projector(noise), Projector(lambda i, f: np.clip(noise(i, f) + (i and f + 1), 0, 255)), floor=Projector(noise))


@pytest.mark.parametrize("num", [1, 2, 3, 5, 17])
def test_a_sheet_gives_its_frames_back(num):
    frames = [Image.fromarray(noise(0, f).astype(np.uint8)) for f in range(num)]
    sheet = sheet_of(frames)
    assert sheet.width == columns_of(num) * WIDTH
    assert [frame.tobytes() for frame in frames_of(sheet, num)] == [frame.tobytes() for frame in frames]


def test_a_clip_counts_as_the_mean_over_its_frames(projected):
    equal, other = projected.rows
    assert equal.scores == {"psnr": math.inf, "frame_changes": math.inf}
    wanted = [
        psnr(*(torch.from_numpy(x / 255).permute(2, 0, 1)[None] for x in (np.clip(noise(1, f) + f + 1, 0, 255), noise(1, f))))
        for f in range(FRAMES)
    ]
    assert other.frame_scores["psnr"] == pytest.approx([float(v) for v in wanted], abs=1e-4)
    assert other.scores["psnr"] == pytest.approx(float(np.mean(wanted)), abs=1e-4)
    measure = projected.measure("psnr")
    assert measure.estimate.value == pytest.approx((100 + other.scores["psnr"]) / 2)
    assert (measure.detail["exact_matches"], measure.detail["floor_exact_matches"]) == (1, 2)
    assert measure.detail["worst_frame"] == min(other.frame_scores["psnr"])
    errors = [10 ** (-v / 10) if math.isfinite(v) else 0.0 for row in projected.rows for v in row.frame_scores["psnr"]]
    assert measure.detail["pooled"] == pytest.approx(-10 * math.log10(np.mean(errors)))


def test_a_picture_keeps_its_value_and_a_frame_its_cap():
    assert mean_over_frames([113.1], 100.0) == 113.1
    assert mean_over_frames([113.1, math.inf, 40.0], 100.0) == 80.0
    assert mean_over_frames([math.inf, math.inf], 100.0) == math.inf
    assert mean_over_frames([0.5, 1.0], None) == 0.75


def test_frames_are_scored_some_at_a_time():
    frames, sizes = torch.rand(70, 3, 2, 2), []

    def score(a, b):
        sizes.append(len(a))
        return (a - b).abs().mean((1, 2, 3))

    found = values_of_frames("mad", score, 70, lambda part: (frames[part], torch.zeros_like(frames[part])))
    assert sizes == [32, 32, 6]
    assert found == pytest.approx(frames.mean((1, 2, 3)).tolist())
    with pytest.raises(ValueError, match=r"metrics: mad .* must return one number per picture, a tensor of shape \[32\], got \[\]"):
        values_of_frames("mad", lambda a, b: a.mean(), 70, lambda part: (frames[part], frames[part]))


def test_words_are_of_clips(projected):
    table = projected.table()
    assert "time per clip" in table
    assert "2 clips" in table
    assert "image" not in table
    assert {"seconds_per_clip_reference", "psnr_floor"} <= {record.name for record in projected.records()}
    assert {record.extra["num_frames"] for record in projected.records()} == {FRAMES}
    page = render_page(projected)
    assert "Each clip counts as the mean over its 5 frames" in page
    assert "Score over the frames" in page
    assert page.count('class="player"') == 2
    assert "2 clip pairs from 2 prompts" in page


def test_scores_of_clips_are_not_for_pictures(projected):
    still = run(Projector(noise, 1), Projector(noise, 1))
    assert still.measure("frame_changes").not_measured == "it scores clips, and these are pictures"
    assert still.rows[0].frame_scores == {}
    assert 'class="player"' not in render_page(still)
    default = run(Projector(noise, 1), Projector(noise, 1), scores=("psnr", "ssim", "ms_ssim", "lpips")[:1])
    assert [m.name for m in default.measures if m.name == "frame_changes"] == []


def test_clips_that_do_not_match_are_named():
    says = r"compare: pipelines must make equally many frames of one size, got reference 5 of 20x12, candidate 3 of 20x12\."
    with pytest.raises(ValueError, match=says):
        run(Projector(noise), Projector(noise, 3))
    ragged = Projector(noise)
    ragged.num_frames = 2
    whole = ragged.__call__

    class Ragged(Projector):
        def __call__(self, prompt, generator, output_type):
            made = whole(prompt, generator, output_type)
            return SimpleNamespace(frames=[made.frames[0], made.frames[1][:1]])

    tasks = make_tasks(["a", "b"], 0, 1)
    with pytest.raises(ValueError, match=r"generate: clips must be of one number of frames, got \[1, 2\]\. Pass num_frames\."):
        generate(Ragged(noise), tasks, {})
    with pytest.raises(ValueError, match=r"generate: the pipeline must make pictures here, got clips of 5 frames\."):
        _ = generate(Projector(noise), tasks, {}).images


def test_saved_frames_are_what_was_scored(projected, tmp_path):
    folder = projected.save(tmp_path / "out")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["frame_scores"]["psnr"] == ["inf"] * FRAMES
    files = rows[1]["images"]
    assert files["candidate"][1] == "images/0001-0-01-candidate.png"
    pairs = [[np.asarray(Image.open(folder / files[side][f])) / 255 for side in ("candidate", "reference")] for f in range(FRAMES)]
    again = [10 * math.log10(1 / np.square(a - b).mean()) for a, b in pairs]
    assert rows[1]["frame_scores"]["psnr"] == pytest.approx(again, abs=1e-4)


def test_a_still_error_leaves_changes_as_they_are_and_a_flicker_does_not():
    generator = torch.Generator().manual_seed(0)
    clips = 0.3 + 0.4 * torch.rand(2, 7, 3, 9, 11, generator=generator, dtype=torch.float64)
    still = clips + 0.05 * torch.rand(2, 1, 3, 9, 11, generator=generator, dtype=torch.float64)
    assert (frame_changes(still, clips) > 250).all()  # rounding alone
    noisy = clips + 0.02 * torch.randn(clips.shape, generator=generator, dtype=torch.float64)
    per_frame = psnr(noisy.flatten(0, 1), clips.flatten(0, 1)).view(2, 7).mean(dim=1)
    assert frame_changes(noisy, clips) == pytest.approx(per_frame - 10 * math.log10(2), abs=0.3)
    a, b = noisy.numpy(), clips.numpy()
    by_hand = [np.square((a[i, 1:] - a[i, :-1]) - (b[i, 1:] - b[i, :-1])).mean() for i in range(2)]
    assert frame_changes(noisy, clips).tolist() == pytest.approx([-10 * math.log10(e) for e in by_hand])
    half = frame_changes(noisy.to(torch.bfloat16), clips.to(torch.bfloat16))
    assert half == pytest.approx(frame_changes(noisy, clips), abs=0.5)
    assert frame_changes(clips, clips).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(
    ("shape", "change", "says"),
    [
        ((2, 3, 8, 8), 0, r"the first batch must be clips \[B, F, 3, H, W\] of at least 2 frames, got \[2, 3, 8, 8\]\."),
        ((2, 1, 3, 8, 8), 0, r"of at least 2 frames, got \[2, 1, 3, 8, 8\]"),
        ((2, 4, 3, 8, 8), 1, r"the first batch must be in \[0, 1\], got"),
    ],
)
def test_what_is_no_clip_is_refused(shape, change, says):
    clip = torch.rand(shape) + change
    with pytest.raises(ValueError, match=rf"^frame_changes: .*{says}"):
        frame_changes(clip, clip)
    with pytest.raises(ValueError, match=r"frame_changes: both batches must be of one shape, got \[1, 3, .*\] and \[1, 2, "):
        frame_changes(torch.rand(1, 3, 3, 8, 8), torch.rand(1, 2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"the first batch must be floating point in \[0, 1\], got torch\.uint8\."):
        frame_changes(torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8), torch.rand(1, 3, 3, 8, 8))


def test_wan_is_compared_inside_and_out():
    """A real video pipeline: two denoiser calls a step are one step, both sides are painted alike, the oracle reads whole clips."""
    torch.manual_seed(0)
    pipe = new_wan(new_wan_vae())
    captions = [sample_clip(1, i, "heldout").caption for i in range(2)]
    oracle = oracle_for(pipe, captions)
    clip = render(sample_clip(1, 0, "heldout"), 1, 0)
    assert oracle(clip, captions[0]).mean == judge(clip, captions[0]).mean > 0.9
    assert oracle_for(pipe, ["a cat"]) is None
    noisy = copy.deepcopy(pipe)
    with torch.no_grad():
        for p in noisy.transformer.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape) if p.ndim == 2 else 0
    how = {"num_inference_steps": 2, "num_frames": 5, "guidance_scale": 3.0}
    found = compare(pipe, noisy, captions, call_kwargs=how, scores=("psnr",), num_trajectory=1, oracle=oracle, progress=False)
    assert [row.num_frames for row in found.rows] == [5, 5]
    own, same = found.curves
    assert len(own.sqnr_db) == 2
    assert own.sqnr_db[0] == pytest.approx(same.sqnr_db[0], abs=1e-5)
    assert own.sqnr_db[1] < own.sqnr_db[0] < 60
    assert 0 <= found.measure("oracle_reference").estimate.value < 0.7
    same = compare(pipe, pipe, captions[:1], call_kwargs=how, scores=("psnr",), num_trajectory=0, progress=False)
    assert same.measure("psnr").identical


def test_long_clips_are_thinned_and_pages_have_an_end(projected):
    assert stride_of(MAX_BYTES, 17) == 1
    assert stride_of(MAX_BYTES + 1, 17) == 2
    assert stride_of(10**12, 17) == 8
    assert stride_of(10**12, 2) == 1
    sheet = projected.rows[1].images["candidate"]
    thin, num = thinned(sheet, FRAMES, 2)
    assert num == 3
    with Image.open(io.BytesIO(thin)) as image, Image.open(io.BytesIO(sheet)) as whole:
        assert frames_of(image, 3)[1].tobytes() == frames_of(whole, FRAMES)[2].tobytes()
    padded = sheet + bytes(MAX_PAGE // 8)  # what stands behind a PNG's end is ignored
    rows = tuple(dataclasses.replace(projected.rows[1], images=projected.rows[1].images | {"candidate": padded}) for _ in range(30))
    page = render_page(dataclasses.replace(projected, rows=rows))
    assert 0 < page.count('class="player"') < 30
    assert "shown in some of their frames" in page


def test_the_player_of_a_notebook_stands_alone():
    before, after = ([Image.fromarray(noise(i, f).astype(np.uint8)) for f in range(3)] for i in range(2))
    shown = Player(before, after, "16 bits", "<4> bits")._repr_html_()
    assert "&lt;4&gt; bits" in shown
    assert shown.count("data:image/png;base64,") == 2
    assert "http" not in shown
    with pytest.raises(ValueError, match=r"Player: clips must be equally long and of one size, got 3 and 2 frames"):
        Player(before, after[:2])._repr_html_()


def test_pictures_are_not_compared_with_clips(load_tiny):
    with pytest.raises(ValueError, match="must make pictures, or both clips, got PixArtSigmaPipeline and WanPipeline"):
        compare(load_tiny("pixart"), dqtk.load("tiny-wan"), ["a"], progress=False)
