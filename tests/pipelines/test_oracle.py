"""The oracle: certain on clean pictures, near chance without information, graded in between, and specific."""

import io
from dataclasses import replace

import numpy as np
import pytest
from dqtk.pipelines.tiny.oracle import judge, read
from dqtk.pipelines.tiny.scenes import Relation, Several, Single, render, sample_scene
from PIL import Image, ImageFilter

NUM = 300


@pytest.fixture(scope="module")
def world():
    scenes = [sample_scene(11, i, "heldout") for i in range(NUM)]
    return scenes, [render(scene, 11, i) for i, scene in enumerate(scenes)]


def scores(pictures, scenes) -> tuple[float, float]:
    """Oracle mean and all-correct rate, both in [0, 1]."""
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return float(np.mean([v.mean for v in verdicts])), float(np.mean([v.all_correct for v in verdicts]))


def blur(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1)))


def jpeg(picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def test_clean_renders_are_all_correct(world):
    scenes, pictures = world
    mean, all_correct = scores(pictures, scenes)
    assert mean > 0.98
    assert all_correct >= 0.99


def test_noise_is_near_chance(world):
    noise = np.random.default_rng(0).integers(0, 256, (NUM, 64, 64, 3), dtype=np.uint8)
    mean, all_correct = scores(noise, world[0])
    assert mean < 0.35
    assert all_correct < 0.02


def test_the_picture_of_another_caption_is_near_chance(world):
    scenes, pictures = world
    mean, all_correct = scores(pictures, scenes[1:] + scenes[:1])
    assert mean < 0.4
    assert all_correct < 0.02


@pytest.mark.parametrize("degrade", [blur, jpeg])
def test_blur_and_jpeg_are_survived(world, degrade):
    scenes, pictures = world
    mean, all_correct = scores([degrade(p) for p in pictures], scenes)
    assert mean >= 0.95
    assert all_correct >= 0.9


def test_the_mean_falls_steadily_with_noise(world):
    scenes, pictures = world[0][:100], np.stack(world[1][:100])
    noise = np.random.default_rng(0).integers(0, 256, pictures.shape)
    means = [scores(np.rint(pictures * (1 - a) + noise * a).astype(np.uint8), scenes)[0] for a in (0, 0.1, 0.2, 0.3, 0.45, 0.6, 1)]
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == len(means)


SINGLE = Single(shape="circle", colour="red", size="medium", position="top left", background="plain gray")
SEVERAL = Several(shape="square", colour="blue", count=2, background="gradient")
RELATION = Relation(
    shape="circle", colour="red", relation="left of", other_shape="square", other_colour="cyan", background="plain white"
)


@pytest.mark.parametrize(
    ("asked", "change", "wrong"),
    [
        (SINGLE, {"colour": "green"}, {"colour"}),
        (SINGLE, {"shape": "triangle"}, {"shape"}),
        (SINGLE, {"shape": "digit 7"}, {"shape"}),
        (SINGLE, {"size": "large"}, {"size"}),
        (SINGLE, {"position": "bottom right"}, {"position"}),
        (SINGLE, {"background": "striped"}, {"background"}),
        (SEVERAL, {"count": 3}, {"count"}),
        (SEVERAL, {"colour": "yellow"}, {"colour"}),
        (SEVERAL, {"shape": "cross"}, {"shape"}),
        (RELATION, {"relation": "right of"}, {"relation"}),
        (RELATION, {"relation": "above"}, {"relation"}),
        (RELATION, {"other_colour": "purple"}, {"other colour"}),
        (RELATION, {"other_shape": "triangle"}, {"other shape"}),
        (RELATION, {"colour": "green", "background": "plain black"}, {"colour", "background"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, dict | set) else type(value).__name__,
)
def test_a_wrong_attribute_costs_that_attribute_only(asked, change, wrong):
    verdict = judge(render(replace(asked, **change)), asked)
    assert {name for name, ok in verdict.correct.items() if not ok} == wrong
    assert all(p < 0.5 for name, p in verdict.attributes.items() if name in wrong)
    assert all(p > 0.8 for name, p in verdict.attributes.items() if name not in wrong)
    assert not verdict.all_correct


def test_a_verdict_is_a_mean_of_probabilities():
    verdict = judge(render(SINGLE), SINGLE.caption)
    assert set(verdict.attributes) == {"background", "count", "shape", "colour", "size", "position"}
    assert verdict.mean == pytest.approx(np.mean(list(verdict.attributes.values())))
    assert verdict.all_correct
    assert all(0 <= p <= 1 for p in verdict.attributes.values())


def test_half_a_mistake_costs_less_than_a_whole_one():
    picture = render(SINGLE)
    wrong = render(replace(SINGLE, colour="purple"))
    means = [judge(np.rint(picture * (1 - a) + wrong * a).astype(np.uint8), SINGLE).mean for a in (0, 0.35, 0.7, 1)]
    assert means == sorted(means, reverse=True)
    assert means[0] - means[1] < means[0] - means[2]


def test_objects_are_read_from_left_to_right():
    reading = read(Image.fromarray(render(RELATION)))
    assert len(reading.objects) == 2
    left, right = reading.objects
    assert left.centre[0] < right.centre[0]
    assert max(left.colour, key=left.colour.get) == "red"
    assert max(right.shape, key=right.shape.get) == "square"
    assert sum(left.shape.values()) == pytest.approx(1)
    assert max(reading.background, key=reading.background.get) == "plain white"


@pytest.mark.parametrize("kind", [SINGLE, SEVERAL, RELATION])
@pytest.mark.parametrize("tone", [0, 128, 255])
def test_an_empty_picture_is_wrong_but_no_error(kind, tone):
    verdict = judge(np.full((64, 64, 3), tone, dtype=np.uint8), kind)
    assert not verdict.all_correct
    assert verdict.mean < 0.4


@pytest.mark.parametrize(
    "picture", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8)]
)
def test_other_pictures_are_refused_with_a_remedy(picture):
    with pytest.raises(ValueError, match=r"oracle\.read: image must be uint8 RGB 64x64, got .* Resize it first"):
        read(picture)


def test_other_captions_are_refused():
    with pytest.raises(ValueError, match="parse_caption: caption must follow the grammar"):
        judge(render(SINGLE), "a photo of a cat")
