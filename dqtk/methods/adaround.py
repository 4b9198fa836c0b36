"""AdaRound: learn for every weight whether it goes down or up (Nagel et al. 2020, arXiv 2004.10568), on integer and float grids.

Between the neighbours low and high of every weight lies w' = low + (high - low) h(v), h a sigmoid stretched to [-0.1, 1.1] and
clipped. v starts where w' = w, and Adam lowers

    sum over rows of (w' - w) G (w' - w)^T / e_row  +  strength / K * sum of (1 - |2 h - 1|^beta)

G is the mean of x x^T, so the objective is that of all calibration inputs at once, from all noise levels, and no row is drawn.
e_row is the row's error where rounding errors are independent, so that the two sums are of one size whatever the layer. The
second sum, off for the first fifth, ends with every h at 0 or 1, as beta falls from 20 to 2.

On a float grid high - low differs from weight to weight, and with it the gradient of v. The variable is therefore v' = s v with s
the weight's step over the mean step of its row: the gradient of v' does not depend on s (FP4DiT's scale-aware form, arXiv
2503.15465, section 3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.packing import Packed
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import AdaRound, TensorSpec

from .descent import descended, output_error, ridge

STRETCH = 0.1  # of the sigmoid beyond 0 and 1 (Louizos et al. 2018)
WARMUP = 0.2
LEARNING_RATE, STRENGTH = 0.03, 10.0  # searched on four layers of tiny-pixart, INT4 and FP4
BETAS = (20.0, 2.0)
DAMPING = 0.01  # of the coordinate descent afterwards, as of GPTQ


def adaround(weight: Tensor, spec: TensorSpec, inputs: Inputs, solver: AdaRound) -> Packed:
    """Quantize a weight.

    Args:
        weight: float [N, K].
        spec: Int or Float format, any granularity and range.
        inputs: statistics of the layer's input in the basis of ``weight``.
        solver: options.
    Returns:
        The stored form. Rows that came out worse than by rounding to nearest are rounded to nearest.
    Raises:
        ValueError: a format without two neighbours (codebooks).
    """
    weight = weight.float()
    grid = fit_grid(weight, spec)
    low, high = grid.neighbours(weight)
    up = _learn(weight, low, high, inputs.gram, solver)
    values, plain = torch.where(up, high, low), grid.round(weight)
    values = descended(weight, values, grid, inputs.gram, solver.sweeps, ridge(inputs.gram, DAMPING))
    better = output_error(weight, values, inputs.gram) <= output_error(weight, plain, inputs.gram)
    return grid.pack(torch.where(better[:, None], values, plain))


@dataclass(frozen=True, slots=True)
class _Problem:
    """weight, low and width = high - low, float32 [N, K]; gram float32 [K, K]; noise [N, 1], the rows' e_row; scale [N, K], s."""

    weight: Tensor
    low: Tensor
    width: Tensor
    gram: Tensor
    noise: Tensor
    scale: Tensor

    @staticmethod
    def of(weight: Tensor, low: Tensor, high: Tensor, gram: Tensor) -> "_Problem":
        width, gram = high - low, gram.float().to(weight.device)
        noise = (width.square() / 12 * gram.diagonal()).sum(dim=1, keepdim=True).clamp(min=1e-30)
        scale = torch.where(width > 0, width, torch.zeros_like(width))
        scale = (scale / scale.mean(dim=1, keepdim=True).clamp(min=1e-30)).clamp(min=1e-3)
        return _Problem(weight, low, width, gram, noise, scale)

    def start(self) -> Tensor:
        """v' at which w' = w."""
        part = torch.where(self.width > 0, (self.weight - self.low) / torch.where(self.width > 0, self.width, 1.0), 0.5)
        return self.scale * torch.logit((part.clamp(0.001, 0.999) + STRETCH) / (1 + 2 * STRETCH))

    def gradient(self, v: Tensor, progress: float) -> Tensor:
        """Of the two sums to v'; ``progress`` is the share of the iterations that is done."""
        sigma = torch.sigmoid(v / self.scale)
        h = (sigma * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
        delta = self.low + self.width * h - self.weight
        slope = 2 * (delta @ self.gram) / self.noise * self.width  # of the error to h
        slope += STRENGTH / v.shape[1] * _pull(h, progress)
        inside = (h > 0) & (h < 1) & (self.width > 0)
        # dh/dv' = (1 + 2 * STRETCH) sigma' / scale; the error's slope carries width, which is proportional to scale within a row.
        return torch.where(inside, slope * (1 + 2 * STRETCH) * sigma * (1 - sigma) / self.scale, 0.0)


def _learn(weight: Tensor, low: Tensor, high: Tensor, gram: Tensor, solver: AdaRound) -> Tensor:
    """bool [N, K]: whether each weight is rounded up."""
    problem = _Problem.of(weight, low, high, gram)
    v = problem.start()
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    for step in range(solver.iterations):
        gradient = problem.gradient(v, step / solver.iterations)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        corrected = second / (1 - 0.999 ** (step + 1))
        v = v - LEARNING_RATE * (first / (1 - 0.9 ** (step + 1))) / (corrected.sqrt() + 1e-12)
    return v >= 0


def _pull(h: Tensor, progress: float) -> Tensor:
    """The derivative of sum(1 - |2h - 1|^beta) to h; zero during the warm-up."""
    if progress < WARMUP:
        return torch.zeros_like(h)
    part = (progress - WARMUP) / (1 - WARMUP)
    beta = BETAS[1] + (BETAS[0] - BETAS[1]) * max(0.0, 1 - part)
    x = 2 * h - 1
    return -2 * beta * x.abs().pow(beta - 1) * torch.sign(x)
