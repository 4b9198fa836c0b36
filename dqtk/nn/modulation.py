"""Layers that depend on the noise level only, or on it and the prompt, replaced by tables of what they gave in a schedule.

A table is found by the time that the denoiser is given, as a number, and where the prompt counts by its conditions:
what is not in it is refused, never interpolated. The layers that were replaced are gone from the model (or kept aside, until
``restore``), so a model with tables has no weights to save there, and refuses to be saved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dqtk.calls import TIME_NAMES, given_arguments, time_of

from .eager import outside_graphs

TOLERANCE = 1e-6  # of a time, relative: what another order of float32 operations may do to it
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 3e-3}  # of pooled text, as its norm's share: in other batches


def conditions_in(arguments: Mapping[str, Any]) -> list[Tensor]:
    """What a denoiser call gives by sample beside its time: pooled text, sizes, guidance; [B] or [B, K] each. Not masks of text."""
    given = [value for name, value in arguments.items() if name not in TIME_NAMES and "mask" not in name]
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim > 2), 0)
    return [tensor for tensor in tensors if tensor.ndim in (1, 2) and tensor.shape[0] == batch]


def samples_of(arguments: Mapping[str, Any]) -> list[Tensor]:
    """``conditions_in`` on the CPU, [B, K] each."""
    return [tensor.detach().cpu().reshape(len(tensor), -1) for tensor in conditions_in(arguments)]


def alike(given: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
    """Which samples have which conditions, bool [B, C], from [B, K] and [C, K] each.

    Vectors may differ by what other batches do to the rounding of a text encoder (``ROUNDING``), single numbers by ``TOLERANCE``;
    whole numbers, such as sizes and labels, may not.
    """
    same = torch.ones(len(given[0]), len(known[0]), dtype=torch.bool)
    for mine, theirs in zip(given, known, strict=True):
        if mine.dtype != theirs.dtype or mine.shape[1] != theirs.shape[1]:
            return torch.zeros_like(same)
        dtype, mine, theirs = mine.dtype, mine.double(), theirs.double()
        slack = (TOLERANCE if mine.shape[1] == 1 else ROUNDING.get(dtype, 0.0)) * theirs.norm(dim=1)
        slack = torch.where((theirs == theirs.round()).all(1), 0.0, slack)
        same &= torch.cdist(mine, theirs, compute_mode="donot_use_mm_for_euclid_dist") <= slack
    return same


class KnownCalls:
    """Which of the calls that tables were made for the one in progress is; owned by a hook on the denoiser, shared by its tables.

    times: S of a schedule. conditions: of C samples, as ``samples_of`` has them; none: only the time tells. The call of condition c
    at time s is number c S + s.
    """

    def __init__(self, times: Sequence[float], conditions: Sequence[Tensor] = ()):
        self.times = tuple(float(time) for time in times)
        self.conditions = tuple(conditions)
        self._index: dict[tuple[torch.device, int], Tensor] = {}
        self._numbers = [0]
        outside_graphs(KnownCalls, "see")

    @property
    def samples(self) -> int:
        """Number of conditions, C; 0 where only the time tells."""
        return len(self.conditions[0]) if self.conditions else 0

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
        given = samples_of(arguments)
        same = alike(given, self.conditions) if len(given) == len(self.conditions) else torch.zeros(1, 1, dtype=torch.bool)
        if not bool(same.any(1).all()):
            raise ValueError(
                f"modulation: {type(module).__name__} must be called with prompts (negative ones too), size and guidance that its "
                f"tables were made for, got others in sample {int(same.any(1).int().argmin())}; {self.samples} samples are known. "
                "Make tables with all prompts."
            )
        return same.int().argmax(1).tolist()


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
        "Save before caching modulation, or restore() it first."
    )
