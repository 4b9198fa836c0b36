"""Books that several layers share: weighted k-means on vectors of all of them, before any layer is solved.

Each layer gives the group a share of the sample that is its share of the weights, drawn at random, so memory is that of one layer
and one sample whatever the group. A vector counts as in books of the layer's own, by the scale of its row and the second moments of
its inputs, but relative to the layer's mean: what one layer's errors are worth against another's nobody knows here, and absolute
ones would leave the book to the layers with the largest inputs (tiny-pixart, GPTQ, 256 words of 4 for all layers: SQNR 18.5 dB
against 18.1).
"""

import math
from collections.abc import Callable, Iterable
from functools import reduce

import torch
from torch import Tensor

from dqtk.numerics.vector_grid import in_units, root_mean_square
from dqtk.spec import Hadamard, LayerSpec, VectorCodebook

from .books import learned_books, sample_of
from .solve import rotation
from .vectors import importance_of


class SharedVectors:
    """Vectors of the layers of some groups, from which ``books`` are learned.

    layers: the spec and the number of weights of each.
    """

    def __init__(self, layers: Iterable[tuple[LayerSpec, int]]):
        self.forms: dict[str, VectorCodebook] = {}
        self.totals: dict[str, int] = {}
        self.drawn: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for spec, num_weights in layers:
            form = _form(spec)
            assert form.group is not None
            self.forms[form.group] = form
            self.totals[form.group] = self.totals.get(form.group, 0) + num_weights
        self.draw = torch.Generator().manual_seed(0)

    def add(self, weight: Tensor, spec: LayerSpec, channels: int, squares: Tensor | None = None) -> None:
        """Draw vectors of a layer's weight [N, K] in the basis in which they are stored. ``squares`` [K]: mean squares of its
        inputs in that basis, where the layer learns from inputs."""
        form, weight = _form(spec), basis_of(spec, channels)(weight.float())
        squares = None if squares is None else squares.to(weight.device)
        scale = root_mean_square(weight, spec.weight)
        vectors = in_units(weight, scale).reshape(-1, form.length)
        importance = importance_of(scale, weight, form.length, squares).reshape(-1)
        importance = importance / importance.mean().clamp(min=1e-30)
        assert form.group is not None
        num = math.ceil(sample_of(form) * weight.numel() / self.totals[form.group])
        some = torch.randperm(len(vectors), generator=self.draw)[:num].to(vectors.device)
        self.drawn.setdefault(form.group, []).append((vectors[some], importance[some]))

    def books(self) -> dict[str, Tensor]:
        """float16 [books, words, length] of every group."""
        found = {}
        for group, drawn in self.drawn.items():
            device = drawn[0][0].device
            vectors, importance = (torch.cat([each[part].to(device) for each in drawn]) for part in (0, 1))
            found[group] = learned_books(vectors, self.forms[group], importance)
        return found


def basis_of(spec: LayerSpec, channels: int) -> Callable[[Tensor], Tensor]:
    """Rows [..., K] of a weight or an input -> the same in the basis in which a layer that shares books is stored."""
    turns = []
    for transform in spec.transforms:
        assert isinstance(transform, Hadamard)
        turns.append(rotation(transform, channels))
    return lambda rows: reduce(lambda x, turn: turn(x), turns, rows)


def _form(spec: LayerSpec) -> VectorCodebook:
    form = spec.weight.format
    assert isinstance(form, VectorCodebook)
    return form
