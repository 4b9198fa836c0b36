"""Smoothing: move the spread of input channels into the weights (SmoothQuant, Xiao et al. 2022, arXiv 2211.10438).

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); the input is divided by s, the weight multiplied. alpha 0.5 gives both the same
spread, 1 makes all input channels equal. Where alpha is None it is searched: every candidate, and no smoothing, is tried on the
sample with weights and inputs rounded, and the one with the least output error wins (as SVDQuant and AWQ do). s is scaled to a
geometric mean of 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.spec import Smooth

ALPHAS = tuple(i / 20 for i in range(1, 20))
LEAST = 1e-5  # smaller channels are as good as empty


def smoothing(weights: list[Tensor], inputs: Inputs, transform: Smooth, channels: int, error: Callable[[Tensor], float]) -> Tensor:
    """What the input channels are multiplied with, 1 / s.

    Args:
        weights: float [N_i, taps * channels], of the sites that share the input.
        inputs: statistics of that input.
        transform: alpha, or None to search it.
        channels: input channels C.
        error: output error after rounding, of a multiplier float32 [C].
    Returns:
        float32 [C].
    """
    x = inputs.absmax.view(-1, channels).amax(dim=0).clamp(min=LEAST)
    w = torch.cat([weight.float().abs().amax(dim=0).view(-1, channels) for weight in weights]).amax(dim=0).clamp(min=LEAST)
    if transform.alpha is not None:
        return _multiplier(x, w, transform.alpha, transform.power_of_two)
    best = torch.ones_like(x)
    least = error(best)
    for alpha in ALPHAS:
        candidate = _multiplier(x, w, alpha, transform.power_of_two)
        found = error(candidate)
        if found < least:
            best, least = candidate, found
    return best


def _multiplier(x: Tensor, w: Tensor, alpha: float, power_of_two: bool) -> Tensor:
    log_s = alpha * x.log2() - (1 - alpha) * w.log2()
    if power_of_two:  # down to an eighth of the largest, as far as an exponent of two bits reaches
        return torch.exp2(-(log_s - log_s.max()).round().clamp(min=-3))
    return torch.exp2(log_s.mean() - log_s).bfloat16().float()  # as it is stored
