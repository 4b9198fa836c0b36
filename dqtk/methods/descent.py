"""The output error of rounded weights, and coordinate descent on it (CDQuant, Nair & Suggala 2024, arXiv 2406.17542).

Over the calibration inputs, whose mean of x x^T is G, the error of an output channel is (q - w) G (q - w)^T.
"""

import torch
from torch import Tensor

from dqtk.numerics.weight_grid import WeightGrid

BLOCK = 128  # columns (C) between two matrix products


def ridge(gram: Tensor, damping: float) -> float:
    """What is added to the diagonal: ``damping`` times its mean."""
    mean = float(gram.diagonal().mean())
    return damping * (mean if mean > 0 else 1.0)


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> Tensor:
    """float64 [N]: mean squared output error of every output channel, (q - w) G (q - w)^T."""
    delta = values.double() - weight.double()
    return ((delta @ gram) * delta).sum(dim=1)


def descended(weight: Tensor, values: Tensor, grid: WeightGrid, gram: Tensor, sweeps: int, damping: float = 0.0) -> Tensor:
    """Values improved one column at a time: each weight goes to the point of the grid that is best while all others stay.

    The output error is quadratic in one weight, so the best point is the one nearest to its minimum; no step makes it larger.
    ``damping`` is added to G's diagonal. With that of GPTQ, inputs that were not seen lose 4 % less on FP4 and no more on INT4 (two
    blocks of tiny-pixart); without it the descent gains nothing there on FP4: it follows what few rows have shown.
    Measured on layers of tiny-pixart, after GPTQ: 1 to 6 % less error on INT4, 4 to 40 % on FP4, nearly all of it in two rounds.
    """
    if not sweeps:
        return values
    g = gram.to(values.device, torch.float32, copy=True)
    g.diagonal().add_(damping)
    curvature, columns = g.diagonal().tolist(), torch.arange(len(g), device=values.device)
    values = values.clone()
    slope = (values - weight.float()) @ g
    for _ in range(sweeps):
        for start in range(0, len(g), BLOCK):  # columns of a block see each other's changes at once, the others theirs afterwards
            block = slice(start, min(start + BLOCK, len(g)))
            before_CN, inner = values[:, block].T.contiguous(), g[block, block]
            now_CN, slope_CN = before_CN.clone(), slope[:, block].T.contiguous()
            for j in range(block.stop - start):
                if curvature[start + j] <= 0:
                    continue
                wanted = now_CN[j] - slope_CN[j] / curvature[start + j]
                best = grid.round(wanted[:, None], columns[start + j : start + j + 1])[:, 0]
                slope_CN.addr_(inner[j], best - now_CN[j])
                now_CN[j] = best
            values[:, block] = now_CN.T
            slope.addmm_((now_CN - before_CN).T, g[block])
    return values
