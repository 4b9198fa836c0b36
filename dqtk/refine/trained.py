"""A quantized layer while it learns: the weight that its codes and scales stand for, with gradients.

A stored weight is ``(level - zero) * step`` with a level of the format's table. While a layer learns, level = nearest(v) with
v [N, K] = start + unit * moved, and the derivative of rounding is passed over (straight through). ``unit`` is the distance to the
next level, so one learning rate serves all layers and formats. ``moved`` is a matrix of its own, or a product up @ down of two thin
ones: QALoRA of EfficientDM (He et al. 2023, arXiv 2310.03270, section 3.2), there in the unit of the weight and beside the original
weight, here in levels and beside the solver's. Either way the forward only ever sees rounded weights, so that storing them changes
no number. Scales learn by a factor exp(s) and are rounded to their stored dtype in the same way.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels import to_matrix
from dqtk.nn import Quantized
from dqtk.nn.products import WEIGHT, Stored
from dqtk.numerics.affine import encode, levels, nearest_level
from dqtk.numerics.floats import e8m0_decode, step_of
from dqtk.numerics.packing import Packed, count_groups, pack_codes, selector_bits, unpack, weight_levels
from dqtk.numerics.storage import stored_name
from dqtk.spec import VECTORS, Codebook, E8M0Group, Float, Format, TensorSpec, TwoLevel

from .trained_vectors import TrainedVectors


class Trained:
    """The learned numbers of one layer, or of one part of a layer whose input is split.

    parameters: float32 by name: ``moved`` [N, K], or ``down`` [R, K] and ``up`` [N, R]; ``scale``, the logarithm of a factor on
    every stored scale, where there are float ones.
    """

    def __init__(self, layer: Quantized, stored: Stored, index: int, rank: int | None, draw: torch.Generator):
        self.layer, self.stored, self.index = layer, stored, index
        self.spec, self.k = stored.spec.weight, _any(stored).k
        packed = Packed(**{name: getattr(stored, name) for name in WEIGHT})
        self.packed, self.groups = packed, count_groups(self.spec, self.k)
        self.start = weight_levels(packed, self.spec, self.k)
        self.which = _which(packed, self.spec, self.k)
        self.unit = _unit(self.start, self.spec.format)
        n, device = self.start.shape[0], self.start.device
        self.parameters: dict[str, nn.Parameter] = {}
        if rank is None or rank >= min(n, self.k):
            self.parameters["moved"] = nn.Parameter(torch.zeros_like(self.start))
        else:
            down = torch.randn(rank, self.k, generator=draw) / math.sqrt(rank)  # drawn on the CPU: the same on every device
            self.parameters["down"] = nn.Parameter(down.to(device))
            self.parameters["up"] = nn.Parameter(torch.zeros(n, rank, device=device))
        if packed.scale is not None:
            self.parameters["scale"] = nn.Parameter(torch.zeros_like(packed.scale, dtype=torch.float32))

    def values(self) -> Tensor:
        """v, float32 [N, K], in levels."""
        mine = self.parameters
        moved = mine["moved"] if "moved" in mine else mine["up"] @ mine["down"]
        return self.start + self.unit * moved

    def scale(self) -> Tensor | None:
        """The scales as they would be stored, in their shape; float32 numbers."""
        if self.packed.scale is None:
            return None
        scale = self.packed.scale.float() * self.parameters["scale"].exp()
        return scale + (scale.to(self.packed.scale.dtype).float() - scale).detach()

    def weight(self) -> Tensor:
        """float32 [N, K]: the numbers that ``packing.dequantize`` finds after ``store``, bit for bit."""
        spec, packed = self.spec, self.packed
        level = _Nearest.apply(self.values(), spec.format, self.which)
        level = level.unflatten(1, (self.groups, -1)) if self.groups > 1 else level[:, None]
        if packed.zero is not None:
            level = level - packed.zero.float().view(-1, self.groups, 1)
        scale = self.scale()
        if isinstance(spec.granularity, E8M0Group):
            assert packed.group_scale is not None
            step = e8m0_decode(packed.group_scale)
        elif isinstance(spec.granularity, TwoLevel):  # codes times group scales first: as the integer kernels have it
            assert packed.group_scale is not None
            assert scale is not None
            level, step = level * packed.group_scale.float()[..., None], scale
        else:
            assert scale is not None
            step = scale if packed.group_scale is None else packed.group_scale.float() * scale
        return (level * step[..., None]).flatten(1)

    @torch.no_grad()
    def store(self) -> None:
        """Put codes and scales into the layer."""
        spec, v = self.spec, self.values()
        one = torch.ones((), device=v.device)
        codes = encode(v, one, None, spec.format)
        for index in range(1, _tables(spec.format)):
            assert self.which is not None
            codes = torch.where(self.which == index, encode(v, one, None, spec.format, index), codes)
        setattr(self.layer, stored_name("qweight", self.index), pack_codes(codes, spec))
        scale = self.scale()
        if scale is not None and self.packed.scale is not None:
            setattr(self.layer, stored_name("scale", self.index), scale.to(self.packed.scale.dtype))


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
    for path, layer in layers.items():
        for index, stored in enumerate(_any(layer).parts or (layer,)):
            vectors = isinstance(stored.spec.weight.format, VECTORS)
            if vectors:
                exact = None if originals is None or path not in originals else _matrix(originals[path])
                made: Trained | TrainedVectors = TrainedVectors(layer, stored, index, exact, candidates)
            else:
                made = Trained(layer, stored, index, rank, draw)
            learning[stored_name(path, index)] = made
    try:
        for mine in learning.values():
            vars(mine.stored)["learned"] = mine.weight
        yield learning
    finally:
        for mine in learning.values():
            vars(mine.stored).pop("learned", None)


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
