"""Which half of classifier-free guidance a denoiser's call holds: both in one batch, one of two calls of a step, or none.

The length of a batch alone does not tell: two prompts of a pipeline that calls once for each half (Wan) are as long as both halves
of one prompt. So it is held against the number of prompts that the pipeline was given. A batch twice as long holds both halves; two
calls of a step for that many prompts, with no third, are the halves. A step is calls one behind the other at one time and of the
same latents: schedulers of second order call twice at one time too, but with other latents. And halves are given different texts:
guidance by a perturbed or an isolated denoiser (PAG, LTX-2's) makes batches and calls just like these, with the prompts' texts in
both. Where nothing but latents and time is given by tensors, no texts can show it.

Which half comes first is the family's ``CfgLayout``. Kept calls of several prompts can contradict it, since the unconditional half
is given the same text for all: what learns from the halves looks.

Everything that tells the halves apart goes by this: the keys of ranges (``record.py``), and calls that are learned from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import TIME_NAMES, latents_of, time_of
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
        self._held: list[Branches] = []  # what each holds by itself
        self._first: Mapping[str, Any] | None = None  # arguments of the step's first call, while a second may be its other half
        self._pair = False  # whether the calls so far are two halves
        self._time: float | None = None
        self._latents: Any = None

    def see(self, arguments: Mapping[str, Any]) -> list[Branches]:
        """Take a call. Returns what the calls of the step before held, where this one begins another, else nothing."""
        time, latents = _time(arguments), latents_of(self.module, arguments)
        same_step = bool(self._sizes) and time is not None and time == self._time and _begin_alike(latents, self._latents)
        ended = [] if same_step else self.end()
        self._time, self._latents = time, latents
        size = _length(latents)
        second = self._sizes == [self.num_prompts] and size == self.num_prompts
        self._pair = second and not _same_texts(self.module, [self._first or {}, arguments])
        self._first = None if self._sizes else arguments
        both = size == 2 * self.num_prompts and not _same_texts(self.module, [arguments])
        self._sizes.append(size)
        self._held.append(self.layout.batched if both else ALL)
        return ended

    @property
    def now(self) -> Branches:
        """What the call in progress holds, where that is both halves; else ``ALL``, since the step may have another call."""
        return self._held[-1] if self._held else ALL

    def end(self) -> list[Branches]:
        """What the calls of the step in progress hold, which is at its end."""
        held = self._held
        if self._pair:
            held = [(half,) for half in self.layout.separate]
        self._sizes, self._held, self._first, self._pair, self._latents = [], [], None, False, None
        return held


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


def guided_steps(name: str, module: nn.Module, calls: Sequence[Call]) -> list[tuple[int, ...]]:
    """Numbers of the calls that make up what the scheduler sees: a call with both halves, two that follow each other with one each,
    or one with neither, in a step in which the pipeline leaves its guidance out (Lumina 2's ``cfg_trunc_ratio``).

    Args:
        name: of the denoiser, in errors.
        module: the denoiser, whose class says which argument the latents are.
        calls: of one denoiser, in the order in which they were made, of whole steps.
    Raises:
        ValueError: calls that do not say what they hold, have no other half, or are neither a half nor all of a step; no step with
            guidance; halves with the same texts; texts that show that the halves lie the other way.
    """
    guided: list[tuple[int, ...]] = []
    plain: list[tuple[int, ...]] = []
    for _, numbers in groupby(range(len(calls)), key=lambda i: (calls[i].run, calls[i].time)):
        step = list(numbers)
        if len(step) == 1 and calls[step[0]].branches == ALL and _all_differ(latents_of(module, calls[step[0]].kwargs)):
            plain.append((step[0],))
            continue
        while step:
            num = 2 if len(calls[step[0]].branches or ()) == 1 else 1
            group, step = tuple(step[:num]), step[num:]
            held = [half for index in group for half in calls[index].branches or ()]
            if sorted(held) != ["cond", "uncond"]:
                raise _no_halves(name, module, calls[group[0]])
            if _same_texts(module, [calls[index].kwargs for index in group]):
                raise _no_halves(name, module, calls[group[0]], same_texts=True)
            guided.append(group)
    if plain and not guided:
        raise _no_halves(name, module, calls[plain[0][0]])
    _check_order(name, module, calls, guided)
    return sorted(guided + plain)


def _check_order(name: str, module: nn.Module, calls: Sequence[Call], steps: Sequence[tuple[int, ...]]) -> None:
    """Raises ``ValueError`` where what should be the prompts' half is given the same for all of them, and the other one is not."""
    given: dict[str, dict[str, list[Tensor]]] = {"uncond": {}, "cond": {}}  # half -> argument -> a tensor for every sample
    for step in {calls[step[0]].run: step for step in steps}.values():  # one of every run
        for call in (calls[index] for index in step):
            halves = call.branches or ALL
            for what, samples in _by_sample(call.kwargs, _length(latents_of(module, call.kwargs))).items():
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


def _same_texts(module: nn.Module, calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two halves are given the same, to the bit, beside latents and time. They are two calls, or those of one call's batch.

    Looks no further than the first difference, which is in the first text where there is one. False where nothing is given that
    could show it.
    """
    given = [dict(_beside(arguments, latents_of(module, arguments))) for arguments in calls]
    if len(given) == 2:
        names = given[0] | given[1]
        return bool(names) and all(_same(given[0].get(what), given[1].get(what)) for what in names)
    size = _length(latents_of(module, calls[0]))
    by_batch = [value for value in given[0].values() if _length(value) == size]
    return bool(by_batch) and all(_same(value[: size // 2], value[size // 2 :]) for value in by_batch)


def _beside(arguments: Mapping[str, Any], latents: Any) -> Iterator[tuple[str, Any]]:
    """Tensors, and lists of them, that a call is given beside latents and time, by name."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", more) for inner, more in _beside(value, latents))
        elif name not in TIME_NAMES and value is not latents and _is_tensors(value):
            yield name, value


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_tensors, value)))


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
    first, others = samples[0].float(), samples[1:]
    return all(x.shape == first.shape and float((x.float() - first).norm()) <= _SAME * float(first.norm()) for x in others)


def _all_differ(latents: Any) -> bool:
    """Whether every sample of a batch is another than its first. What a pipeline repeats for guidance of any kind is not."""
    size = _length(latents)
    return size > 0 and not any(_same(latents[0], latents[index]) for index in range(1, size))


def _no_halves(name: str, module: nn.Module, call: Call, same_texts: bool = False) -> ValueError:
    size = _length(latents_of(module, call.kwargs))
    if same_texts:
        got = f"a batch of {size} with the same texts in both"
        remedy = "Leave it out, or calibrate again with prompts that differ from the negative one"
    elif call.branches is None:
        got, remedy = f"a batch of {size} that may be either", "Calibrate again with this version, which keeps it with every call"
    elif call.branches == ALL:
        got = f"a batch of {size} in which no halves can be told"
        remedy = (
            "Leave it out, or calibrate with the guidance of later use, with prompts that differ from the negative one and without "
            "guidance of other kinds (perturbed attention, several scales)"
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


def _begin_alike(a: Any, b: Any) -> bool:
    """Whether two batches are alike as far as the shorter one goes: both halves, and a call for as many samples as prompts."""
    size = min(_length(a), _length(b))
    return size > 0 and _same(a[:size], b[:size])


def _same(a: Any, b: Any) -> bool:
    """Whether two batches are alike to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return False
