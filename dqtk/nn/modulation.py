"""Layers that depend on the noise level only, replaced by tables of what they gave at the levels of a schedule.

A table is found by the time that the denoiser is given, as a number: levels that are not in it are refused, never interpolated.
The layers that were replaced are gone from the model (or kept aside, until ``restore``), so a model with tables has no weights to
save there, and refuses to be saved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import given_arguments, time_of

from .eager import outside_graphs

TOLERANCE = 1e-6  # of a time, relative: what another order of float32 operations may do to it


class KnownTimes:
    """Which of the times of a schedule the denoiser call in progress has; owned by a hook on the denoiser, shared by its tables."""

    def __init__(self, times: Sequence[float]):
        self.times = tuple(float(time) for time in times)
        self._index: dict[torch.device, Tensor] = {}
        self._position = 0
        outside_graphs(KnownTimes, "see")

    def index(self, device: torch.device) -> Tensor:
        """int64 [1]: row of the call in progress. One tensor per device, whose content changes."""
        if device not in self._index:
            with torch.inference_mode(False):
                self._index[device] = torch.full((1,), self._position, dtype=torch.int64, device=device)
        return self._index[device]

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The hook. Raises ``ValueError`` for a time that is not among the known ones, and for times that differ within a call."""
        time = time_of(given_arguments(module, args, kwargs))
        values = [] if time is None else time.detach().double().reshape(-1).tolist()
        if not values or any(value != values[0] for value in values):
            raise ValueError(
                f"modulation: {type(module).__name__} must be called with one time, got {values[:4] or 'none'}. "
                "Its modulation is a table by the time; restore() it."
            )
        gaps = [abs(values[0] - known) for known in self.times]
        position = min(range(len(gaps)), key=gaps.__getitem__)
        if gaps[position] > TOLERANCE * max(1.0, abs(values[0])):
            raise ValueError(
                f"modulation: time must be one of the {len(self.times)} that the tables were made for, got {values[0]:g} (nearest: "
                f"{self.times[position]:g}). Use the scheduler and the number of steps of the tables, or make tables for both."
            )
        self._position = position
        for index in self._index.values():
            index.fill_(position)


class ModulationTable(nn.Module):
    """In place of a linear: rows [S, R, N] of its outputs at S times; R is 1, or the batch where its rows differed.

    Its output has the batch of its input and the bits that the layer had for the batch it was made with.
    """

    def __init__(self, rows_SRN: Tensor, known: KnownTimes, like: nn.Linear):
        super().__init__()
        self.in_features, self.out_features, self.known = like.in_features, like.out_features, known
        self.register_buffer("rows", rows_SRN, persistent=False)
        self.register_buffer("weight", rows_SRN.new_empty(0), persistent=False)  # hosts read its dtype
        self.bias = None
        known.index(rows_SRN.device)  # made now, as a compiler would trace it
        self.register_state_dict_pre_hook(_refuse)
        self.train(like.training)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N] for [B, K], or [B, 1, N] for [B, 1, K]. Raises ``ValueError`` for another batch where rows differed."""
        module: Any = self
        found = module.rows.index_select(0, module.known.index(module.rows.device))[0]
        if found.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"modulation: batch must be {found.shape[0]}, as when the tables were made, got {x.shape[0]}. "
                "Make them with this one."
            )
        return found.view(found.shape[0], *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {len(self.known.times)} times"


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise ValueError(
        f"save: {prefix.rstrip('.')} must have its weights to be saved or offloaded by name, got a table for a schedule. "
        "Save before caching modulation, or restore() it first."
    )
