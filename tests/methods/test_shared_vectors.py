"""Books that layers share: what they are learned on, that solvers keep them, and what they are worth against a book each."""

import math
from dataclasses import replace

import pytest
import torch

from dqtk.methods import books as single
from dqtk.methods.books import learned_books
from dqtk.methods.shared_books import SharedVectors
from dqtk.methods.solve import rotation, solve
from dqtk.numerics.packing import Packed, book_shape, dequantize, stored_bytes
from dqtk.spec import GPTQ, RTN, BeamSearch, Hadamard, LayerSpec, PerChannel, PerTensor, TensorSpec, VectorCodebook

FORM = VectorCodebook(words=16, length=4, group="g")


def spec_of(form=FORM, **fields):
    return LayerSpec(weight=TensorSpec(format=form, granularity=PerChannel()), **fields)


def books_on(weights, spec, squares=None):
    vectors = SharedVectors((spec, weight.numel()) for weight in weights)
    for weight in weights:
        vectors.add(weight, spec, weight.shape[1], squares)
    return vectors.books()


def decoded(solution, book, k):
    return dequantize(Packed(**solution.tensors, codebook=book), solution.spec.weight, k)


def test_books_are_those_of_the_vectors_of_all_layers(seeded):
    """Rows in units of their scales; a layer counts by its size, not by that of its numbers."""
    weights = [seeded(8, 16, seed=1), 100 * seeded(24, 16, seed=2)]
    scales = [weight.square().mean(dim=1, keepdim=True).sqrt() for weight in weights]
    vectors = torch.cat([(weight / scale).reshape(-1, 4) for weight, scale in zip(weights, scales, strict=True)])
    counts = torch.cat([(s.square() / s.square().mean()).repeat_interleave(4) for s in scales])
    found = books_on(weights, spec_of())["g"]
    error = lambda book: nearest_error(vectors, book, counts)  # noqa: E731
    assert error(found) < 1.1 * error(learned_books(vectors, FORM, counts))


def nearest_error(vectors, book, counts):
    return float((torch.cdist(vectors, book[0].float()).amin(dim=1).square() * counts).mean())


def test_rotated_layers_share_in_their_own_basis(seeded):
    """Books and codes are those of the weight that was rotated by hand, and not those of the weight as it is."""
    weight, rotated = seeded(32, 16, seed=1) * torch.tensor([10.0] + [0.1] * 15), spec_of(transforms=(Hadamard(),))
    by_hand = rotation(Hadamard(), 16)(weight)
    torch.testing.assert_close(by_hand @ by_hand.T, weight @ weight.T, rtol=1e-4, atol=1e-4)
    book = books_on([weight], rotated)["g"]
    assert torch.equal(book, books_on([by_hand], spec_of())["g"])
    assert not torch.allclose(book, books_on([weight], spec_of())["g"], atol=0.1)
    (found,), (expected,) = solve([weight], rotated, books={"g": book}), solve([by_hand], spec_of(), books={"g": book})
    assert "codebook" not in found.tensors
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in ("qweight", "scale"))


def test_what_inputs_say_matters(seeded):
    """Vectors over columns whose inputs are large get the words."""
    weight, loud = seeded(64, 16, seed=3), torch.tensor([10.0] * 8 + [0.1] * 8)
    rows = seeded(200, 16, seed=4) * loud
    learned = spec_of(solver=GPTQ())
    plain, weighted = books_on([weight], learned)["g"], books_on([weight], learned, rows.square().mean(dim=0))["g"]
    scale = weight.square().mean(dim=1, keepdim=True).sqrt()
    vectors = (weight / scale)[:, :8].reshape(-1, 4)
    assert nearest_error(vectors, weighted, 1) < 0.9 * nearest_error(vectors, plain, 1)


def test_samples_are_bounded_and_every_layer_is_among_them(seeded, monkeypatch):
    monkeypatch.setattr(single, "LEAST_SAMPLE", 100)
    monkeypatch.setattr(single, "SAMPLE", 1)
    weights = [seeded(64, 16, seed=i) for i in range(3)] + [seeded(4, 16, seed=9)]
    vectors = SharedVectors((spec_of(), weight.numel()) for weight in weights)
    for weight in weights:
        vectors.add(weight, spec_of(), 16)
    sizes = [len(drawn) for drawn, _ in vectors.drawn["g"]]
    assert sizes == [33, 33, 33, 3]


@pytest.mark.parametrize("form", [FORM, replace(FORM, words=512, length=3)], ids=str)
@pytest.mark.parametrize("solver", [RTN(), GPTQ(), BeamSearch(beam=2, rounds=3)], ids=lambda s: type(s).__name__)
def test_solvers_take_the_books_as_they_are(solver, form, correlated, seeded, stats_of):
    """And are at least as good as the nearest words of the same books."""
    k = 48
    weights, rows = [seeded(40, k, seed=1), seeded(72, k, seed=2)], correlated(200, k)
    inputs = stats_of(rows)
    books = books_on(weights, spec_of(form))
    before = books["g"].clone()
    found = solve(weights, spec_of(form, solver=solver), inputs, books=books)
    nearest = solve(weights, spec_of(form), books=books)
    assert torch.equal(books["g"], before)
    for weight, mine, plain in zip(weights, found, nearest, strict=True):
        assert set(mine.tensors) == {"qweight", "scale"}
        errors = [((decoded(each, before, k) - weight) @ rows.T).square().sum() for each in (mine, plain)]
        assert errors[0] <= errors[1] * (1 + 1e-4)
        if solver != RTN():
            assert errors[0] < 0.8 * errors[1]


def test_without_books_the_solver_says_what_to_do(seeded):
    with pytest.raises(
        ValueError, match=r"solve: books of group 'g' must be learned before the layers that share them, got .*no group"
    ):
        solve([seeded(8, 16)], spec_of())


def weight_error(weights, spec, books=None):
    found = solve(weights, spec, books=books)
    book = None if books is None else books["g"]
    errors = []
    for weight, each in zip(weights, found, strict=True):
        packed = Packed(**each.tensors) if book is None else Packed(**each.tensors, codebook=book)
        errors.append(float((dequantize(packed, spec.weight, weight.shape[1]) - weight).square().sum() / weight.square().sum()))
    return sum(errors) / len(errors)


def test_on_small_layers_one_book_is_worth_more_than_a_book_each(seeded):
    """Eight layers of 96 x 96: for fewer bytes than with books of 256 words each, wider codes from one book lose less."""
    weights = [seeded(96, 96, seed=i) for i in range(8)]
    own, shared = VectorCodebook(words=256, length=4), VectorCodebook(words=512, length=3, group="g")
    separate, together = (LayerSpec(weight=TensorSpec(format=form, granularity=PerTensor())) for form in (own, shared))
    apart = 8 * stored_bytes(separate.weight, 96, 96)
    whole = 8 * stored_bytes(together.weight, 96, 96) + 2 * math.prod(book_shape(shared))
    assert whole < 0.9 * apart
    assert weight_error(weights, together, books_on(weights, together)) < 0.6 * weight_error(weights, separate)
