"""Learned books: optimal where the answer is known, what joint learning is worth, degenerate vectors."""

import pytest
import torch

from dqtk.methods import books
from dqtk.methods.books import fitted, learned_books, sums_of
from dqtk.numerics.vectors import nearest_words, words_of
from dqtk.spec import VectorCodebook


def loss(x, codebook, beam=8):
    return float((words_of(nearest_words(x, codebook, beam=beam)[:, None], codebook) - x).square().mean())


def test_words_in_clear_clusters_are_their_means(seeded):
    centres = 10 * seeded(16, 4, seed=1)
    x = centres.repeat(40, 1) + 0.01 * seeded(640, 4, seed=2)
    found = learned_books(x, VectorCodebook(words=16, length=4))[0]
    distance = torch.cdist(found.float(), centres)
    assert distance.amin(0).amax() < 0.02
    assert sorted(distance.argmin(1).tolist()) == list(range(16))


def test_scalar_words_of_gaussian_numbers_lose_what_lloyd_and_max_say(seeded):
    """Lloyd-Max at 2 bits: 0.1175 (Max 1960)."""
    assert loss(
        seeded(20000, 1, seed=3), learned_books(seeded(20000, 1, seed=4), VectorCodebook(words=4, length=1))
    ) == pytest.approx(0.1175, rel=0.05)


def test_vectors_of_gaussian_numbers_lose_less_than_scalars(seeded):
    """256 words of 4: 0.098 (docs/methods/vector_quantization.md); scalars 0.1175."""
    found = loss(seeded(8000, 4, seed=5), learned_books(seeded(16384, 4, seed=6), VectorCodebook(words=256, length=4)))
    assert found == pytest.approx(0.101, rel=0.04)


def test_learning_books_together_beats_one_after_the_other(seeded, monkeypatch):
    form, x, unseen = VectorCodebook(words=16, length=4, books=3), seeded(1024, 4, seed=7), seeded(2000, 4, seed=8)
    together = loss(unseen, learned_books(x, form))
    monkeypatch.setattr(books, "JOINT", 0)
    assert together < 0.96 * loss(unseen, learned_books(x, form))


def test_what_matters_more_is_nearer(seeded):
    x = torch.cat([seeded(500, 2, seed=9) - 5, seeded(500, 2, seed=10) + 5])
    form, importance = VectorCodebook(words=16, length=2), torch.cat([torch.full((500,), 100.0), torch.ones(500)])
    plain, weighted = learned_books(x, form), learned_books(x, form, importance)
    assert loss(x[:500], weighted) < 0.8 * loss(x[:500], plain)
    assert loss(x[500:], weighted) > loss(x[500:], plain)


def test_the_same_vectors_give_the_same_books(seeded):
    x, form = seeded(300, 4), VectorCodebook(words=16, length=4)
    assert torch.equal(learned_books(x, form), learned_books(x.clone(), form))


def test_words_drawn_many_at_a_time_are_as_good(seeded, monkeypatch):
    form, x = VectorCodebook(words=512, length=3), seeded(8192, 3, seed=3)
    found = learned_books(x, form)
    assert torch.equal(found, learned_books(x.clone(), form))
    monkeypatch.setattr(books, "DRAWS", 512)
    assert loss(x, found) < 1.02 * loss(x, learned_books(x, form))


@pytest.mark.parametrize("x", [torch.zeros(40, 4), torch.ones(1, 4), torch.eye(4).repeat(9, 1)], ids=["zeros", "one", "four"])
def test_fewer_different_vectors_than_words(x):
    for words, num in ((16, 1), (16, 2), (4096, 1)):
        found = learned_books(x, VectorCodebook(words=words, length=4, books=num))
        assert found.isfinite().all()
        assert loss(x, found) < 1e-4


def test_least_squares_equal_the_normal_equations(seeded, monkeypatch):
    """In float64 and without the ridge: gradients of used words vanish, unused words stay."""
    monkeypatch.setattr(books, "RIDGE", 0.0)
    monkeypatch.setattr(books, "STEPS", 60)
    x, start = seeded(200, 8, seed=11), seeded(1, 8, 4, seed=12).half()
    codes = torch.randint(0, 7, (200, 2, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)  # word 7: unused
    root = seeded(8, 8, seed=13)
    gram = root @ root.T + torch.eye(8)
    found = fitted(
        start,
        target=sums_of(x @ gram, codes, 8),
        curvature=lambda b: sums_of(words_of(codes, b) @ gram, codes, 8),
        diagonal=sums_of(gram.diagonal().expand(200, 8), codes, 8),
    )
    place = torch.nn.functional.one_hot(codes[..., 0].long(), 8).double()  # [R, G, W]
    basis = torch.einsum("rgw,de,gh->rgdwe", place, torch.eye(4).double(), torch.eye(1).double())
    basis = basis.flatten(1, 2).flatten(2)  # [R, K, W * D]
    factor = torch.linalg.cholesky(gram.double())
    a, b = (factor.T @ basis).flatten(0, 1)[:, :28], (x.double() @ factor).flatten()
    expected = torch.linalg.lstsq(a, b).solution.view(7, 4)
    torch.testing.assert_close(found[0, :7].double(), expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(found[0, 7], start[0, 7])
