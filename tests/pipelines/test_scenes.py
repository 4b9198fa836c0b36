"""The captioned world: deterministic, held-out combinations apart, every caption understood."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from dqtk.pipelines.tiny.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    DIGITS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Relation,
    Several,
    Single,
    captions,
    coverage,
    is_held_out,
    parse_caption,
    render,
    sample_scene,
)

# Of render(sample_scene(7, i), 7, i): the first 16 hexadecimal digits of the SHA-256 of its bytes. The shipped weights were trained
# on these very pictures; a change here means that they paint another world.
GOLDEN = (
    ("three small cyan triangles on a gradient background", "044a946525f02fa1"),
    ("a cyan circle right of a green circle on a plain white background", "35f0902da149931c"),
    ("a large yellow square in the bottom left on a striped background", "5a7fd5c368c454b1"),
    ("a yellow cross right of a red circle on a gradient background", "43a6bf9d9b6db77c"),
    ("a medium yellow digit 6 in the bottom left on a plain gray background", "80f695a0d626031a"),
    ("a medium purple circle in the top right on a plain black background", "989cdc5de399bf04"),
)


@pytest.mark.parametrize(("index", "caption", "digest"), [(i, *row) for i, row in enumerate(GOLDEN)])
def test_scene_and_picture_are_golden(index, caption, digest):
    scene = sample_scene(7, index)
    picture = render(scene, 7, index)
    assert scene.caption == caption
    assert picture.shape == (64, 64, 3)
    assert picture.dtype == np.uint8
    assert hashlib.sha256(picture.tobytes()).hexdigest()[:16] == digest


def test_same_seed_same_scene_whatever_was_drawn_before():
    first = [sample_scene(3, i) for i in range(20)]
    np.random.default_rng(0).random(1000)
    assert [sample_scene(3, i) for i in reversed(range(20))] == first[::-1]
    assert [sample_scene(4, i) for i in range(20)] != first


def test_jitter_moves_the_object_not_the_meaning():
    scene = sample_scene(7, 5)
    assert not np.array_equal(render(scene, 0, 0), render(scene, 0, 1))
    assert np.array_equal(render(scene, 0, 1), render(scene, 0, 1))


def test_splits_share_no_combination():
    train = {sample_scene(0, i, "train") for i in range(2000)}
    heldout = {sample_scene(0, i, "heldout") for i in range(2000)}
    assert not train & heldout
    assert not any(map(is_held_out, train))
    assert all(map(is_held_out, heldout))
    assert not {s.caption for s in train} & {s.caption for s in heldout}


def test_one_combination_in_ten_is_held_out():
    scenes = [
        Relation(shape=a, colour=c, relation=r, other_shape=b, other_colour=d, background=g)
        for a in SHAPES
        for b in SHAPES
        for c in COLOURS
        for d in COLOURS
        if c != d
        for r in RELATIONS
        for g in BACKGROUNDS
    ]
    share = sum(map(is_held_out, scenes)) / len(scenes)
    assert 0.08 < share < 0.12


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"sample_scene: split must be 'train' or 'heldout', got 'test'"):
        sample_scene(0, 0, "test")


def test_the_world_is_rich_enough():
    assert len(SHAPES) >= 4
    assert len(DIGITS) == 10
    assert len(COLOURS) >= 6
    assert len(SIZES) >= 3
    assert len(POSITIONS) >= 4
    assert set(RELATIONS) == {"left of", "right of", "above", "below"}
    assert max(COUNTS) == 3
    assert {b.split()[0] for b in BACKGROUNDS} == {"plain", "gradient", "striped"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_value_of_every_attribute_is_drawn(split):
    scenes = [sample_scene(1, i, split) for i in range(3000)]
    singles, several, relations = ([s for s in scenes if isinstance(s, kind)] for kind in (Single, Several, Relation))
    assert {s.shape for s in singles} == set(SHAPES + DIGITS)
    assert {s.size for s in singles} == set(SIZES)
    assert {s.position for s in singles} == set(POSITIONS)
    assert {s.count for s in several} == {2, 3}
    assert {s.relation for s in relations} == set(RELATIONS)
    assert {s.shape for s in relations} == {s.other_shape for s in relations} == set(SHAPES)
    assert {s.colour for s in scenes} == set(COLOURS)
    assert {s.background for s in scenes} == set(BACKGROUNDS)
    assert all(s.colour != s.other_colour for s in relations)
    assert all(s.size != "small" for s in singles if s.shape in DIGITS)


def test_captions_round_trip():
    for split in ("train", "heldout"):
        for i in range(500):
            scene = sample_scene(2, i, split)
            assert parse_caption(scene.caption) == scene


def test_captions_are_held_out_by_default():
    texts = captions(50, seed=9)
    assert texts == [sample_scene(9, i, "heldout").caption for i in range(50)]
    assert all(is_held_out(parse_caption(text)) for text in texts)


@pytest.mark.parametrize("text", ["", "a photo of a cat", "a large red circle in the top left on a striped background."])
def test_other_text_is_refused_with_a_remedy(text):
    with pytest.raises(ValueError, match=r"parse_caption: caption must follow the grammar .* got .*captions\(num\)"):
        parse_caption(text)


@pytest.mark.parametrize("shape", SHAPES + DIGITS)
def test_coverage_is_antialiased_and_inside_its_box(shape):
    alpha = coverage(shape, (30.3, 33.1), 21.0)
    assert alpha.shape == (64, 64)
    assert alpha.min() == 0
    assert alpha.max() == 1
    assert ((alpha > 0) & (alpha < 1)).any()
    rows, cols = np.nonzero(alpha)
    assert abs(rows - 33.1).max() <= 12
    assert abs(cols - 30.3).max() <= 12


def test_an_attribute_changes_the_picture():
    scene = Single(shape="circle", colour="red", size="medium", position="top left", background="plain gray")
    base = render(scene)
    for change in (
        {"shape": "square"},
        {"colour": "blue"},
        {"size": "large"},
        {"position": "top right"},
        {"background": "striped"},
    ):
        assert not np.array_equal(base, render(replace(scene, **change)))
