"""Steps of codes: a few vectors get another word, those that need the shortest step for it (the linearized V step of PV-Tuning,
Malinovskii et al. 2024, arXiv 2405.14852, in its small subspace), while books, scales and all else learn in between.

A step goes from the decoded weights w to the nearest words to w - e H^-1 g: g their gradient, H an estimate of the curvature, e the
length. Of each vector it is just long enough to change its code; which word that is, and how long, is the largest of

    s = -2 g d / (d H d^T)         d: from a word to another of the same book, all other books' words fixed;  1 / s = e

and of a layer's vectors those with the shortest steps change: a step promises g d + d H d^T / 2 < 0 wherever s is above the true
curvature in the unit of H. PV-Tuning takes Adam's root of dense second moments for H, one length for all, and the vectors that
it moves most. Here H = rows x blocks: the mean square gradient of a row, times the second moments of a vector's columns, over the
gradients of the calls since the last step (the factors of Shampoo and K-FAC, within a vector). Rows are damped as there, by their
mean, or those that matter least would have the shortest steps. These are (N + K D) numbers beside the N K of the summed gradient,
and no rate: only ratios within a layer count. Under H = 1 the columns with the largest inputs come first, where the curvature is
largest too.

How many change is tried: at most a share, on the next calls; where their error does not fall by more than the standard error of its
mean, a quarter of them, and so on. The next step begins with four times what the last one kept.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from dqtk.spec import DiscreteSteps

from .team import Team
from .trained_vectors import TrainedVectors

TRIES = 3  # shares that a step tries, each a quarter of the one before
FEWER = 0.25
LEAST = 1e-4  # of the largest share: where tries begin at least
NUMBERS = 2**22  # in one table of promises
DAMPING = 1.0  # of a row's curvature, as the mean row's share
NEAR = 1e-6  # of the sizes of two words: curvature below it is rounding


class Gathered:
    """Gradients of one layer's decoded weight [N, K], of vectors of D, since the last step.

    total: their sum [N, K]. rows: sum of their squares [N, 1]. blocks: sum of outer products within vectors [K / D, D, D].
    """

    def __init__(self, mine: TrainedVectors):
        self.mine = mine
        assert mine.books is not None
        (n, vectors, _), self.length, device = mine.codes.shape, mine.books.start.shape[2], mine.codes.device
        self.total = torch.zeros(n, vectors * self.length, device=device)
        self.rows = torch.zeros(n, 1, device=device)
        self.blocks = torch.zeros(vectors, self.length, self.length, device=device)

    def add(self, gradient: Tensor) -> None:
        """One more gradient [N, K]."""
        gradient = gradient.float()
        self.total += gradient
        self.rows += gradient.square().sum(dim=1, keepdim=True)
        by_vector = gradient.unflatten(1, (-1, self.length)).transpose(0, 1)  # [K / D, N, D]
        self.blocks += by_vector.transpose(1, 2) @ by_vector

    def add_up(self, team: Team) -> None:
        """The sums over all processes in place of this one's."""
        for tensor in (self.total, self.rows, self.blocks):
            team.add(tensor)

    def clear(self) -> None:
        """Begin anew."""
        for tensor in (self.total, self.rows, self.blocks):
            tensor.zero_()

    def moves(self, num: int) -> "Moves":
        """The ``num`` vectors, at most, with the shortest steps, shortest first."""
        books = self.mine.codebook()
        assert books is not None
        best, place = _promises(self, books.detach(), self.mine.scale().detach())
        strength, vector = best.flatten().topk(num)
        vector = vector[strength > 0]
        book, word = (found.flatten()[vector] for found in place)
        codes = self.mine.codes.view(-1, self.mine.codes.shape[2])
        return Moves(codes=codes, vector=vector, book=book, word=word.to(codes.dtype))


def _promises(gathered: Gathered, books_MWD: Tensor, scale: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """float32 [N, K / D]: s of every vector's best change, in a unit of the layer's; and its book and word."""
    codes, length = gathered.mine.codes, gathered.length
    n, vectors, num_books = codes.shape
    total, rows, blocks = (_relative(sums) for sums in (gathered.total, gathered.rows, gathered.blocks))
    curvature = (rows + DAMPING * rows.mean()) * scale  # [N, 1]; s in the unit of words
    counts = (curvature > 0).expand(n, 1)
    best = torch.zeros(n, vectors, device=codes.device)
    book, word = (torch.zeros(n, vectors, dtype=torch.int64, device=codes.device) for _ in range(2))
    gradients = total.unflatten(1, (-1, length))
    num_words = books_MWD.shape[1]
    height = min(n, max(1, NUMBERS // num_words))
    width = max(1, NUMBERS // (height * num_words))
    for top, left in product(range(0, n, height), range(0, vectors, width)):
        at, columns = (slice(top, top + height), slice(left, left + width)), slice(left, left + width)
        divisor = torch.where(counts, curvature, 1.0)[at[0]]
        for index in range(num_books):
            found, to = _best_words(gradients[at], blocks[columns], books_MWD[index], codes[at][..., index].long())
            found = torch.where(counts[at[0]], found / divisor, 0.0)
            better = found > best[at]
            best[at] = torch.where(better, found, best[at])
            book[at] = torch.where(better, index, book[at])
            word[at] = torch.where(better, to, word[at])
    return best, (book, word)


def _relative(sums: Tensor) -> Tensor:
    """To the largest of them: powers of small gradients leave float32."""
    return sums / sums.abs().amax().clamp(min=torch.finfo(sums.dtype).tiny)


def _best_words(g_NCD: Tensor, blocks_CDD: Tensor, words_WD: Tensor, code_NC: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C] of every vector: the largest -2 g d / (d B d^T) of other words, and the word."""
    now = words_WD[code_NC]
    bent = words_WD @ blocks_CDD  # [C, W, D]
    sizes = (bent * words_WD).sum(dim=2)  # [C, W]
    mine = sizes[None].expand(len(now), -1, -1).gather(2, code_NC[..., None])  # [N, C, 1]
    slope = g_NCD @ words_WD.T - (g_NCD * now).sum(dim=2, keepdim=True)
    crossed = torch.einsum("ncd,cwd->ncw", now, bent)
    size = (sizes + mine).clamp(min=1e-30)
    curvature = torch.maximum(sizes + mine - 2 * crossed, NEAR * size)
    return (-2 * slope / curvature).scatter_(2, code_NC[..., None], 0.0).max(dim=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moves:
    """Changes of one layer's codes [V, M]: ``vector`` gets ``word`` of ``book``."""

    codes: Tensor
    vector: Tensor
    book: Tensor
    word: Tensor

    def take(self, share: float) -> Callable[[], None]:
        """Make the first of them, a share but at least one; what takes them back."""
        num = math.ceil(share * len(self.vector))
        at = (self.vector[:num], self.book[:num])
        before = self.codes[at]
        self.codes[at] = self.word[:num]

        def undo() -> None:
            self.codes[at] = before

        return undo


class Steps:
    """The steps of all layers of words among ``trained``.

    held: what changes in place and is needed to go on, by name. error: number of a call -> its error [] without gradients.
    """

    def __init__(
        self,
        trained: Mapping[str, object],
        choice: DiscreteSteps,
        error: Callable[[int], Tensor],
        batch: int,
        team: Team,
        num_calls: int,
    ):
        """num_calls: different ones that are learned from; no more of them judge a step."""
        self.choice, self.error, self.batch, self.team = choice, error, batch, team
        self.judges = min(choice.calls, num_calls)
        words = {path: mine for path, mine in trained.items() if isinstance(mine, TrainedVectors) and mine.books is not None}
        self.gathered = [Gathered(mine) for mine in words.values()]
        for mine in self.gathered:
            mine.mine.watch = mine.add
        self.part = torch.ones(1)  # of the share, with which the next step begins
        self.held = {f"{path}.codes": mine.codes for path, mine in words.items()} | {"discrete.part": self.part}

    def forget(self) -> None:
        """The gradients since the last step, where learning goes back."""
        for mine in self.gathered:
            mine.clear()

    @torch.no_grad()
    def after(self, done: int) -> None:
        """Called after every iteration with the number of those done."""
        if done % self.choice.every:
            return
        moves = []
        for mine in self.gathered:
            mine.add_up(self.team)
            moves.append(mine.moves(int(self.choice.share * mine.mine.codes[..., 0].numel())))
            mine.clear()
        before = self._judged(done)
        part = float(self.part)
        for _ in range(TRIES):
            undos = [each.take(part) for each in moves]
            if falls_by_more_than_chance(self._judged(done) - before):
                self.part.fill_(min(1.0, part / FEWER))
                return
            for undo in undos:
                undo()
            part *= FEWER
        self.part.fill_(max(LEAST, part))

    def _judged(self, done: int) -> Tensor:
        """float64 [calls]: errors in the next calls, the same in every process."""
        found = torch.zeros(self.judges, dtype=torch.float64)
        for place in range(self.team.rank, self.judges, self.team.world):
            found[place] = self.error(done * self.batch + place).detach().double().cpu()
        self.team.add(found)
        return found


def falls_by_more_than_chance(change: Tensor) -> bool:
    """Whether errors that changed so [C] fall in the mean by more than the standard error of it; one alone never tells."""
    return len(change) > 1 and float(change.mean()) < -float(change.std()) / math.sqrt(len(change))
