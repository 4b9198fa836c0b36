"""The world in motion: deterministic clips, held-out combinations apart, and an oracle that sees what moves and how."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from dqtk.metrics.vbench.suite import DIMENSIONS, read_suite
from dqtk.pipelines import tiny
from dqtk.pipelines.tiny.motion import (
    FRAMES,
    Moving,
    captions,
    centres,
    is_held_out,
    judge,
    parse_caption,
    render,
    sample_clip,
    suite,
)

CLIP = Moving(shape="circle", colour="red", size="small", direction="right", speed="quickly", background="striped")


@pytest.fixture(scope="module")
def world():
    clips = [sample_clip(11, i, "heldout") for i in range(24)]
    return clips, [render(clip, 11, i) for i, clip in enumerate(clips)]


def mean(frames, clips, name=None):
    verdicts = [judge(each, clip) for each, clip in zip(frames, clips, strict=True)]
    return float(np.mean([v.mean if name is None else v.attributes[name] for v in verdicts]))


def test_captions_are_a_grammar():
    assert CLIP.caption == "a small red circle moving right quickly on a striped background"
    for caption in captions(50, seed=3):
        clip = parse_caption(caption)
        assert clip.caption == caption
        assert is_held_out(clip)
    with pytest.raises(ValueError, match="parse_caption: caption must follow the grammar of"):
        parse_caption("a red circle")


def test_clips_follow_from_seed_and_index():
    """Also those of other days: weights will be trained on these very frames."""
    assert np.array_equal(render(CLIP, 0, 1), render(CLIP, 0, 1))
    assert not np.array_equal(render(CLIP, 0, 1), render(CLIP, 0, 2))
    frames = render(sample_clip(7, 0), 7, 0)
    assert frames.shape == (FRAMES, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert hashlib.sha256(frames.tobytes()).hexdigest()[:16] == "4b66007ea7dfae1e"


def test_ways_lie_inside_and_are_straight():
    for i in range(60):
        clip = sample_clip(5, i)
        places = centres(clip, np.random.default_rng(i))
        steps = np.diff(places, axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to(steps[:1], steps.shape), atol=1e-9)
        assert places.min() > 7
        assert places.max() < 57


def test_clean_clips_are_all_correct(world):
    clips, frames = world
    verdicts = [judge(each, clip) for each, clip in zip(frames, clips, strict=True)]
    assert all(v.all_correct for v in verdicts)
    assert float(np.mean([v.mean for v in verdicts])) > 0.97


def test_the_way_is_read_from_the_order_of_frames(world):
    """Backwards: the other direction, as fast and as smooth. Shuffled: neither direction nor smoothness."""
    clips, frames = world
    backwards = [each[::-1] for each in frames]
    assert mean(backwards, clips, "direction") < 0.02
    assert mean(backwards, clips, "speed") == pytest.approx(mean(frames, clips, "speed"), abs=1e-6)
    assert mean(backwards, clips, "smoothness") > 0.99
    order = np.random.default_rng(0).permutation(FRAMES)
    assert mean([each[order] for each in frames], clips, "smoothness") < 0.4
    still = [np.repeat(each[:1], FRAMES, axis=0) for each in frames]
    assert mean(still, clips, "direction") == pytest.approx(0.25, abs=0.01)


def test_frames_without_an_object_cost(world):
    clips, frames = world
    blank = [np.concatenate([each[:8], np.full_like(each[8:], 128)]) for each in frames]
    assert mean(blank, clips, "shape") < 0.55
    assert mean(blank, clips, "smoothness") < 0.55
    empty = [np.full_like(each, 128) for each in frames[:2]]
    assert mean(empty, clips[:2], "direction") == mean(empty, clips[:2], "count") == 0


def test_other_clips_score_lower(world):
    clips, frames = world
    assert mean(frames[1:] + frames[:1], clips) < 0.62
    with pytest.raises(ValueError, match=r"judge: frames must be \[F, 64, 64, 3\], F at least 3, got \[2, 64, 64, 3\]"):
        judge(frames[0][:2], clips[0])


def test_the_suite_is_what_its_function_makes():
    file = Path(tiny.__file__).parent / "motion_suite.json"
    rows = json.loads(file.read_text())
    assert rows == suite(24)
    entries = read_suite(file)
    assert len(entries) == 24
    for entry in entries:
        clip = parse_caption(entry.prompt)
        assert is_held_out(clip)
        assert entry.style == f"a {clip.background} background"
        assert set(entry.dimensions) < set(DIMENSIONS)


def test_the_oracle_of_clips_knows_its_world():
    words = captions(2)
    judge_clips = tiny.oracle_of_clips((64, 64), words)
    assert judge_clips(render(parse_caption(words[0])), words[0]).all_correct
    assert tiny.oracle_of_clips((64, 48), words) is None
    assert tiny.oracle_of_clips((64, 64), [words[0], "a dog"]) is None
