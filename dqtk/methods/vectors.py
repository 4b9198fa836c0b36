"""Weights as vectors: the grid, the nearest codes, and a sweep that lets the columns that follow make up for each vector.

The sweep is GPTQ's with ``width`` columns J at a time (GPTVQ, van Baalen et al. 2024, arXiv 2402.15319; block LDLQ of QuIP#, Tseng
et al. 2024, arXiv 2402.04396). With U the upper Cholesky factor of the inverse second moments, choosing q for w_J costs
|(w_J - q) U_JJ^-1|^2 once later columns have made up for it, so the nearest word is sought under that form; the later columns
then lose (w_J - q) U_JJ^-1 U_J,later. Rounds of descent follow: each vector goes to the best word while all others stay.

Every function works on every ``VectorGrid``.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.packing import Packed
from dqtk.numerics.vector_grid import VectorGrid, WordGrid, in_units, root_mean_square
from dqtk.spec import GPTQ, TensorSpec, Trellis, VectorCodebook

from .books import learned_books
from .descent import output_error, ridge
from .gptq import Factor
from .trellis import TrellisGrid


def vector_grid(weight: Tensor, spec: TensorSpec, gram: Tensor | None = None, codebook: Tensor | None = None) -> VectorGrid:
    """The grid of a weight [N, K]; second moments [K, K] say which vectors matter. ``codebook``: shared, else learned here."""
    form, scale = spec.format, root_mean_square(weight, spec)
    if isinstance(form, Trellis):
        return TrellisGrid(spec=spec, scale=scale)
    assert isinstance(form, VectorCodebook)
    assert (codebook is None) == (form.group is None)
    if codebook is not None:
        return WordGrid(spec=spec, scale=scale, codebook=codebook.to(weight.device))
    vectors = in_units(weight, scale).reshape(-1, form.length)
    importance = importance_of(scale, weight, form.length, None if gram is None else gram.diagonal())
    return WordGrid(spec=spec, scale=scale, codebook=learned_books(vectors, form, importance.reshape(-1)))


def importance_of(scale: Tensor, weight: Tensor, length: int, squares: Tensor | None) -> Tensor:
    """[N, K / length]: what a squared error of each vector counts, in units of the scale; ``squares`` [K]: of the inputs."""
    importance = scale.square().expand(len(weight), weight.shape[1] // length)
    return importance if squares is None else importance * squares.float().view(1, -1, length).mean(dim=2)


def nearest_vectors(weight: Tensor, spec: TensorSpec, codebook: Tensor | None = None) -> Packed:
    """Quantize a weight [N, K] to the nearest words, of books that are learned on it or given: the baseline of other solvers.

    Raises:
        ValueError: the length of a vector does not divide K.
    """
    grid = vector_grid(weight, spec, codebook=codebook)
    codes = grid.encode(weight)
    return rescaled(weight, grid, codes).pack(codes)


def swept_vectors(
    weight: Tensor,
    spec: TensorSpec,
    inputs: Inputs,
    solver: GPTQ,
    factor: Factor | None = None,
    codebook: Tensor | None = None,
) -> Packed:
    """Quantize a weight by the sweep.

    Args:
        weight: float [N, K].
        spec: a format of vectors.
        inputs: statistics of the layer's input in the basis of ``weight``.
        solver: options.
        factor: of the same inputs in blocks as wide as a vector, where another weight has needed it before.
        codebook: shared with other layers; None: learned here, if the format has any.
    Returns:
        The stored form. On the calibration inputs never worse than the nearest codes of the same grid: rows that would be (of a
        trellis, groups of rows), take those.
    """
    grid = vector_grid(weight, spec, inputs.gram, codebook)
    codes = swept_codes(weight, grid, inputs.gram, solver, factor)
    return rescaled(weight, grid, codes, inputs.gram).pack(codes)


def swept_codes(weight: Tensor, grid: VectorGrid, gram: Tensor, solver: GPTQ, factor: Factor | None = None) -> Tensor:
    """Codes by sweep and descent; of the nearest where those lose less."""
    factor = factor or Factor.of(gram, solver, grid.width)
    codes = _sweep(weight.float(), grid, factor)
    codes = descended_vectors(weight, codes, grid, gram, solver.sweeps, ridge(gram, solver.damping))
    return better_codes(weight, codes, grid.encode(weight), grid, gram)


def rescaled(weight: Tensor, grid: VectorGrid, codes: Tensor, gram: Tensor | None = None) -> VectorGrid:
    """The grid with the scales, of each row or of all, under which these codes lose least; by second moments if they are given.

    0 where a row of zeros loses less than these codes at any positive scale.
    """
    values = grid.decode(codes).double()
    moved = values if gram is None else values @ gram.double()
    over, under = ((each * moved).sum(dim=1, keepdim=True) for each in (weight.double(), values))
    if grid.scale.shape[0] == 1:
        over, under = over.sum().view(1, 1), under.sum().view(1, 1)
    fine = under > 0
    return grid.scaled(torch.where(fine, (over / torch.where(fine, under, 1.0)).clamp(min=0), 1.0).float())


def better_codes(weight: Tensor, codes: Tensor, others: Tensor, grid: VectorGrid, gram: Tensor) -> Tensor:
    """Of two sets of codes, for every group of rows that has codes of its own, those with less output error."""
    error, other = (_of_groups(output_error(weight, grid.decode(c), gram), grid.rows) for c in (codes, others))
    return torch.where((error <= other).view(-1, *[1] * (codes.ndim - 1)), codes, others)


def _of_groups(numbers: Tensor, rows: int) -> Tensor:
    """Sums over every ``rows`` rows."""
    return pad(numbers, (0, -len(numbers) % rows)).view(-1, rows).sum(dim=1)


def _sweep(weight: Tensor, grid: VectorGrid, factor: Factor) -> Tensor:
    order, upper, width = factor.order, factor.upper, grid.width
    w = weight[:, order].clone()
    found: list[Tensor | None] = [None] * (w.shape[1] // width)
    for start in range(0, w.shape[1], width):
        stop = start + width
        inner, target = upper[start:stop, start:stop], w[:, start:stop]
        root = torch.linalg.solve_triangular(inner, torch.eye(width, device=w.device), upper=True)
        codes = grid.encode(target, root)
        w[:, stop:].addmm_((target - grid.decode(codes)) @ root, upper[start:stop, stop:], alpha=-1)
        found[int(order[start]) // width] = codes
    return torch.cat([codes for codes in found if codes is not None], dim=1)


def descended_vectors(weight: Tensor, codes: Tensor, grid: VectorGrid, gram: Tensor, sweeps: int, damping: float) -> Tensor:
    """Codes improved one vector at a time, all others fixed; no step makes the (damped) output error larger.

    Where the error is least is known: (w_J - q) A_J (w_J - q)^T around a shifted w_J, with A_J the vector's own second moments.
    """
    if not sweeps:
        return codes
    g = gram.to(weight.device, torch.float32, copy=True)
    g.diagonal().add_(damping)
    codes, width = codes.clone(), grid.width
    values = grid.decode(codes)
    slope = (values - weight.float()) @ g
    for _ in range(sweeps):
        for start in range(0, len(g), width):
            block, place = slice(start, start + width), start // width
            root = torch.linalg.cholesky(g[block, block])
            now = values[:, block]
            wanted = now - torch.cholesky_solve(slope[:, block].T, root).T
            tried = grid.encode(wanted, root)
            value = grid.decode(tried)
            gain = ((now - wanted) @ root).square().sum(1) - ((value - wanted) @ root).square().sum(1)
            better = _of_groups(gain, grid.rows) > 0
            codes[:, place] = torch.where(better.view(-1, *[1] * (codes.ndim - 2)), tried[:, 0], codes[:, place])
            moved = torch.where(better.repeat_interleave(grid.rows)[: len(now), None], value - now, torch.zeros_like(now))
            values[:, block] += moved
            slope.addmm_(moved, g[block])
    return codes
