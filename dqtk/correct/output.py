"""Correct a quantized denoiser's output by a gain and a shift per noise-level interval and channel (PTQD, He et al. 2023, arXiv
2305.10657, section 3.2).

The quantized output is regressed on the exact one, and what that finds is undone: the part of the error that is correlated with
the exact output, and the mean of the rest; per channel, where PTQD takes one slope. The other regression, of the exact output
on the quantized one, has less error in a single step but shrinks every step's output; it made worse pictures
(notebooks/LOG.md). Calls are those that calibration kept. An interval is corrected only if a correction fitted on half of the
calibration runs helps on the other half, both ways: on prompts that it has not seen. PTQD's third part, less noise for samplers
that add some, was tried and changed nothing that could be measured (notebooks/LOG.md).
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calibrate import Stats
from dqtk.calibrate.answers import outputs
from dqtk.calibrate.gather import calls_of
from dqtk.nn.correction import OutputCorrection, correction_of

MOST = 8  # intervals


def check_correctable(parts: Mapping[str, nn.Module], stats: Stats, exact: Mapping[str, Sequence[Tensor]]) -> None:
    """Raises ``ValueError`` for a denoiser that is corrected already, has no time, or whose channels cannot be told."""
    for name, part in parts.items():
        if correction_of(part) is not None:
            raise ValueError(f"quantize: output of {name} must not be corrected yet, got {correction_of(part)}. Load the original.")
        if any(call.time is None for call in stats.calls if call.component == name):
            raise ValueError(f"quantize: {name} must be called with a time for its output to be corrected by it, got none.")
        channel_dim(part, exact[name][0])


def correct_output(module: nn.Module, stats: Stats, name: str, exact: Sequence[Tensor]) -> OutputCorrection | None:
    """Fit and install the correction of a quantized denoiser; None, with a warning, where it helps at no noise level.

    Args:
        module: quantized.
        stats: whose calls ``exact`` are the outputs of.
        name: of the denoiser.
        exact: outputs of the unquantized denoiser, [B, ...] each.
    Raises:
        ValueError: as ``check_correctable``.
    """
    calls = calls_of(stats.calls, name)
    got = outputs(module, calls)
    times = [call.time or 0.0 for call in calls]
    edges = edges_between(times)
    dim = channel_dim(module, got[0])
    interval = torch.bucketize(torch.tensor(times, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64), right=True)
    order = sorted({call.run for call in calls})
    half = torch.tensor([order.index(call.run) % 2 for call in calls])
    gain = torch.ones(len(edges) + 1, got[0].shape[dim])
    shift, helped = torch.zeros_like(gain), 0
    for index in range(len(edges) + 1):
        here = [torch.nonzero((interval == index) & (half == side)).flatten().tolist() for side in (0, 1)]
        mine = [[(rows(got[i], dim), rows(exact[i], dim)) for i in calls_here] for calls_here in here]
        if all(mine) and _confirmed(*mine) and _confirmed(*mine[::-1]):
            gain[index], shift[index] = fit(mine[0] + mine[1])
            helped += 1
    if not helped:
        warnings.warn(
            f"quantize: correcting the output of {name} helps at no noise level on calls it was not fitted on; it stays as it is.",
            stacklevel=2,
        )
        return None
    found = OutputCorrection(edges, gain, shift, dim)
    found.attach(module)
    return found


def rows(output: Tensor, dim: int) -> Tensor:
    """float64 [R, C]."""
    return output.movedim(dim, -1).flatten(0, -2).double()


def fit(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Undo the least squares of quantized on exact outputs, (quantized, exact) [R, C] each: gain and shift float32 [C]."""
    got, exact = (torch.cat(part) for part in zip(*pairs, strict=True))
    mean_got, mean_exact = got.mean(0), exact.mean(0)
    variance = (exact - mean_exact).square().mean(0)
    together = ((got - mean_got) * (exact - mean_exact)).mean(0)
    gain = torch.where(together > 0, variance / together.clamp(min=torch.finfo(torch.float64).tiny), torch.ones_like(variance))
    return gain.float(), (mean_exact - gain * mean_got).float()


def _confirmed(seen: Sequence[tuple[Tensor, Tensor]], unseen: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether what is fitted on some calls lowers the error of others."""
    gain, shift = fit(seen)
    before = sum(float((got - exact).square().sum()) for got, exact in unseen)
    after = sum(float((got * gain + shift - exact).square().sum()) for got, exact in unseen)
    return after < before


def edges_between(times: Sequence[float], most: int = MOST) -> tuple[float, ...]:
    """Edges of at most ``most`` intervals with about as many different times in each, midway between two of them."""
    seen = sorted(set(times))
    num = min(most, len(seen))
    cuts = sorted({round(i * len(seen) / num) for i in range(1, num)})
    middles = [(a + b) / 2 for a, b in pairwise(seen)]
    return tuple(middles[cut - 1] for cut in cuts)


def channel_dim(module: Any, output: Tensor) -> int:
    """Where the channels of an output are: where the configuration's number of them is, else 1, or last for tokens [B, T, C].

    Raises ``ValueError`` for a clip with as many frames as channels.
    """
    config = getattr(module, "config", None)
    usual = [1, output.ndim - 1] if output.ndim != 3 else [2, 1]
    for num in (getattr(config, name, None) for name in ("out_channels", "in_channels")):
        dims = [dim for dim in dict.fromkeys([*usual, *range(1, output.ndim)]) if output.shape[dim] == num]
        if output.ndim == 5 and {1, 2} <= set(dims):
            raise ValueError(
                f"quantize: a clip must have other numbers of frames and channels to have its output corrected, got {num}. "
                "Calibrate with another number of frames."
            )
        if dims:
            return dims[0]
    return usual[0]
