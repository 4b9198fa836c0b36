"""Layers that read one tensor (q, k and v; gate and up) round it once: the first that is called computes for all.

Modules, names and calls stay the host's: the outputs of the others wait until these are called with the same tensor. Where that
does not come to pass (a processor gives k another tensor), the first such call ends it for good, and each layer computes alone.
How they round is looked at whenever the tensors that say it are others.

Outputs wait in one slot, which is taken and put as a whole: two threads that run one model take turns at worst. What is in a slot
holds its input, so no other tensor can be mistaken for it, and knows its version, so a change in place is seen.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels import linears_int8
from dqtk.spec import LayerSpec

from .layers import QuantLinear

ROUNDED = ("smooth", "input_scale", "input_zero")
"""Buffers that say how an input is rounded."""


def share_input(holder: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Let layers of a module that read one tensor round it once, if their specs round it alike. Called again when one of them was
    replaced."""
    members: list[Any] = [layer for layer in layers if _could_share(layer)]
    alike = len({(layer.k, layer.spec.input, layer.spec.transforms, layer.stored_width) for layer in members}) == 1
    group = SharedInput(holder, members) if len(members) > 1 and alike else None
    for layer in members:
        layer.shared = group


def _could_share(layer: Any) -> bool:
    is_one = isinstance(layer, QuantLinear) and isinstance(layer.spec, LayerSpec)
    return is_one and layer.op == "linear_int8" and layer.rounds_plainly


class SharedInput:
    """Layers of one module that read one tensor, and the outputs of those that have not been called with it yet.

    A copy of a model has groups of its own; a layer that is copied without its module has none, nor has what was pickled.
    """

    def __init__(self, holder: nn.Module, layers: Sequence[Any]):
        self.holder = weakref.ref(holder)
        self.layers = tuple(layers)
        self.is_alike = self.seen = False
        self.looked_at: list[tuple[Tensor, int]] = []
        self.broken_off = 0
        self.waiting: tuple[Tensor, int, list[Tensor | None]] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedInput | None":
        holder = memo.get(id(self.holder()))
        if holder is None:
            return None
        memo[id(self)] = made = SharedInput(holder, ())
        made.layers = copy.deepcopy(self.layers, memo)
        return made

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """What ``layer`` answers to ``x``; None if it has to be computed alone.

        Under inference mode tensors have no version, and compilers know none: a compiled model shares what was shared before.
        """
        place = next((i for i, member in enumerate(self.layers) if member is layer), None)
        compiling = torch.compiler.is_compiling()
        if place is None or (not self.seen if compiling else x.is_inference()):
            return None
        version = 0 if compiling else x._version
        waiting, self.waiting = self.waiting, None
        if waiting is None:
            return self._begun(place, x, version)
        held, held_version, outputs = waiting
        y = outputs[place]
        if held is x and held_version == version and y is not None:
            self._wait(x, version, [None if i == place else other for i, other in enumerate(outputs)])
            return y
        if y is None and held is not x and self.broken_off == 0:  # nobody called the others; perhaps the pass was interrupted
            self.broken_off = 1
            return self._begun(place, x, version)
        self.layers = ()
        return None

    def _begun(self, place: int, x: Tensor, version: int) -> Tensor | None:
        """Of the first of the layers, after which the others wait."""
        layers = self.layers
        if any(layer.op != "linear_int8" or layer.qweight.device != x.device for layer in layers):
            return None
        if not torch.compiler.is_compiling():
            self._look(layers)
        if not self.is_alike:
            return None
        first = layers[0]
        stored = [[getattr(layer, name) for layer in layers] for name in ("qweight", "scale", "group_scale", "bias")]
        outputs: list[Tensor | None] = list(
            linears_int8(x, *stored, *first.input_tables(), first.stored_width, first.smooth)  # type: ignore[arg-type]
        )
        y, outputs[place] = outputs[place], None
        self._wait(x, version, outputs)
        return y

    def _wait(self, x: Tensor, version: int, outputs: list[Tensor | None]) -> None:
        is_last = all(y is None for y in outputs)
        self.waiting = None if is_last else (x, version, outputs)
        if is_last and not self.seen:
            self.seen = True
        if is_last and self.broken_off:
            self.broken_off = 0

    def _look(self, layers: Sequence[Any]) -> None:
        """Compare how the layers round, where the tensors that say it, or their values, are others than the last time."""
        tensors = [tensor for layer in layers for name in ROUNDED if (tensor := getattr(layer, name)) is not None]
        now = [(tensor, 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
        same = len(now) == len(self.looked_at) and all(
            tensor is other and version == before for (tensor, version), (other, before) in zip(now, self.looked_at, strict=True)
        )
        if not same or not now:
            self.looked_at, self.is_alike = now, _alike(layers)


def _nothing() -> None:
    """What a pickled group becomes."""


def _alike(layers: Sequence[Any]) -> bool:
    """Whether all round their input alike: ranges and smoothing are found together, but a checkpoint may hold anything."""
    for name in ROUNDED:
        first, *others = (getattr(layer, name) for layer in layers)
        if any((first is None) != (other is None) or (first is not None and not torch.equal(first, other)) for other in others):
            return False
    return True
