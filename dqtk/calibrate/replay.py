"""Calls of denoisers and text encoders, kept so that they can be made again: what solvers learn from.

A pipeline is run once; of its denoiser calls some are kept with their arguments, evenly over the noise levels. Whatever a solver
needs of a layer's inputs is found later by making these calls again and stopping behind the layer. So nothing per layer is held
while the pipeline runs, memory is bounded by what is asked for at a time, and the inputs may come from the unquantized or from the
partly quantized model.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dqtk.calls import given_arguments, time_of
from dqtk.sites import repeated_block

from .placement import Placement
from .waypoint import Tell, Waypoint


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a component in a run of the pipeline.

    level: its noise level in [0, 1], None for text encoders. branches: what its batch holds, in equal parts: both halves of
    guidance, one of them, or "all" (``guidance.py``); None: not known, as of text encoders and of files from before it was kept.
    """

    component: str
    args: tuple
    kwargs: dict[str, Any]
    level: float | None
    run: int = 0
    branches: tuple[str, ...] | None = None

    @property
    def time(self) -> float | None:
        """The time that a denoiser was given, for grouping the calls of one step."""
        given = time_of(self.kwargs) if self.kwargs else None
        return None if given is None else float(given.detach().float().reshape(-1)[0])


@contextmanager
def capturing(parts: Mapping[str, nn.Module], level_of: Callable[[str, nn.Module, Mapping], float | None]) -> Iterator[list[Call]]:
    """While open, every call of these components is appended to the list, with copies of its tensors (equal ones copied once)."""
    calls: list[Call] = []
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_inference():  # without a version, by which changes could be told
            return value.cpu().clone()
        key = (id(value), value._version)
        if key not in copies:
            copies[key] = (value, value.detach().cpu().clone())  # the original is kept alive, so that its id stays its own
        return copies[key][1]

    def hook(name: str) -> Callable:
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            given = given_arguments(module, args, kwargs)
            calls.append(Call(name, (), tree_map(copied, given), level_of(name, module, given)))

        return keep

    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        yield calls


def kept(calls: Sequence[Call], num_steps: int, run: int, placement: Placement) -> list[Call]:
    """Of the calls of one pipeline run: all of text encoders, and those of ``num_steps`` steps of the denoisers.

    Calls that follow each other at one time (separate calls for both halves of guidance) are one step. ``run`` numbers the runs, so
    that the next one takes other steps.
    """
    steps: list[list[Call]] = []
    for call in calls:
        if call.level is None:
            continue
        if steps and steps[-1][0].time == call.time and steps[-1][0].time is not None:
            steps[-1].append(call)
        else:
            steps.append([call])
    levels = [step[0].level or 0.0 for step in steps]
    chosen = placement.choose(levels, min(num_steps, len(steps)), run) if steps else []
    mine = [call for call in calls if call.level is None] + [call for index in chosen for call in steps[index]]
    return [replace(call, run=run) for call in mine]


@torch.no_grad()
def made(module: nn.Module, calls: Sequence[Call]) -> Iterator[Any]:
    """Make calls again, to their end; what each returns."""
    for call in calls:
        yield module(**arguments_for(module, call))


class _Enough(Exception):
    """Everything that was asked for has been seen."""


@torch.no_grad()
def replay(
    module: nn.Module,
    calls: Sequence[Call],
    watched: Mapping[str, Callable[[Tensor, Call], None]],
    waypoint: Waypoint | None = None,
) -> None:
    """Make calls again, and hand the inputs of layers (by path) to their functions; a call ends behind the last watched layer.

    ``waypoint``: of this module and these calls; they begin there where they can, and it moves on to where they end.

    Raises ``ValueError`` for a path that no call reaches.
    """
    if not calls or not watched:
        return
    usual = counted(module, calls[0], watched) if waypoint is None else waypoint.counts
    total = {path: usual.get(path, math.inf) for path in watched}  # a layer that the first call misses: others run to their end
    left: dict[str, float] = {}
    listening: list[Tell] = []
    seen: set[str] = set()

    def hook(path: str) -> Callable:
        def see(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            listening[-1](path, args[0] if args else kwargs["input"])
            seen.add(path)
            left[path] = left.get(path, 1) - 1
            if not left[path]:
                del left[path]
            if not left:
                raise _Enough

        return see

    def make(call: Call, tell: Tell) -> None:
        left.clear()
        left.update(total)
        listening[:] = [tell]
        with suppress(_Enough):
            module(**arguments_for(module, call))

    with ExitStack() as hooks:
        for path in watched:
            hooks.callback(module.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True).remove)
        for index, call in enumerate(calls):

            def tell(path: str, x: Tensor, call: Call = call) -> None:
                watched[path](x, call)

            if waypoint is None:
                make(call, tell)
            else:
                waypoint.replayed(index, watched, partial(make, call), tell)
    if waypoint is not None:
        waypoint.advance(watched)
    missing = sorted(set(watched) - seen)
    if missing:
        raise ValueError(
            f"calibrate: layer {missing[0]} must be called while the pipeline runs, got no call of it and {len(missing) - 1} more. "
            "Keep it at 16 bits."
        )


def waypoint_for(module: nn.Module, calls: Sequence[Call], paths: Collection[str], limit: int) -> Waypoint:
    """For replays of these calls that look into these layers, by and by; ``limit``: bytes that it may keep."""
    return Waypoint(module, counted(module, calls[0], {*paths, *(repeated_block(path) for path in paths)}), limit)


def counted(module: nn.Module, call: Call, paths: Collection[str]) -> dict[str, int]:
    """How often one call reaches each layer or block, in order of first arrival."""
    seen: dict[str, int] = {}

    def hook(path: str) -> Callable:
        def count(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            seen[path] = seen.get(path, 0) + 1

        return count

    with ExitStack() as hooks, torch.no_grad():
        for path in paths:
            hooks.callback(module.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True).remove)
        module(**arguments_for(module, call))
    return seen


def arguments_for(module: nn.Module, call: Call) -> dict[str, Any]:
    """A call's arguments where the module is, and in its dtype where the call was made in another one.

    What tells is the first floating tensor of more than one dimension: latents. Tensors of its dtype follow; what the pipeline gave
    in another precision keeps it.
    """
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if weight is None else weight.device
    given = [value for value in tree_leaves(call.kwargs) if isinstance(value, Tensor)]
    theirs = next((value.dtype for value in given if value.is_floating_point() and value.ndim > 1), None)
    mine = theirs if weight is None else getattr(module, "dtype", weight.dtype)  # hosts keep some layers in float32

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        follows = theirs is not None and value.dtype == theirs != mine and value.ndim > 1
        return value.to(device, mine if follows else None)

    return tree_map(moved, dict(call.kwargs))


# --- files -----------------------------------------------------------------------------------------------------------


def to_tensors(calls: Sequence[Call]) -> tuple[dict[str, Tensor], str]:
    """Tensors by name (each shared one once), and everything else as JSON that names them.

    Raises ``ValueError`` for an argument that is neither tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            name = names.setdefault(id(value), f"call|{len(names)}")
            tensors[name] = value.contiguous()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {"dict": {str(key): plain(part, f"{where}.{key}") for key, part in value.items()}}
        if type(value) in (list, tuple, torch.Size):
            return {"list" if isinstance(value, list) else "tuple": [plain(part, where) for part in value]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ValueError(
            f"calibrate: argument {where} must be a tensor or plain data to be stored, got {type(value).__name__}. "
            "Calibrate without an output file."
        )

    rows = [[call.component, plain(call.kwargs, call.component), call.level, call.run, call.branches] for call in calls]
    return tensors, json.dumps(rows)


def from_tensors(tensors: Callable[[str], Tensor], text: str) -> list[Call]:
    """Inverse of ``to_tensors``; of rows without run or branches, as files had them before, too."""
    loaded: dict[str, Tensor] = {}

    def value_of(data: dict) -> Any:
        ((kind, content),) = data.items()
        if kind == "tensor":
            if content not in loaded:
                loaded[content] = tensors(content)
            return loaded[content]
        if kind == "dict":
            return {key: value_of(part) for key, part in content.items()}
        if kind in ("list", "tuple"):
            parts = [value_of(part) for part in content]
            return parts if kind == "list" else tuple(parts)
        return content

    def call_of(component: str, kwargs: dict, level: float | None, run: int = 0, branches: list[str] | None = None) -> Call:
        return Call(component, (), value_of(kwargs), level, run, None if branches is None else tuple(branches))

    return [call_of(*row) for row in json.loads(text)]
