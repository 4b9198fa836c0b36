"""A quantized layer while it learns: the weight that its codes and scales stand for, with gradients.

A stored weight is ``(level - zero) * step`` with a level of the format's table. While a layer learns, level = nearest(v) with
v [N, K] = start + unit * moved, and the derivative of rounding is passed over (straight through). start is the code, or where the
exact weight lies in the code's cell. ``unit`` is the distance to the next level, so one learning rate serves all layers and
formats. ``moved`` is free, or a product of two thin matrices (``shifts.py``); zero points are moved and rounded alike. The forward
only ever sees rounded numbers, so storing them changes none. Scales learn by a factor exp(s) and are rounded to their stored dtype
in the same way, and so do the factors of a stored branch (``stored_branch.py``). A branch that is there for a while is added to the
levels (``rank_decay.py``).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels import to_matrix
from dqtk.nn import Quantized
from dqtk.nn.products import Stored
from dqtk.numerics.affine import encode, levels, nearest_level
from dqtk.numerics.floats import e8m0_decode, step_of
from dqtk.numerics.packing import Packed, count_groups, pack_codes, selector_bits, unpack, weight_levels
from dqtk.numerics.storage import stored_name
from dqtk.spec import VECTORS, Codebook, E8M0Group, Float, Format, Int, TensorSpec, TwoLevel

from .left_over import left_over
from .rank_decay import DECAYING, Branch
from .shifts import CODES, ZEROS, Shifts
from .stored_branch import FACTORS, StoredBranch
from .trained_vectors import TrainedBooks, TrainedVectors

SCALES = ("scale",)
MARGIN = 0.45  # of a step: how far from its code a number may start whose exact place is beyond the cell
__all__ = ["CODES", "DECAYING", "FACTORS", "SCALES", "ZEROS", "Trained", "training"]


class Trained:
    """The learned numbers of one layer, or of one part of a layer whose input is split.

    parameters: float32 by name: those of codes and, where there are some, of zero points (``CODES``, ``ZEROS``), of the stored
    branch and of one that decays (``FACTORS``, ``DECAYING``); ``scale``, the logarithm of a factor on every stored scale, where
    there are float ones. path: of the layer.
    """

    def __init__(self, layer: Quantized, stored: Stored, index: int, rank: int | None, draw: torch.Generator, path: str = ""):
        self.layer, self.stored, self.index, self.path = _any(layer), _any(stored), index, path
        self.spec, self.k = stored.spec.weight, _any(stored).k
        packed = stored.packed()
        self.packed, self.groups = packed, count_groups(self.spec, self.k)
        self.start = self.code = weight_levels(packed, self.spec, self.k)
        self.which = _which(packed, self.spec, self.k)
        self.unit = _unit(self.start, self.spec.format)
        self.moved = Shifts(CODES, self.start, rank, draw)
        self.zeros = None if packed.zero is None else Shifts(ZEROS, packed.zero, rank, draw)
        self.kept = None if self.stored.down is None else StoredBranch(self.stored.down, self.stored.up)
        self.branch: Branch | None = None
        self.scales = {} if packed.scale is None else {"scale": nn.Parameter(torch.zeros_like(packed.scale, dtype=torch.float32))}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that learns, by name."""
        more = [part.parameters for part in (self.zeros, self.kept, self.branch) if part is not None]
        found = self.moved.parameters | self.scales
        for named in more:
            found = found | named
        return found

    @torch.no_grad()
    def begin_at(self, original: nn.Module) -> None:
        """Let v start where the original's weight lies, or at the edge of its code's cell on that side: no code changes, and those
        that were nearly another one change first."""
        form, step = self.spec.format, left_over(self, original)
        edge = self.unit * MARGIN * step.sign()
        for near in (self.code + step, self.code + edge, self.code + edge / 2):  # the cell below a power of two is half as wide
            inside = _Nearest.apply(near, form, self.which) == self.code
            self.start = torch.where(inside & (self.start == self.code), near, self.start)

    def values(self) -> Tensor:
        """v, float32 [N, K], in levels."""
        return self.start + self.unit * self.moved()

    def zero(self) -> Tensor | None:
        """The zero points as they would be stored, in their shape; float32 numbers."""
        if self.packed.zero is None or self.zeros is None:
            return None
        assert isinstance(self.spec.format, Int)
        zero = self.packed.zero.float() + self.zeros()
        return zero + (zero.round().clamp(0, 2**self.spec.format.bits - 1) - zero).detach()

    def scale(self) -> Tensor | None:
        """The scales as they would be stored, in their shape; float32 numbers."""
        if self.packed.scale is None:
            return None
        scale = self.packed.scale.float() * self.scales["scale"].exp()
        return scale + (scale.to(self.packed.scale.dtype).float() - scale).detach()

    def _factors(self) -> tuple[Tensor | None, Tensor]:
        """What levels are multiplied with, in this order, each a number per group: integers of two-level groups, steps."""
        group_scale, scale = self.packed.group_scale, self.scale()
        if isinstance(self.spec.granularity, E8M0Group):
            assert group_scale is not None
            return None, e8m0_decode(group_scale)
        assert scale is not None
        if isinstance(self.spec.granularity, TwoLevel):  # codes times group scales first: as the integer kernels have it
            assert group_scale is not None
            return group_scale.float(), scale
        return None, scale if group_scale is None else group_scale.float() * scale

    def steps(self) -> Tensor:
        """float32 [N, K]: what one step of the grid is worth."""
        first, step = self._factors()
        step = step if first is None else first * step
        return step.expand(len(self.start), -1).repeat_interleave(self.k // step.shape[1], dim=1)

    def weight(self) -> Tensor:
        """float32 [N, K]: the numbers that ``packing.dequantize`` finds after ``store``, bit for bit; a branch that decays is
        added."""
        level = _Nearest.apply(self.values(), self.spec.format, self.which)
        level = level.unflatten(1, (self.groups, -1)) if self.groups > 1 else level[:, None]
        if (zero := self.zero()) is not None:
            level = level - zero.view(-1, self.groups, 1)
        if self.branch is not None and (more := self.branch.levels()) is not None:
            level = level + more.view(level.shape)
        first, step = self._factors()
        if first is not None:
            level = level * first[..., None]
        return (level * step[..., None]).flatten(1)

    @torch.no_grad()
    def store(self) -> None:
        """Put codes, zero points, scales and branch into the layer."""
        spec, v = self.spec, self.values()
        one = torch.ones((), device=v.device)
        codes = encode(v, one, None, spec.format)
        for index in range(1, _tables(spec.format)):
            assert self.which is not None
            codes = torch.where(self.which == index, encode(v, one, None, spec.format, index), codes)
        found: dict[str, Tensor | None] = {"qweight": pack_codes(codes, spec), "zero": self.zero(), "scale": self.scale()}
        if self.kept is not None:
            found["down"], found["up"] = self.kept()
        for name, tensor in found.items():
            if tensor is not None:
                there = stored_name(name, self.index)
                setattr(self.layer, there, tensor.to(getattr(self.layer, there).dtype))


@contextmanager
def training(
    layers: Mapping[str, Quantized],
    rank: int | None,
    draw: torch.Generator,
    originals: Mapping[str, nn.Module] | None = None,
    candidates: int = 1,
) -> Iterator[dict[str, Trained | TrainedVectors]]:
    """While open, layers (by path) compute with what they learn. Afterwards with what they store.

    A layer whose input is split learns in parts: ``path``, ``path_2`` and so on. ``originals``: the layers before they were
    quantized, where vectors choose among ``candidates``.
    """
    learning: dict[str, Trained | TrainedVectors] = {}
    shared: dict[str, TrainedBooks] = {}
    for path, layer in layers.items():
        layer.release_kept()  # compiled code would go on with what was decoded before
        for index, stored in enumerate(_any(layer).parts or (layer,)):
            vectors = isinstance(stored.spec.weight.format, VECTORS)
            if vectors:
                exact = None if originals is None or path not in originals else _matrix(originals[path])
                made: Trained | TrainedVectors = TrainedVectors(layer, stored, index, exact, candidates, path, shared)
            else:
                made = Trained(layer, stored, index, rank, draw, path)
            learning[stored_name(path, index)] = made
    try:
        for mine in learning.values():
            served: dict[str, Callable] = {"learned": mine.weight}
            if isinstance(mine, Trained) and mine.kept is not None:
                served["learned_branch"] = mine.kept
            vars(mine.stored).update(served)
        yield learning
    finally:
        for mine in learning.values():
            for name in ("learned", "learned_branch"):
                vars(mine.stored).pop(name, None)


class _Nearest(torch.autograd.Function):
    """The nearest levels; gradients pass as if nothing were rounded."""

    @staticmethod
    def forward(ctx, v, form, which):
        level = nearest_level(v, form)
        for index in range(1, _tables(form)):
            level = torch.where(which == index, nearest_level(v, form, index), level)
        return level

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


def _matrix(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return (weight if weight.ndim == 2 else to_matrix(weight)).detach()


def _any(layer):
    """A layer as what it also is: a torch module."""
    return layer


def _tables(form: Format) -> int:
    return len(form.tables) if isinstance(form, Codebook) else 1


def _which(packed: Packed, spec: TensorSpec, k: int) -> Tensor | None:
    """int64 [N, K]: table of every weight, where there are several."""
    form, groups = spec.format, count_groups(spec, k)
    if packed.selector is None:
        return None
    assert isinstance(form, Codebook)
    return unpack(packed.selector, selector_bits(form), groups).long().repeat_interleave(k // groups, dim=1)


def _unit(level: Tensor, form: Format) -> Tensor:
    """Distance to the next level: 1 for integers, that of its binade for floats, the mean one for tables."""
    if isinstance(form, Float):
        return step_of(level, form)
    if isinstance(form, Codebook):
        table = levels(torch.arange(2**form.bits, dtype=torch.uint8, device=level.device), form)
        return (table.amax() - table.amin()) / (len(table.unique()) - 1)
    return torch.ones((), device=level.device)
