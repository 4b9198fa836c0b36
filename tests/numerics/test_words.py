"""Words of several weights: what codes mean, and the search for the nearest sum against trying all of them."""

import itertools

import pytest
import torch

from dqtk.numerics.packing import dequantize, layout
from dqtk.numerics.vector_grid import WordGrid, root_mean_square
from dqtk.numerics.vectors import _least, nearest_words, words_of
from dqtk.spec import PerChannel, PerTensor, TensorSpec, VectorCodebook


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_sum(codebook):
    """Codes [W^M, M] and their sums in float64."""
    codes = torch.tensor(list(itertools.product(range(codebook.shape[1]), repeat=len(codebook))))
    return codes, sum(codebook[m].double()[codes[:, m]] for m in range(len(codebook)))


def least_error(x, codebook, root):
    _, sums = every_sum(codebook)
    return ((x.double()[:, None] - sums) @ root.double()).square().sum(-1).amin(1)


def error(x, codes, codebook, root):
    sums = words_of(codes[:, None], codebook).double()
    return ((x.double() - sums) @ root.double()).square().sum(-1)


def test_words_of_several_vectors_and_books():
    codebook, codes = draw(2, 4, 3), torch.tensor([[[0, 3], [2, 1]], [[1, 1], [3, 0]]], dtype=torch.uint8)
    for row in range(2):
        for group in range(2):
            a, b = codes[row, group].tolist()
            expected = codebook[0, a] + codebook[1, b]
            assert torch.equal(words_of(codes, codebook)[row, 3 * group : 3 * group + 3], expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_one_book_is_searched_exactly(weighted):
    x, codebook = draw(301, 4, seed=1), draw(1, 16, 4, seed=2)
    root = draw(4, 4, seed=3) if weighted else torch.eye(4)
    codes = nearest_words(x, codebook, root if weighted else None)
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(error(x, codes, codebook, root), least_error(x, codebook, root), rtol=1e-4, atol=1e-5)


def test_many_words_are_searched_as_few_are():
    x, codebook = draw(100, 4, seed=1), draw(1, 2048, 4, seed=2)
    codes = nearest_words(x, codebook)
    assert codes.dtype == torch.int32
    assert torch.equal(codes[:, 0].long(), torch.cdist(x.double(), codebook[0].double()).argmin(dim=1))


def test_a_wide_beam_finds_what_trying_all_sums_finds():
    x, codebook = draw(64, 4, seed=1), draw(3, 8, 4, seed=2)
    root = draw(4, 4, seed=3)
    best = least_error(x, codebook, root)
    found = error(x, nearest_words(x, codebook, root, beam=512), codebook, root)
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-5)


def test_wider_beams_lose_less_and_a_start_is_never_made_worse():
    x, codebook, plain = draw(400, 8, seed=1), draw(3, 64, 8, seed=2), torch.eye(8)
    errors = [float(error(x, nearest_words(x, codebook, beam=beam), codebook, plain).mean()) for beam in (1, 4, 16)]
    assert errors[0] > errors[1] > errors[2]
    start = torch.randint(0, 64, (400, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    before = error(x, start, codebook, plain)
    for beam in (1, 8):
        again = error(x, nearest_words(x, codebook, beam=beam, start=start), codebook, plain)
        assert (again <= before * (1 + 1e-5) + 1e-5).all()
        assert again.mean() < 0.5 * before.mean()


@pytest.mark.parametrize("length", [31, 64, 256, 2048])
def test_the_least_scores_are_found_chunk_by_chunk(length):
    scores = draw(50, length)
    assert torch.equal(_least(scores, 8), scores.topk(8, largest=False).indices)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize(
    "form",
    [
        VectorCodebook(words=4, length=2),
        VectorCodebook(words=64, length=2),
        VectorCodebook(books=3),
        VectorCodebook(words=4, length=1),
        VectorCodebook(words=4096, length=6),
        VectorCodebook(words=512, length=6, books=2),
        VectorCodebook(words=65536, length=4),
    ],
    ids=str,
)
def test_stored_codes_mean_what_was_chosen(form, granularity):
    """Odd numbers of vectors too; names, shapes and dtypes are those of the layout."""
    n, k = 5, form.length * 3
    spec, weight = TensorSpec(format=form, granularity=granularity), draw(n, k, seed=4) * 3
    grid = WordGrid(spec=spec, scale=root_mean_square(weight, spec), codebook=draw(form.books, form.words, form.length).half())
    codes = grid.encode(weight)
    packed = grid.pack(codes)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors().items()} == layout(spec, n, k)
    assert torch.equal(dequantize(packed, spec, k), grid.decode(codes))


def test_bytes_of_golden_codes():
    spec = TensorSpec(format=VectorCodebook(words=16, length=4, books=2), granularity=PerTensor())
    grid = WordGrid(spec=spec, scale=torch.ones(1, 1), codebook=torch.zeros(2, 16, 4).half())
    codes = torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 8]]], dtype=torch.uint8)
    assert grid.pack(codes).qweight.tolist() == [[0x51, 0x62, 0x73, 0x84]]


def test_zeros_have_a_scale_of_zero():
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert root_mean_square(weight, TensorSpec(format=VectorCodebook(words=4, length=2), granularity=PerChannel())).tolist() == [
        [0.0],
        [pytest.approx(12.5**0.5)],
    ]


def test_a_length_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"count_vectors: length must divide the 20 inputs, got 8\. Choose another length"):
        layout(TensorSpec(format=VectorCodebook(), granularity=PerChannel()), 4, 20)
