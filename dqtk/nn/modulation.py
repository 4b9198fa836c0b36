"""Layers that depend on the noise level only, or on it and the prompt, replaced by tables of what they gave in a schedule.

A table is found by the time that the denoiser is given, as a number, and where the prompt counts by its conditions:
what is not in it is refused, never interpolated. The layers that were replaced are gone from the model (or kept aside, until
``restore``), so a model with tables has no weights to save there, and refuses to be saved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import TIME_NAMES, given_arguments, latents_of, time_of

from .eager import outside_graphs

TOLERANCE = 1e-6  # of a number, relative: what another order of float32 operations may do to it
WIDE = 64  # entries of a vector from which on it is taken for pooled text, whose rounding depends on the batch of the text encoder
ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 1e-2}  # of pooled text in another batch, as its norm's share


def conditions_in(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a denoiser call gives by sample beside latents, time and masks: pooled text, sizes, guidance; name -> [B] or [B, K]."""
    latents = latents_of(module, arguments)
    batch = len(latents) if isinstance(latents, Sequence | Tensor) else 0
    named = dict(arguments)
    for name, value in arguments.items():
        named |= {f"{name}.{inner}": part for inner, part in value.items()} if isinstance(value, Mapping) else {}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.ndim in (1, 2) and len(value) == batch and value is not latents
        if name not in TIME_NAMES and "mask" not in name
    }


def samples_of(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """``conditions_in`` on the CPU, [B, K] each."""
    found = conditions_in(module, arguments)
    return {name: tensor.detach().cpu().reshape(len(tensor), -1) for name, tensor in found.items()}


def nearest(given: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> list[int | None]:
    """For each of B samples, of C known ones the nearest with the same conditions, from [B, K] and [C, K] by name; None: none has.

    Wide vectors (``WIDE``) may differ by what other batches do to the rounding of a text encoder (``ROUNDING``), all else by
    ``TOLERANCE``.
    """
    batch = len(next(iter(given.values()), ()))
    if given.keys() != known.keys() or any(given[name].shape[1] != known[name].shape[1] for name in known):
        return [None] * batch
    total = torch.zeros(batch, len(next(iter(known.values()))), dtype=torch.float64)  # infinite: not the same
    for name, mine in given.items():
        theirs = known[name]
        if mine.shape[1] >= WIDE:
            slack = max(ROUNDING.get(tensor.dtype, TOLERANCE) for tensor in (mine, theirs))
            gap = torch.cdist(mine.double(), theirs.double(), compute_mode="donot_use_mm_for_euclid_dist")
            gap /= theirs.double().norm(dim=1).clamp(min=TOLERANCE)
        else:
            slack = TOLERANCE
            gap = ((mine[:, None].double() - theirs.double()).abs() / theirs.double().abs().clamp(min=1)).amax(2)
        total += torch.where(gap <= slack, gap, torch.inf)
    best = total.min(1)
    return [int(index) if value < torch.inf else None for value, index in zip(best.values, best.indices, strict=True)]


class KnownCalls:
    """Which of the calls that tables were made for the one in progress is; owned by a hook on the denoiser, shared by its tables.

    times: S of a schedule. conditions: of C samples, as ``samples_of`` has them; none: only the time tells. The call of condition c
    at time s is number c S + s.
    """

    def __init__(self, times: Sequence[float], conditions: Mapping[str, Tensor] | None = None):
        self.times = tuple(float(time) for time in times)
        self.conditions = dict(conditions or {})
        self._index: dict[tuple[torch.device, int], Tensor] = {}
        self._numbers = [0]
        outside_graphs(KnownCalls, "see")

    @property
    def samples(self) -> int:
        """Number of conditions, C; 0 where only the time tells."""
        return len(next(iter(self.conditions.values()), ()))

    def index(self, device: torch.device, batch: int) -> Tensor:
        """int64 [1], or [B] where conditions tell: numbers of the call in progress. One tensor each, whose content changes.

        Raises ``ValueError`` for another batch than the call's, where conditions tell.
        """
        if self.conditions and batch != len(self._numbers):
            raise ValueError(
                f"modulation: layers must see the batch of the call, {len(self._numbers)}, got {batch}. restore() them."
            )
        if (device, len(self._numbers)) not in self._index:
            self.prepare(device)
        return self._index[device, len(self._numbers)]

    def prepare(self, device: torch.device) -> None:
        """Make the tensor of a device now, as a compiler would trace it."""
        with torch.inference_mode(False):
            self._index[device, len(self._numbers)] = torch.tensor(self._numbers, dtype=torch.int64, device=device)

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The hook. Raises ``ValueError`` for a time or a condition that is not among the known ones, and for times that differ
        within a call."""
        arguments = given_arguments(module, args, kwargs)
        step = self._step(module, time_of(arguments))
        self._numbers = [row * len(self.times) + step for row in self._rows(module, arguments)]
        for device in {device for device, _ in self._index}:
            if (device, len(self._numbers)) in self._index:
                self._index[device, len(self._numbers)].copy_(torch.tensor(self._numbers, dtype=torch.int64))
            else:
                self.prepare(device)

    def _step(self, module: nn.Module, time: Tensor | None) -> int:
        values = [] if time is None else time.detach().double().reshape(-1).tolist()
        if not values or any(value != values[0] for value in values):
            raise ValueError(
                f"modulation: {type(module).__name__} must be called with one time, got {values[:4] or 'none'}. "
                "Its modulation is a table by the time; restore() it."
            )
        gaps = [abs(values[0] - known) for known in self.times]
        nearest = min(range(len(gaps)), key=gaps.__getitem__)
        if gaps[nearest] > TOLERANCE * max(1.0, abs(values[0])):
            raise ValueError(
                f"modulation: time must be one of the {len(self.times)} that the tables were made for, got {values[0]:g} (nearest: "
                f"{self.times[nearest]:g}). Use the scheduler and the number of steps of the tables, or make tables for both."
            )
        return nearest

    def _rows(self, module: nn.Module, arguments: Mapping[str, Any]) -> list[int]:
        if not self.conditions:
            return [0]
        found = nearest(samples_of(module, arguments), self.conditions)
        if not found or None in found:
            raise ValueError(
                f"modulation: {type(module).__name__} must be called with prompts (negative ones too), size and guidance that its "
                f"tables were made for, got others in sample {found.index(None) if found else 0}; {self.samples} samples are "
                "known. Make tables with all prompts, in the dtype that the model is in."
            )
        return [row for row in found if row is not None]


class ModulationTable(nn.Module):
    """In place of a linear: its outputs in C calls, [E, R, N] of the E different ones; R is 1, or the batch where rows differed.

    Its output has the batch of its input and the bits that the layer had for the batch it was made with.
    """

    def __init__(self, rows_CRN: Tensor, known: KnownCalls, like: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.known = like.in_features, like.out_features, known
        once, place = _once(rows_CRN)
        self.register_buffer("rows", once, persistent=False)
        self.register_buffer("place", place, persistent=False)  # int64 [C]: the row of each call
        self.weight = nn.Parameter(once.new_empty(0), requires_grad=False)  # hosts read its dtype, or that of any parameter
        self.bias = None
        known.prepare(once.device)
        self.register_state_dict_pre_hook(_refuse)
        self.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N] for [B, K], or [B, 1, N] for [B, 1, K]. Raises ``ValueError`` for another batch where rows differed."""
        module: Any = self
        index = module.place.index_select(0, module.known.index(module.rows.device, x.shape[0]))
        found = module.rows.index_select(0, index)
        found = found[0] if len(index) == 1 else found[:, 0]
        if found.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"modulation: batch must be {found.shape[0]}, as when the tables were made, got {x.shape[0]}. "
                "Make them with this one."
            )
        return found.view(found.shape[0], *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {len(self.known.times)} times, {self.known.samples} samples"


def _once(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones of rows [C, ...], and where each of the C is among them, int64 [C]."""
    seen: dict[bytes, int] = {}
    place = [seen.setdefault(row.cpu().contiguous().view(torch.uint8).numpy().tobytes(), len(seen)) for row in rows]
    first = [place.index(number) for number in range(len(seen))]
    return rows[first].clone(), torch.tensor(place, dtype=torch.int64, device=rows.device)


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(
        f"save: {prefix.rstrip('.')} must have its weights to be saved or offloaded by name, got a table for a schedule. "
        "Save before caching modulation, or cache with evict=False and restore() it first."
    )
