"""A layer of vectors while it learns: its scales and, if it has any, its books, with gradients; and which of some words it takes.

    word = stored word + unit * moved          unit: root mean square of the words of a book, so one learning rate serves all layers
    scale = stored scale * exp(s)

Both are rounded to their stored dtypes in every forward and the derivative of that is passed over, so that storing changes no
number. (VQDM's second phase trains the same numbers, arXiv 2409.00492, section 3.)

Codes stay, unless steps change them (``discrete.py``), or vectors of one book are given candidates: the words nearest to the
original vector (VQ4DiT, Deng et al. 2024, arXiv 2408.17131). A vector then is a mixture of them, by ratios softmax(z) that begin in
inverse proportion to the distances; where a ratio is above 0.99 the vector has decided, and its ratios take no more gradients.
``doubt`` is what is left to decide, from 1 down to 0. Without gradients, which is how a refiner judges, and when stored, the word
of the largest ratio stands alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.nn.products import Stored, group_of
from dqtk.numerics.packing import count_vectors, dequantize, pack, unpack
from dqtk.numerics.storage import stored_name
from dqtk.numerics.vector_grid import in_units
from dqtk.numerics.vectors import words_of
from dqtk.spec import VectorCodebook

LOGITS = ("logits",)  # names of the numbers that choose
DECIDED = 0.99
UNIT = 2.5  # of a ratio's logit, beside ``weight_rate``: 0.02 of it is VQ4DiT's rate
DISTANCES = 2**20  # numbers in one table: vectors that are compared with all words at a time
LEAST_ROWS = 16


class TrainedBooks:
    """Books of one layer, or of all layers of a group, while they learn. start: float32 [M, W, D], stored. moved: what learns."""

    def __init__(self, codebook: Tensor):
        self.start = codebook.float()
        self.unit = self.start.square().mean(dim=(1, 2), keepdim=True).sqrt()
        self.moved = nn.Parameter(torch.zeros_like(self.start))

    def words(self) -> Tensor:
        """The books as they would be stored; float32 numbers."""
        words = self.start + self.unit * self.moved
        return words + (words.half().float() - words).detach()


class TrainedVectors:
    """The learned numbers of one layer of vectors, or of one part of a layer whose input is split.

    parameters: float32 by name: ``scale``, the logarithm of a factor on every scale; where there are books ``moved`` [M, W, D], of
    a group in its first layer alone, and the gradients of all its layers add up there; where vectors choose ``logits`` [V, C].
    codes: [N, G, M], of words, as ``unpack`` gives them. watch: is told every gradient [N, K] of their decoded weight. exact: the
    original weight [N, K]; candidates: C, of one book and without transforms. path: of the layer. shared: books of groups that
    learn already, to which those of this layer's group are added.
    """

    def __init__(
        self,
        layer: Any,
        stored: Stored,
        index: int,
        exact: Tensor | None = None,
        candidates: int = 1,
        path: str = "",
        shared: dict[str, TrainedBooks] | None = None,
    ):
        self.layer, self.stored, self.index, self.path = layer, stored, index, path
        module: Any = stored
        packed, spec = stored.packed(), stored.spec.weight
        assert packed.scale is not None
        self.start_scale, self.form = packed.scale, spec.format
        self.parameters = {"scale": nn.Parameter(torch.zeros_like(packed.scale))}
        self.choices: Tensor | None = None
        self.books: TrainedBooks | None = None
        self.watch: Callable[[Tensor], None] | None = None
        if not isinstance(self.form, VectorCodebook):
            self.numbers = dequantize(replace(packed, scale=torch.ones_like(packed.scale)), spec, module.k)
            return
        assert packed.codebook is not None
        group, others = self.form.group, {} if shared is None else shared
        self.books = others.get(group) if group is not None else None
        if self.books is None:
            self.books = TrainedBooks(packed.codebook)
            self.parameters["moved"] = self.books.moved
            if group is not None:
                others[group] = self.books
        codes = unpack(packed.qweight, self.form.code_bits, count_vectors(self.form, module.k) * self.form.books)
        self.codes = codes.unflatten(1, (-1, self.form.books)).clone()  # codes of 8 bits are the buffer itself
        if candidates > 1 and self.form.books == 1 and exact is not None and not stored.spec.transforms:
            vectors = in_units(exact, packed.scale).reshape(-1, self.form.length)
            self.choices, distances = _nearest(vectors, self.books.start[0], self.codes.flatten().long(), candidates)
            self.start_logits = -distances.clamp(min=1e-6).log()
            self.parameters["logits"] = nn.Parameter(torch.zeros_like(self.start_logits))

    def codebook(self) -> Tensor | None:
        """The books as they would be stored; float32 numbers. None of a trellis."""
        return None if self.books is None else self.books.words()

    def scale(self) -> Tensor:
        """The scales, float32, in their shape."""
        return self.start_scale * self.parameters["scale"].exp()

    def ratios(self) -> Tensor:
        """float32 [V, C]; 0 and 1 where a vector has decided."""
        ratio = (self.start_logits + UNIT * self.parameters["logits"]).softmax(dim=1)
        decided = ratio.detach().amax(dim=1, keepdim=True) > DECIDED
        return torch.where(decided, (ratio.detach() > DECIDED).float(), ratio)

    def doubt(self) -> Tensor | None:
        """Scalar: the mean of r (1 - r), 1 where all ratios are equal and 0 where all vectors have decided; None: no choice."""
        if self.choices is None:
            return None
        ratio, count = self.ratios(), self.choices.shape[1]
        return count**2 / (count - 1) * (ratio * (1 - ratio)).mean()

    def weight(self) -> Tensor:
        """float32 [N, K]: the numbers that ``packing.dequantize`` finds after ``store``, bit for bit, once gradients are off."""
        books = self.codebook()
        if books is None:
            return self.numbers * self.scale()
        if self.choices is None or not torch.is_grad_enabled():
            weight = words_of(self._codes(), books) * self.scale()
            return weight if self.watch is None or not torch.is_grad_enabled() else _watched(weight, self.watch)
        mixed = (books[0][self.choices] * self.ratios()[..., None]).sum(dim=1)
        return mixed.view(len(self.codes), -1) * self.scale()

    def _codes(self) -> Tensor:
        """[N, G, M]: those of the largest ratios where vectors choose."""
        if self.choices is None:
            return self.codes
        logits = self.start_logits + UNIT * self.parameters["logits"]
        return self.choices.gather(1, logits.argmax(dim=1, keepdim=True)).view(self.codes.shape).to(self.codes.dtype)

    @torch.no_grad()
    def store(self) -> None:
        """Put books, scales and codes into the layer."""
        books = self.codebook()
        if books is not None and (group := group_of(self.stored.spec)) is not None:
            self.layer.books.put(group, books.half())  # the same numbers from every layer of the group
        elif books is not None:
            setattr(self.layer, stored_name("codebook", self.index), books.half())
        if isinstance(self.form, VectorCodebook):
            codes = pack(self._codes().flatten(1), self.form.code_bits)
            setattr(self.layer, stored_name("qweight", self.index), codes)
        setattr(self.layer, stored_name("scale", self.index), self.scale())


def _watched(weight: Tensor, watch: Callable[[Tensor], None]) -> Tensor:
    """The weight, whose gradient is told, even where no book or scale takes one."""
    weight = weight if weight.requires_grad else weight.requires_grad_()
    weight.register_hook(lambda gradient: watch(gradient.detach()))
    return weight


def _nearest(vectors_VD: Tensor, words_WD: Tensor, code_V: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """int64 [V, num] and float32 [V, num]: the stored word and the nearest others, with their distances."""
    found, distances = [], []
    rows = max(LEAST_ROWS, DISTANCES // len(words_WD))
    for vectors, code in zip(vectors_VD.split(rows), code_V.split(rows), strict=True):
        distance = torch.cdist(vectors, words_WD)
        mine = distance.gather(1, code[:, None])
        others = distance.scatter(1, code[:, None], torch.inf).topk(num - 1, largest=False)
        found.append(torch.cat([code[:, None], others.indices], dim=1))
        distances.append(torch.cat([mine, others.values], dim=1))
    return torch.cat(found), torch.cat(distances)
