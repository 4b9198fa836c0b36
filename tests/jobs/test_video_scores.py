"""Video scores of clips through evaluations: distances, CLIP of frames, flow, changes between frames; ordered by damage."""

import json

import numpy as np
import pytest
from dqtk.pipelines.tiny.motion import captions, parse_caption, render
from PIL import Image

from dqtk.jobs.evaluate import evaluate

EXTRACTORS = ["tiny-clip", "motion:tiny-clip", "lucas-kanade"]
METRICS = ["psnr", "frame_changes", "frechet", "jedi", "clipsim", "clip_temp", "flow_score", "warp_error"]


def clips(folder, change, num=3):
    """Renders of the world in motion; ``change(frame, index)`` damages them."""
    folder.mkdir()
    lines = []
    for i, caption in enumerate(captions(num, seed=5)):
        for f, frame in enumerate(render(parse_caption(caption), 5, i)[:6]):
            name = f"{i:04d}-0-{f:02d}"
            Image.fromarray(np.clip(change(frame.astype(int), f), 0, 255).astype(np.uint8)).save(folder / f"{name}.png")
            lines.append(json.dumps({"id": name, "clip": f"{i:04d}-0", "prompt": caption}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Records of clips with a still error, with a flickering one of the same size, and as they are: by (damage, name)."""
    top = tmp_path_factory.mktemp("clips")
    clean = clips(top / "clean", lambda frame, f: frame)
    damages = {"same": lambda frame, f: frame, "still": lambda x, f: x * 0.8 + 25, "flicker": lambda x, f: x * 0.8 + 51 * (f % 2)}
    records = {}
    for name, change in damages.items():
        other = clips(top / name, change)
        for record in evaluate(clean, other, top / f"out-{name}", metrics=METRICS, extractors=EXTRACTORS):
            records[name if record.model == name else "clean", record.name] = record
        records[name, "page"] = (top / f"out-{name}" / "report.html").read_text(encoding="utf-8")
    return records


def value(found, damage, name):
    record = found[damage, name]
    assert record.value is not None, record.not_measured
    return record.value


def test_a_clip_against_itself_is_at_no_distance(found):
    assert found["same", "frame_changes@vs_original"].extra["exact_matches"] == 3
    for name in ("frechet[motion:tiny-clip]@vs_original(paired)", "jedi[motion:tiny-clip]@vs_original(paired)"):
        assert value(found, "same", name) == pytest.approx(0, abs=1e-6)
    for name in ("clipsim[tiny-clip]@change", "clip_temp[tiny-clip]@change", "flow_score[lucas-kanade]@change"):
        assert value(found, "same", name) == 0


def test_flicker_is_told_from_a_still_error(found):
    still, flicker = (value(found, damage, "frame_changes@vs_original") for damage in ("still", "flicker"))
    assert still > flicker + 10
    assert abs(value(found, "still", "psnr@vs_original") - value(found, "flicker", "psnr@vs_original")) < 4
    temp = {damage: value(found, damage, "clip_temp[tiny-clip]@change") for damage in ("still", "flicker")}
    assert temp["flicker"] < temp["still"] - 0.01
    warp = {damage: value(found, damage, "warp_error[lucas-kanade]") for damage in ("clean", "still", "flicker")}
    assert warp["flicker"] > 5 * max(warp["clean"], warp["still"])
    frechet = {damage: value(found, damage, "frechet[motion:tiny-clip]@vs_original(paired)") for damage in ("still", "flicker")}
    assert frechet["flicker"] > frechet["still"] > 0


def test_the_page_plays_both_sides_of_every_clip(found):
    page = found["flicker", "page"]
    assert page.count('class="player"') == 3
    assert page.count("data:image/png;base64,") == 6
    assert page.count("<canvas") == 9  # both sides and their difference
    assert "flicker: psnr " in page
    assert "Play all" in page


def test_video_files_are_refused(tmp_path):
    """A PSNR of two decoded files would be of their codec too."""
    clean = clips(tmp_path / "clean", lambda frame, f: frame, num=1)
    (clean / "0000-0.MP4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must hold the frames of clips as pictures, got 1 video files, such as 0000-0\.MP4\."):
        evaluate(clean, clean, tmp_path / "out", metrics=["psnr"])


def test_records_say_what_they_are_of(found):
    flow = found["still", "flow_score[lucas-kanade]"]
    assert (flow.higher_is_better, flow.unit, flow.extra["comparable"]) == (None, "px", False)
    fvd = found["still", "frechet[motion:tiny-clip]@vs_original(paired)"]
    assert (fvd.num_samples, fvd.extra["comparable"]) == (3, False)
    assert "covariance is singular" in fvd.extra["warning"]
    assert found["still", "frechet[tiny-clip]@vs_original(paired)"].num_samples == 18  # an extractor of pictures sees frames
