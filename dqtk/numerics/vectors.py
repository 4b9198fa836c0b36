"""Words of several weights: what codes stand for, and which sum of words is nearest under a quadratic form.

A vector is the sum of one word of every book (additive quantization, Babenko & Lempitsky 2014; one book is vector quantization).
The nearest sum under (x - c) A (x - c)^T is the nearest in the plain sense once x and the words are multiplied by a root of A, so
one search serves plain, weighted and second-moment errors. Of several books it is a beam search, followed by rounds in which each
book's word is chosen anew with the others fixed.
"""

import torch
from torch import Tensor

BEAM = 8
ROUNDS = 1  # of choosing every book's word anew
CHUNK = 32  # of a table of scores
HUGE = 1e30  # the distance of what must not be chosen
SCORES = 2**18  # numbers in one table of scores: 1 MiB stays in cache
MANY = 1024  # words that are searched chunk by chunk
LEAST_ROWS = 16  # vectors in one table, however many words there are


def words_of(codes: Tensor, codebook: Tensor) -> Tensor:
    """float32 [R, G * D]: the sums of words that codes [R, G, M] name; codebook [M, W, D]."""
    total = None
    for book, table in enumerate(codebook.float()):
        word = table[codes[..., book].long()]
        total = word if total is None else total + word
    assert total is not None
    return total.flatten(1)


def nearest_words(x: Tensor, codebook: Tensor, root: Tensor | None = None, beam: int = BEAM, start: Tensor | None = None) -> Tensor:
    """Codes of the nearest sums.

    Args:
        x: float [R, D].
        codebook: float [M, W, D].
        root: [D, E] with A = root root^T; None: the plain distance.
        beam: sums that are followed from book to book; one book needs none.
        start: [R, M], codes to begin with; what is found is never worse.
    Returns:
        [R, M], uint8 of up to 256 words, else int32. Exact for one book.
    """
    x, books = x.float(), codebook.float()
    if root is not None:
        x, books = x @ root.float(), books @ root.float()
    dtype = torch.uint8 if books.shape[1] <= 256 else torch.int32
    if len(books) == 1:
        num = max(LEAST_ROWS, SCORES // books.shape[1])
        words = books[0]
        scores = (torch.addmm(words.square().sum(1), part, words.T, alpha=-2) for part in x.split(num))  # less |x|^2
        return torch.cat([_first_least(each).to(dtype) for each in scores])
    num = max(LEAST_ROWS, SCORES // (books.shape[1] * beam))
    starts = [None] * len(x.split(num)) if start is None else start.long().split(num)
    tables = [torch.cat([-2 * w.T, w.square().sum(1)[None], torch.ones(1, len(w), device=w.device)]) for w in books]
    return torch.cat([_searched(*part, books, tables, beam) for part in zip(x.split(num), starts, strict=True)]).to(dtype)


def _searched(x_RD: Tensor, start_RM: Tensor | None, books_MWD: Tensor, tables: list[Tensor], beam: int) -> Tensor:
    """Book by book; then each book again, ``ROUNDS`` times, with the others of every hypothesis as they are.

    tables: [D + 2, W] of each book, which (x, 1, |x|^2) is multiplied with: all squared distances in one product.
    """
    rest_RBD = x_RD[:, None]  # what is left for the books to come
    codes_RBM = torch.zeros((len(x_RD), 1, len(books_MWD)), dtype=torch.int64, device=x_RD.device)
    if start_RM is not None:
        codes_RBM, rest_RBD = start_RM[:, None], rest_RBD - words_of(start_RM[:, None], books_MWD)[:, None]
    for turn in range(ROUNDS + (start_RM is None)):
        for book, words in enumerate(books_MWD):
            fresh = turn == 0 and start_RM is None  # the book has no word yet
            target = rest_RBD if fresh else rest_RBD + words[codes_RBM[..., book]]
            size = target.square().sum(-1, keepdim=True)
            if not fresh:
                size.masked_fill_(_repeated(codes_RBM, book)[..., None], HUGE)
            scores = torch.cat([target, torch.ones_like(size), size], dim=2) @ tables[book]
            best = _least(scores.flatten(1), beam)
            parent, word = best // len(words), best % len(words)
            rest_RBD = target.gather(1, parent[..., None].expand(-1, -1, target.shape[2])) - words[word]
            codes_RBM = codes_RBM.gather(1, parent[..., None].expand(-1, -1, codes_RBM.shape[2]))
            codes_RBM[..., book] = word
    return codes_RBM[:, 0]


def _repeated(codes_RBM: Tensor, book: int) -> Tensor:
    """bool [R, B]: hypotheses that differ from an earlier one in nothing but this book's word."""
    others = torch.arange(codes_RBM.shape[2], device=codes_RBM.device) != book
    mine = codes_RBM[..., others]
    same = (mine[:, :, None] == mine[:, None]).all(dim=3)
    return same.tril(-1).any(dim=2)


def _first_least(scores_RW: Tensor) -> Tensor:
    """int64 [R, 1]: place of the least score. Of many words chunk by chunk: torch's least of a row is vectorized, its place is not
    (4096 words: a third of the time of the whole search on a Xeon, one thread)."""
    if scores_RW.shape[1] < MANY:
        return scores_RW.argmin(dim=1, keepdim=True)
    chunks = scores_RW.unflatten(1, (-1, CHUNK))
    near = chunks.amin(dim=2).argmin(dim=1, keepdim=True)
    found = chunks.gather(1, near[..., None].expand(-1, -1, CHUNK))[:, 0].argmin(dim=1, keepdim=True)
    return near * CHUNK + found


def _least(scores_RL: Tensor, num: int) -> Tensor:
    """int64 [R, num]: places of the least scores, ascending. They lie in the ``num`` chunks with the least minima."""
    length = scores_RL.shape[1]
    if length % CHUNK or length // CHUNK <= num:
        return scores_RL.topk(min(num, length), largest=False).indices
    chunks = scores_RL.unflatten(1, (-1, CHUNK))
    near = chunks.amin(dim=2).topk(num, largest=False).indices
    found = chunks.gather(1, near[..., None].expand(-1, -1, CHUNK)).flatten(1).topk(num, largest=False).indices
    return near.gather(1, found // CHUNK) * CHUNK + found % CHUNK
