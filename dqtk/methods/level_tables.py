"""Scales of a calibrated input: one, or one per interval of the noise level, found from rows that know their call's time."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.spec import PerLevel, TensorSpec

from .format_search import concrete_input


def intervals_of(times: Tensor, edges: Sequence[float]) -> Tensor:
    """int64 [R]: interval of every time; a time at an edge lies above it, as in ``nn.noise``."""
    return torch.bucketize(times, torch.tensor(edges, dtype=times.dtype, device=times.device), right=True)


def tables(
    sample: Tensor, times: Tensor | None, spec: TensorSpec, inputs: Inputs | None = None
) -> tuple[TensorSpec, Tensor, Tensor | None]:
    """The spec of a static input with its split or table found, one for all intervals; scale [L, 1]; zero [L, 1] or None.

    Args:
        sample: float32 [R, K].
        times: float32 [R], of the call that a row comes from; needed for ``PerLevel``.
        inputs: what ``sample`` belongs to, where its ends and the rows with the largest numbers count too.
    """
    ends = None if inputs is None else (inputs.low.amin(), inputs.high.amax())
    found, scale, zero = concrete_input(sample, spec, ends)
    if not isinstance(spec.granularity, PerLevel):
        return found, scale, zero
    assert times is not None
    assert spec.granularity.edges
    rows, when = sample, times
    if inputs is not None and inputs.peak_times is not None:
        rows, when = torch.cat([sample, inputs.peaks]), torch.cat([times, inputs.peak_times])
    parts = [concrete_input(rows[mine], found)[1:] for mine in _members(when, spec.granularity.edges)]
    zeros = [shift for _, shift in parts if shift is not None]
    return found, torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None


def _members(times: Tensor, edges: Sequence[float]) -> list[Tensor]:
    """Of every interval the rows in it; where there are none, those of the time nearest to it."""
    bounds = [-torch.inf, *edges, torch.inf]
    interval = intervals_of(times, edges)
    found = []
    for index, (low, high) in enumerate(pairwise(bounds)):
        mine = interval == index
        if not bool(mine.any()):
            distance = torch.maximum(low - times, times - high)
            mine = distance == distance.min()
        found.append(mine)
    return found
