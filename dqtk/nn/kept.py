"""Decoded weights that stay in memory, for who has more of it than time: up to a budget, those whose decoding costs most per byte.

A decoded weight lies beside the codes that it was decoded from, outside the layer's buffers: it is never saved, copied or pickled.
It is let go of as soon as one of the codes' tensors is another one, was changed in place, or lies on another device, and when the
compute dtype changes: a layer then decodes again. A compiler sees none of that but another tensor or none in its place, so loading,
moving and ``fill`` let go at once; who writes into the buffers of a compiled layer must call ``release``.

Only layers whose inputs are not rounded decode what they multiply with; a layer with several weights for intervals of the noise
level goes on decoding.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import denoisers
from dqtk.ops import WEIGHT_ONLY

from .layers import Quantized
from .products import KeptWeight
from .stepped import Stepped

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CALLS = 3  # of which the fastest is what decoding costs


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """What is kept or not: a layer, or one part of a layer whose input is split. seconds: of decoding it once."""

    path: str
    stored: Any
    num_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptDecoded:
    """What ``keep_decoded`` did. num_bytes: of the decoded weights. paths: of the layers that have them; left: of those that
    decode at every call, for want of room. Used in ``with``, it lets go at the end.
    """

    num_bytes: int
    paths: tuple[str, ...]
    left: tuple[str, ...]
    modules: tuple[nn.Module, ...]

    def release(self) -> None:
        """Let go of all decoded weights of these modules."""
        release(self.modules)

    def __enter__(self) -> "KeptDecoded":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def keep_decoded(target: Any, budget: float | str) -> KeptDecoded:
    """Keep decoded weights of quantized layers, in the compute dtype, as far as a budget goes.

    Args:
        target: pipeline (its denoisers), or one module. What was kept before is let go of.
        budget: bytes (whole ones, rounded down), or a size such as ``"2GiB"`` or ``"500MB"``.
    Returns:
        What is kept, and what is not.
    Raises:
        ValueError: a budget that is no size; a model without layers that decode; layers that an offload hook moves at every call.
    """
    room = size_of(budget)
    modules = (target,) if isinstance(target, nn.Module) else tuple(denoisers(target).values())
    release(modules)
    units = [unit for module in modules for unit in _units(module)]
    if not units:
        raise ValueError(
            "keep_decoded: the model must have layers that decode their weights (16-bit inputs), got none. Integer layers multiply "
            "codes as they are."
        )
    _refuse_offload(modules)
    kept = chosen(units, room)
    for unit in kept:
        _keep(unit.stored)
    paths = {unit.path for unit in kept}
    left = [unit.path for unit in units if not any(unit is other for other in kept)]
    return KeptDecoded(
        num_bytes=sum(unit.num_bytes for unit in kept),
        paths=tuple(dict.fromkeys(unit.path for unit in units if unit.path in paths)),
        left=tuple(dict.fromkeys(left)),
        modules=modules,
    )


def chosen(units: Sequence[Unit], room: int) -> list[Unit]:
    """As many as fit into ``room`` bytes, those that cost most seconds per byte first; of equals, the first ones of the model."""
    found = []
    for unit in sorted(units, key=lambda unit: -unit.seconds / unit.num_bytes):
        if unit.num_bytes <= room:
            found.append(unit)
            room -= unit.num_bytes
    return found


def release(modules: Iterable[nn.Module]) -> None:
    """Let go of the decoded weights of all layers of these modules."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, Quantized):
                layer.release_kept()


def kept_weights(module: nn.Module) -> list[Tensor]:
    """The decoded weights that layers of a module keep."""
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, Quantized)]
    kept = [stored.kept for layer in layers for stored in (layer, *layer.parts)]
    return [found.matrix for found in kept if found is not None]


def size_of(budget: float | str) -> int:
    """Bytes. Raises ``ValueError`` for what is no positive size."""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget, re.IGNORECASE)
        value = int(float(found[1]) * _UNITS[found[2].upper()]) if found and found[2].upper() in _UNITS else 0
    else:
        finite = isinstance(budget, float) and math.isfinite(budget)
        value = int(budget) if finite or (isinstance(budget, int) and not isinstance(budget, bool)) else 0
    if value <= 0:
        raise ValueError(
            f"keep_decoded: budget must be a number of bytes or a size such as '2GiB', got {budget!r}. Give what is free."
        )
    return value


def _units(module: nn.Module) -> list[Unit]:
    """Of every layer that decodes what it multiplies with. What decoding costs is measured once per spec and shape."""
    found: list[Unit] = []
    seconds: dict[Any, float] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, Quantized) or isinstance(layer, Stepped):
            continue
        own: Any = layer
        for stored in own.parts or (own,):
            if stored.op not in WEIGHT_ONLY or own.qweight.is_meta:
                continue
            key = stored.spec.weight, own.n, stored.k, own.compute_dtype, own.qweight.device
            if key not in seconds:
                seconds[key] = _seconds(partial(stored.stored_matrix, own.compute_dtype), own.qweight.device)
            num_bytes = own.n * stored.k * own.compute_dtype.itemsize
            found.append(Unit(path=path, stored=stored, num_bytes=num_bytes, seconds=seconds[key]))
    return found


def _seconds(decode: Callable[[], Tensor], device: torch.device) -> float:
    """The least of a few."""
    least = float("inf")
    with torch.no_grad():
        for _ in range(_CALLS):
            start = time.perf_counter()
            decode()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            least = min(least, time.perf_counter() - start)
    return least


def _keep(stored: Any) -> None:
    with torch.inference_mode(False), torch.no_grad():
        stored.kept = KeptWeight.of(stored, stored.stored_matrix(stored.compute_dtype))


def _refuse_offload(modules: Iterable[nn.Module]) -> None:
    """Raises ``ValueError`` where accelerate's hooks, or diffusers' of groups, take layers to and fro."""
    for module in modules:
        for path, part in module.named_modules():
            hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
            hook = next((hook for name, hook in hooks.items() if "offload" in name), getattr(part, "_hf_hook", None))
            if hook is not None and _moves(hook):
                where = path or type(module).__name__
                raise ValueError(
                    f"keep_decoded: layers must stay on their device, got {type(hook).__name__} at {where}. "
                    "Offloading would take decoded weights along at every call; leave it off, or decode."
                )


def _moves(hook: Any) -> bool:
    """Whether a hook takes weights away: all of diffusers' that offload; of accelerate's, those that do not merely move inputs."""
    inner = getattr(hook, "hooks", None)  # several, one behind the other
    if isinstance(inner, tuple | list):
        return any(_moves(each) for each in inner)
    return bool(getattr(hook, "offload", "Offload" in type(hook).__name__))
