"""Noise level of a denoiser call, in [0, 1]: the share of noise in the latents.

For variance-preserving schedules it is sqrt(1 - alpha_bar), for flow matching it is sigma, for EDM-like ones sigma / (1 + sigma).
It is read from the timestep through the scheduler's own tables, never from a counter of calls, so it survives another number of
steps and another scheduler of the same kind.
"""

import math
from typing import Any

import torch
from torch import Tensor


def noise_level(scheduler: Any, timestep: Tensor, reversed_time: bool = False) -> float:
    """Level of one call. ``timestep`` is what the denoiser was called with: a number, [1] or [B] with equal entries.

    For flow matching it may be a timestep or sigma itself; a 1 that could be either is sigma. ``reversed_time`` (an adapter's
    field): the denoiser is given 1 - sigma.

    Raises:
        ValueError: for timesteps that differ within the batch.
    """
    values = timestep.detach().float().reshape(-1)
    if values.numel() > 1 and not bool((values == values[0]).all()):
        raise ValueError(
            f"noise_level: timesteps must be equal within a call, got {values[:4].tolist()}. Per-token timesteps are not supported."
        )
    t = float(values[0])
    config = getattr(scheduler, "config", None) or {}
    if reversed_time:
        return min(max(1 - t, 0.0), 1.0)
    if hasattr(scheduler, "precondition_noise") or config.get("timestep_type") == "continuous":
        return _edm_level(scheduler, t)
    # Several schedulers serve both kinds of model and keep a table of alphas that flow matching does not use.
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is not None and not flow:
        return _variance_preserving_level(alphas_cumprod.double(), t)
    return _flow_level(scheduler, t)


def _variance_preserving_level(table: Tensor, t: float) -> float:
    position = min(max(t, 0.0), len(table) - 1.0)
    low = int(position)
    high = min(low + 1, len(table) - 1)
    alpha = table[low] + (table[high] - table[low]) * (position - low)
    return float(torch.sqrt(1 - alpha))


def _edm_level(scheduler: Any, t: float) -> float:
    # The timestep is a function of sigma that differs between schedulers; its table lies beside that of the sigmas.
    sigma = float(scheduler.sigmas[int((scheduler.timesteps.double() - t).abs().argmin())])
    return sigma / (1 + sigma)


def _flow_level(scheduler: Any, t: float) -> float:
    steps = float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", 1000))
    scaled = t > 1 or not _is_sigma(getattr(scheduler, "timesteps", None), t, steps)
    return min(max(t / steps if scaled else t, 0.0), 1.0)


def _is_sigma(table: Tensor | None, t: float, steps: float) -> bool:
    # Some denoisers are called with sigma itself, others with a timestep; up to 1 it may be either: the scheduler's table tells.
    if table is None or not len(table):
        return True
    distance_sigma, distance_timestep = ((table.double() - value).abs().min() for value in (t * steps, t))
    return bool(distance_sigma <= distance_timestep)


def bucket_of(level: float, num_buckets: int) -> int:
    """Index of the level among equal intervals of its angle asin(level), 0 to pi / 2.

    In equal intervals of the level itself half the steps of a variance-preserving schedule lie in one.
    """
    return min(int(angle_of(level) / (math.pi / 2) * num_buckets), num_buckets - 1)


def level_of_bucket(bucket: int, num_buckets: int) -> float:
    """The level in the middle of a bucket."""
    return math.sin((bucket + 0.5) / num_buckets * math.pi / 2)


def angle_of(level: float) -> float:
    """asin(level), from 0 to pi / 2; levels outside of [0, 1] count as its ends."""
    return math.asin(min(max(level, 0.0), 1.0))


def at_level(level: float | None) -> str:
    """`` at noise level 0.250``, for messages."""
    return "" if level is None else f" at noise level {level:.3f}"
