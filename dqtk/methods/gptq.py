"""GPTQ: round one input column at a time; the columns that follow make up for it (Frantar et al. 2022, arXiv 2210.17323).

It lowers tr((Q - W) G (Q - W)^T), the output error over the calibration inputs, whose mean of x x^T is G. With the upper Cholesky
factor U of (G + damping)^-1, rounding column j leaves an error e_j = (w_j - q_j) / U_jj, and the later columns lose e_j U_j: that
is the least-squares answer. Columns are worked off in blocks, so that most of it is matrix products. The grid is fitted beforehand
("static groups"), so any format and granularity works, and columns may be taken in the order of their inputs' size. Coordinate
descent on the same error follows.
"""

import math

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.packing import Packed
from dqtk.numerics.weight_grid import WeightGrid, fit_grid
from dqtk.spec import GPTQ, BeamSearch, TensorSpec

from .descent import BLOCK, descended, output_error, ridge


def gptq(weight: Tensor, spec: TensorSpec, inputs: Inputs, solver: GPTQ, factor: "Factor | None" = None) -> Packed:
    """Quantize a weight.

    Args:
        weight: float [N, K].
        spec: format, granularity and range.
        inputs: statistics of the layer's input in the basis of ``weight``.
        solver: options.
        factor: of the same inputs, where another weight has needed it before.
    Returns:
        The stored form. Never worse than rounding to nearest on the calibration inputs: rows that would be, are rounded to nearest.
    """
    grid = fit_grid(weight, spec)
    factor = factor or Factor.of(inputs.gram, solver)
    values = _sweep(weight.float(), grid, factor)
    values = descended(weight, values, grid, inputs.gram, solver.sweeps, ridge(inputs.gram, solver.damping))
    plain = grid.round(weight)
    error, plain_error = (output_error(weight, v, inputs.gram) for v in (values, plain))
    values = torch.where((error <= plain_error)[:, None], values, plain)
    return grid.pack(values)


class Factor:
    """The order of the columns and U, the upper Cholesky factor of the inverse of the damped Gram matrix in that order."""

    def __init__(self, order: Tensor, upper: Tensor):
        self.order, self.upper = order, upper

    @staticmethod
    def of(gram: Tensor, solver: GPTQ | BeamSearch, width: int = 1) -> "Factor":
        """Damping is raised tenfold until the matrix is positive definite: an eigenvalue below zero by rounding can ask for it.

        ``width``: of blocks of columns that stay together.

        Raises ``ValueError`` for a matrix that is not finite.
        """
        diagonal = gram.diagonal()
        order = torch.arange(len(gram), device=gram.device)
        if isinstance(solver, BeamSearch) or solver.act_order:
            order = order.view(-1, width)[diagonal.view(-1, width).sum(dim=1).argsort(descending=True, stable=True)].flatten()
        damped, damping = gram[order][:, order], ridge(gram, solver.damping)
        while math.isfinite(damping):
            damped.diagonal().copy_(diagonal[order] + damping)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not int(failed):
                inverse = torch.cholesky_inverse(lower)
                del lower
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not int(failed):
                    return Factor(order, upper.float())
            damping *= 10
        raise ValueError("gptq: second moments must be finite, got NaN or infinity. Calibrate in float32 or bfloat16.")


def _sweep(weight: Tensor, grid: WeightGrid, factor: Factor) -> Tensor:
    """Values on the grid, float32 [N, K]."""
    order, upper = factor.order, factor.upper
    w = weight[:, order].clone()
    values = torch.empty_like(w)
    k = w.shape[1]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        part_CN, inner = w[:, start:stop].T.contiguous(), upper[start:stop, start:stop]
        errors_CN = torch.empty_like(part_CN)
        for j in range(stop - start):
            q = grid.round(part_CN[j][:, None], order[start + j : start + j + 1])
            values[:, start + j : start + j + 1] = q
            errors_CN[j] = (part_CN[j] - q[:, 0]) / inner[j, j]
            part_CN[j + 1 :].addr_(inner[j, j + 1 :], errors_CN[j], alpha=-1)
        if stop < k:
            w[:, stop:].addmm_(errors_CN.T, upper[start:stop, stop:], alpha=-1)
    return torch.empty_like(values).index_copy_(1, order, values)
