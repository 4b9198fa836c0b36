"""Books of words learned from vectors: weighted k-means from k-means++ starts (Arthur & Vassilvitskii 2007), and least squares.

Several books are learned one after the other on what those before leave (residual k-means), then together: with the codes fixed,
the squared error is quadratic in the words, so conjugate gradients find them. Residual k-means alone loses to scalar codes at 3
and 4 bits; the joint step is what makes additive books pay (docs/methods/vector_quantization.md has the numbers).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dqtk.numerics.vectors import BEAM, nearest_words, words_of
from dqtk.spec import VectorCodebook

SAMPLE, LEAST_SAMPLE, MOST_SAMPLE = 64, 8192, 2**20  # vectors that books are learned on: so many per word, within these bounds
DRAWS = 256  # of first centres, at most: as many words as it takes are drawn at a time
ITERATIONS = 25  # of Lloyd, at most
ENOUGH = 1e-3  # relative gain below which k-means stops
JOINT = 4  # rounds of codes and words in turn, of several books
STEPS = 16  # of conjugate gradients
RIDGE = (
    0.01  # times the mean curvature of a word, that words are pulled to zero with: two that mostly meet would else grow without end
)


def learned_books(vectors: Tensor, form: VectorCodebook, importance: Tensor | None = None, beam: int = BEAM) -> Tensor:
    """Books for some vectors.

    Args:
        vectors: float [V, D].
        form: how many books of how many words.
        importance: float [V], what a squared error of each counts; None: the same. Those that count nothing are left out, unless
            none counts.
        beam: of the search for codes.
    Returns:
        float16 [M, W, D].
    """
    draw = torch.Generator().manual_seed(0)
    if importance is not None and bool((counted := importance > 0).any()):
        vectors, importance = vectors[counted], importance[counted]
    if len(vectors) > (most := sample_of(form)):
        some = torch.randperm(len(vectors), generator=draw)[:most].to(vectors.device)
        vectors, importance = vectors[some], None if importance is None else importance[some]
    x = vectors.float()
    weight = torch.ones(len(x), device=x.device) if importance is None else importance.float().clamp(min=1e-30)
    weight = weight / weight.mean()
    rest, books = x, []
    for _ in range(form.books):
        book = _k_means(rest, form.words, weight, draw)
        books.append(book)
        rest = rest - words_of(nearest_words(rest, book[None])[:, None], book[None])
    codebook = torch.stack(books).half()
    codes: Tensor | None = None
    for _ in range(JOINT if form.books > 1 else 0):
        codes = nearest_words(x, codebook, beam=beam, start=None if codes is None else codes[:, 0])[:, None]
        codebook = _together(x, weight[:, None], codes, codebook)
    return codebook


def sample_of(form: VectorCodebook) -> int:
    """Vectors that books are learned on, at most."""
    return min(max(SAMPLE * form.words, LEAST_SAMPLE), MOST_SAMPLE)


def _together(x_VD: Tensor, weight_V1: Tensor, codes_V1M: Tensor, codebook: Tensor) -> Tensor:
    """The books that fit best, all at once, with the codes fixed."""
    words = codebook.shape[1]
    return fitted(
        codebook,
        target=sums_of(x_VD * weight_V1, codes_V1M, words),
        curvature=lambda books: sums_of(words_of(codes_V1M, books) * weight_V1, codes_V1M, words),
        diagonal=sums_of(weight_V1.expand_as(x_VD), codes_V1M, words),
    )


def _k_means(x_VD: Tensor, num: int, weight_V: Tensor, draw: torch.Generator) -> Tensor:
    """float32 [num, D]."""
    centres, before = _first_centres(x_VD, num, weight_V, draw), float("inf")
    for _ in range(ITERATIONS):
        code = nearest_words(x_VD, centres[None])[:, 0].long()
        distance = (x_VD - centres[code]).square().sum(dim=1) * weight_V
        error = float(distance.sum())
        mass = torch.zeros(num, device=x_VD.device).index_add_(0, code, weight_V)
        sums = torch.zeros_like(centres).index_add_(0, code, x_VD * weight_V[:, None])
        centres = torch.where((mass > 0)[:, None], sums / mass.clamp(min=1e-30)[:, None], centres)
        empty = (mass == 0).nonzero()[:, 0][: len(x_VD)]
        if len(empty):  # words that nobody uses go where the error is largest
            centres[empty] = x_VD[distance.topk(len(empty)).indices]
        elif error >= before * (1 - ENOUGH):
            break
        before = error
    return centres


def _first_centres(x_VD: Tensor, num: int, weight_V: Tensor, draw: torch.Generator) -> Tensor:
    """k-means++: every centre is a vector, drawn with a probability proportional to its squared distance to those before.

    More than ``DRAWS`` of them are drawn some at a time (the idea of k-means||, Bahmani et al. 2012, arXiv 1203.6402).
    """
    chances = weight_V.double().cpu()
    centres = torch.empty((num, x_VD.shape[1]), device=x_VD.device)
    nearest = torch.full((len(x_VD),), torch.inf, device=x_VD.device)
    for some in torch.arange(num).split(-(-num // DRAWS)):
        reached = chances.cumsum(0)
        places = torch.searchsorted(reached, torch.rand(len(some), generator=draw, dtype=torch.float64) * reached[-1])
        new = centres[some] = x_VD[places.clamp(max=len(x_VD) - 1)]
        nearest = torch.minimum(nearest, _least_distance(x_VD, new))
        chances = (nearest * weight_V).double().cpu()
        if not float(chances.sum()) > 0:  # fewer different vectors than words
            chances = weight_V.double().cpu()
    return centres


def _least_distance(x_VD: Tensor, centres_CD: Tensor) -> Tensor:
    """float32 [V]: squared distance to the nearest of these."""
    if len(centres_CD) == 1:
        return (x_VD - centres_CD).square().sum(dim=1)
    return (x_VD - centres_CD[nearest_words(x_VD, centres_CD[None])[:, 0].long()]).square().sum(dim=1)


def sums_of(x: Tensor, codes: Tensor, words: int) -> Tensor:
    """float32 [M, W, D]: of x [R, G * D], what is added up at each word that codes [R, G, M] name."""
    vectors = x.reshape(-1, x.shape[1] // codes.shape[1])
    total = torch.zeros((codes.shape[2], words, vectors.shape[1]), device=x.device)
    for book in range(codes.shape[2]):
        total[book].index_add_(0, codes[..., book].reshape(-1).long(), vectors)
    return total


def fitted(codebook: Tensor, target: Tensor, curvature: Callable[[Tensor], Tensor], diagonal: Tensor) -> Tensor:
    """Books [M, W, D] that lower books curvature(books) / 2 - books target, from ``codebook`` on; float16.

    ``diagonal`` of the curvature preconditions the conjugate gradients. Words that no code names stay as they are.
    """
    used, pull = diagonal > 0, RIDGE * diagonal.mean()
    inverse = torch.where(used, 1 / (diagonal + pull).clamp(min=1e-30), torch.zeros_like(diagonal))
    found = codebook.float().clone()
    rest = torch.where(used, target - curvature(found) - pull * found, torch.zeros_like(found))
    step = ready = inverse * rest
    size = float((rest * ready).sum())
    for _ in range(STEPS):
        bent = curvature(step) + pull * step
        length = float((step * bent).sum())
        if not size > 0 or not length > 0:
            break
        found += size / length * step
        rest = torch.where(used, rest - size / length * bent, rest)
        ready = inverse * rest
        size, before = float((rest * ready).sum()), size
        step = ready + size / before * step
    return found.half()
