"""CLIP scores: known angles, the three scales, clamping per image, retrieval with ties and repeated prompts, error texts."""

import math

import pytest
import torch
from dqtk.metrics.clip_score import clip_cosine, clip_score, hessel_score, retrieval_at_1


def _at(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees], dtype=torch.float64)


def test_known_angles():
    images, texts = 5 * _at(0, 0, 0, 0, 10), 0.1 * _at(0, 60, 90, 180, 10)
    assert clip_cosine(images, texts).tolist() == pytest.approx([1, 0.5, 0, -1, 1], abs=1e-12)
    assert clip_score(images, texts).tolist() == pytest.approx([100, 50, 0, 0, 100], abs=1e-12)
    assert hessel_score(images, texts).tolist() == pytest.approx([2.5, 1.25, 0, 0, 2.5], abs=1e-12)
    assert clip_cosine(images, texts).dtype == torch.float64


def test_the_clamp_is_per_image_and_so_the_mean_is_not_clamped():
    images, texts = _at(0, 0), _at(60, 120)
    assert float(clip_cosine(images, texts).mean()) == pytest.approx(0, abs=1e-12)
    assert float(clip_score(images, texts).mean()) == pytest.approx(25)


def test_equal_embeddings_never_exceed_one():
    x = torch.randn(200, 77, generator=torch.Generator().manual_seed(0))
    assert float(clip_cosine(x, x).max()) <= 1
    assert float(clip_cosine(x, x).min()) == pytest.approx(1, abs=1e-12)


def test_rows_are_independent_and_narrow_dtypes_hold_what_they_hold():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 16, generator=generator).bfloat16() for _ in range(2))
    assert torch.equal(clip_cosine(x, y), clip_cosine(x.double(), y.double()))
    assert torch.allclose(clip_cosine(x, y)[2:3], clip_cosine(x[2:3], y[2:3]), atol=1e-12)
    assert torch.allclose(clip_cosine(x.T.contiguous().T, y), clip_cosine(x, y), atol=1e-12)


def test_retrieval_is_the_nearest_text():
    assert retrieval_at_1(_at(5, 85, 50), _at(0, 90, 180)).tolist() == [True, True, False]
    assert retrieval_at_1(100 * _at(5, 85), torch.tensor([[1.0, 0.0], [0.0, 1e-3]]).double()).tolist() == [True, True]


def test_retrieval_with_several_images_of_a_prompt():
    assert retrieval_at_1(_at(5, 20, 80, 10), _at(0, 0, 0, 90)).tolist() == [True, True, False, False]
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(30, 64, generator=generator)
    images = texts.repeat(50, 1) + 0.1 * torch.randn(1500, 64, generator=generator)
    assert retrieval_at_1(images, texts.repeat(50, 1)).all()


def test_retrieval_does_not_depend_on_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(40, 8, generator=generator)
    images = texts + torch.randn(40, 8, generator=generator)
    whole = retrieval_at_1(images, texts)
    assert 0 < int(whole.sum()) < 40
    nearest = (torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T).argmax(dim=1)
    assert whole.tolist() == (nearest == torch.arange(40)).tolist()
    monkeypatch.setattr("dqtk.metrics.clip_score._BLOCK", 7)
    assert torch.equal(retrieval_at_1(images, texts), whole)


def test_a_model_that_draws_one_picture_finds_one_prompt():
    assert int(retrieval_at_1(_at(*[30] * 8), _at(0, 25, 50, 75, 100, 125, 150, 175)).sum()) == 1


@pytest.mark.parametrize("score", [clip_cosine, clip_score, hessel_score, retrieval_at_1])
def test_errors(score):
    where = "retrieval_at_1" if score is retrieval_at_1 else "clip_cosine"
    with pytest.raises(ValueError, match=rf"^{where}: texts must be one per image \(2\), got 3\. Repeat the prompt for each"):
        score(_at(0, 1), _at(0, 1, 2))
    with pytest.raises(ValueError, match=rf"^{where}: both sets must be of one D, got 2 and 3\. Use one feature extractor"):
        score(_at(0, 1), torch.ones(2, 3))
    with pytest.raises(ValueError, match=rf"^{where}: the first set must be rows other than zero, got 1 zero rows\. Look at those"):
        score(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), _at(0, 1))
    with pytest.raises(ValueError, match=rf"^{where}: the second set must be finite, got 1 rows that are not\."):
        score(_at(0, 1), _at(0, math.nan))
    with pytest.raises(ValueError, match=rf"^{where}: the first set must be features \[N, D\], got \[2\]\."):
        score(_at(0)[0], _at(0))


def test_retrieval_among_equal_texts_means_nothing():
    with pytest.raises(
        ValueError, match=r"^retrieval_at_1: texts must be at least 2 different ones, got 1\. Score several prompts"
    ):
        retrieval_at_1(_at(0, 1), _at(5, 5))
