"""Which half of classifier-free guidance a denoiser's call holds: both in one batch, one of two calls of a step, or none.

The length of a batch alone does not tell: two prompts of a pipeline that calls once for each half (Wan) are as long as both halves
of one prompt. So it is held against the number of prompts that the pipeline was given. Two calls for that many prompts, one behind
the other, at one time and of the same latents, are the halves of a step; schedulers of second order call twice at one time too, but
with other latents. Which half comes first is the family's ``CfgLayout``. Kept calls of several prompts can contradict it, since the
unconditional half is given the same text for all: what learns from the halves looks.

Everything that tells the halves apart goes by this: the keys of ranges (``record.py``), and calls that are learned from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import latents_of, time_of
from dqtk.resolve import adapters
from dqtk.sites import CfgLayout

from .levels import at_level
from .replay import Call

Branches = tuple[str, ...]  # of a call: what its batch holds, in equal parts
ALL: Branches = ("all",)  # a call that is not split by guidance
_SAME = 1e-2  # of a row's norm: what another batch may do to a text's embedding


class Halves:
    """Follows the calls of one denoiser in one run of its pipeline with ``num_prompts`` prompts."""

    def __init__(self, module: nn.Module, num_prompts: int):
        adapter = adapters().get(type(module).__name__)
        self.module, self.num_prompts = module, num_prompts
        self.layout = CfgLayout() if adapter is None else adapter.cfg_layout
        self._sizes: list[int] = []  # batches of the calls of the step in progress
        self._time: float | None = None
        self._latents: Any = None

    def see(self, arguments: Mapping[str, Any]) -> list[Branches]:
        """Take a call. Returns what the calls of the step before held, where this one begins another, else nothing."""
        time, latents = _time(arguments), latents_of(self.module, arguments)
        same_step = bool(self._sizes) and time is not None and time == self._time and _same(latents, self._latents)
        ended = [] if same_step else self.end()
        self._time, self._latents = time, latents
        self._sizes.append(_length(latents))
        return ended

    @property
    def now(self) -> Branches:
        """What the call in progress holds, where that is both halves; else ``ALL``, since the step may have another call."""
        return self._of(self._sizes[-1]) if self._sizes else ALL

    def end(self) -> list[Branches]:
        """What the calls of the step in progress hold, which is at its end."""
        sizes, self._sizes, self._latents = self._sizes, [], None
        if sizes == [self.num_prompts] * 2:
            return [(half,) for half in self.layout.separate]
        return [self._of(size) for size in sizes]

    def _of(self, size: int) -> Branches:
        return self.layout.batched if size == 2 * self.num_prompts else ALL


def branched(calls: Sequence[Call], parts: Mapping[str, nn.Module], num_prompts: int) -> list[Call]:
    """The calls of one run of a pipeline with so many prompts; those of denoisers say which branches they hold."""
    found = list(calls)
    for name, module in parts.items():
        mine = [index for index, call in enumerate(calls) if call.component == name and call.level is not None]
        halves, branches = Halves(module, num_prompts), list[Branches]()
        for index in mine:
            branches += halves.see(calls[index].kwargs)
        for index, held in zip(mine, branches + halves.end(), strict=True):
            found[index] = replace(found[index], branches=held)
    return found


def guided_steps(name: str, calls: Sequence[Call]) -> list[tuple[int, ...]]:
    """Numbers of the calls that hold both halves together: one, or two that follow each other.

    Args:
        name: of the denoiser, in errors.
        calls: of one denoiser, in the order in which they were made.
    Raises:
        ValueError: calls that do not say what they hold, or have no other half; texts that show that the halves lie the other way.
    """
    found: list[tuple[int, ...]] = []
    index = 0
    while index < len(calls):
        first = calls[index]
        group = calls[index : index + (2 if len(first.branches or ()) == 1 else 1)]
        held = [half for call in group for half in call.branches or ()]
        if sorted(held) != ["cond", "uncond"] or any((call.run, call.time) != (first.run, first.time) for call in group):
            raise _no_halves(name, first)
        found.append(tuple(range(index, index + len(group))))
        index += len(group)
    _check_order(name, calls, found)
    return found


def _check_order(name: str, calls: Sequence[Call], steps: Sequence[tuple[int, ...]]) -> None:
    """Raises ``ValueError`` where what should be the prompts' half is given the same for all of them, and the other one is not."""
    given: dict[str, dict[str, list[Tensor]]] = {"uncond": {}, "cond": {}}  # half -> argument -> a tensor for every sample
    for step in {calls[step[0]].run: step for step in steps}.values():  # one of every run
        for call in (calls[index] for index in step):
            halves = call.branches or ALL
            for what, samples in _by_sample(call.kwargs, _batch(call)).items():
                size = len(samples) // len(halves)
                for number, half in enumerate(halves):
                    given[half].setdefault(what, []).extend(samples[number * size : (number + 1) * size])
    alike = {half: {what: _alike(rows) for what, rows in by_name.items()} for half, by_name in given.items()}
    fixed = [what for what, same in alike["cond"].items() if same and not alike["uncond"].get(what, True)]
    if fixed and not any(same and not alike["cond"].get(what, True) for what, same in alike["uncond"].items()):
        raise ValueError(
            f"refine: the unconditional half of guidance must be the one with the same text for all prompts, got {fixed[0]} of "
            f"{name} that is the same in the other half. Leave guidance out, or say the order in an adapter of its family "
            "(Adapter.cfg_layout)."
        )


def _batch(call: Call) -> int:
    """Samples in a call's batch: in its first argument, with which pipelines give the latents."""
    return _length(next(iter(call.kwargs.values()), None))


def _by_sample(given: Mapping[str, Any], size: int) -> dict[str, Sequence[Tensor]]:
    """Argument -> a tensor for each sample of the batch; arguments without are left out."""
    found: dict[str, Sequence[Tensor]] = {}
    for name, value in given.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": samples for inner, samples in _by_sample(value, size).items()}
        elif size and _length(value) == size and all(isinstance(sample, Tensor) for sample in value):
            found[name] = list(value)
    return found


def _alike(samples: Sequence[Tensor]) -> bool:
    """Whether all are one, up to rounding; one alone tells nothing."""
    first = samples[0].float()
    same = [sample.shape == first.shape and float((sample - first).norm()) <= _SAME * float(first.norm()) for sample in samples[1:]]
    return all(same)


def _no_halves(name: str, call: Call) -> ValueError:
    size = _batch(call)
    if call.branches is None:
        got, remedy = f"a batch of {size} that may be either", "Calibrate again with this version, which keeps it with every call"
    elif call.branches == ALL:
        got, remedy = (
            f"a batch of {size} in which no halves can be told",
            "Leave it out, or calibrate with the guidance of later use",
        )
    else:
        got, remedy = f"a batch of {size} of one half alone", "Leave it out, or keep the calls of whole steps"
    return ValueError(
        f"refine: guidance must be None for calls of {name} that do not hold both halves of guidance, got {got}"
        f"{at_level(call.level)}. {remedy}."
    )


def _time(arguments: Mapping[str, Any]) -> float | None:
    time = time_of(arguments)
    return None if time is None or not time.numel() else float(time.detach().float().reshape(-1)[0])


def _length(latents: Any) -> int:
    """Samples in a batch, which may be a list of them; 0 for what is no batch."""
    if isinstance(latents, Tensor):
        return latents.shape[0] if latents.ndim else 0
    return len(latents) if isinstance(latents, list | tuple) else 0


def _same(a: Any, b: Any) -> bool:
    """Whether two batches are alike to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return False
