"""Noise level of a denoiser call, in [0, 1]: the share of noise in the latents.

For variance-preserving schedules it is sqrt(1 - alpha_bar), for flow matching it is sigma, for EDM-like ones sigma / (1 + sigma).
It is read from the timestep through the scheduler's own tables, never from a counter of calls, so it survives another number of steps
and another scheduler of the same kind.
"""

from typing import Any

import torch
from torch import Tensor


def noise_level(scheduler: Any, timestep: Tensor) -> float:
    """Level of one call. ``timestep`` is what the denoiser was called with: a number, [1] or [B] with equal entries.

    Raises:
        ValueError: for timesteps that differ within the batch.
    """
    values = timestep.detach().float().reshape(-1)
    if values.numel() > 1 and not bool((values == values[0]).all()):
        raise ValueError(
            f"noise_level: timesteps must be equal within a call, got {values[:4].tolist()}. Per-token timesteps are not supported."
        )
    t = float(values[0])
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is not None:
        position = min(max(t, 0.0), len(alphas_cumprod) - 1.0)
        low = int(position)
        high = min(low + 1, len(alphas_cumprod) - 1)
        table = alphas_cumprod.double()
        alpha = table[low] + (table[high] - table[low]) * (position - low)
        return float(torch.sqrt(1 - alpha))
    steps = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))
    return min(max(t if t <= 1 else t / steps, 0.0), 1.0)


def bucket_of(level: float, num_buckets: int) -> int:
    """Index of the level among equal intervals of [0, 1]."""
    return min(int(level * num_buckets), num_buckets - 1)
