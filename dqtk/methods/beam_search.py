"""Additive vector quantization as VQDM solves a layer (Egiazarian et al. 2024, arXiv 2409.00492; AQLM, arXiv 2401.06118).

It lowers tr((Q - W) G (Q - W)^T), the output error over the calibration inputs, in turns: words by beam search with books and
scales fixed, books and scales with the words fixed, until a round gains less than ``tolerance``. Three departures:

- Words start from the one-pass sweep (``vectors.py``), not from the nearest ones.
- The beam lives within one vector: its best sum of words is sought under the exact error given all other vectors, and only the
  vector's own columns are touched. Hypotheses that differ in several vectors are not kept: each would take a matrix of weights.
- Books and scales are found by least squares (conjugate gradients on the same error, a closed form for scales) in place of 100
  steps of Adam: no learning rate, and every step is the best one.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.packing import Packed
from dqtk.numerics.vector_grid import WordGrid
from dqtk.numerics.vectors import words_of
from dqtk.spec import GPTQ, BeamSearch, TensorSpec

from .books import fitted, sums_of
from .descent import ridge
from .gptq import Factor
from .vectors import descended_vectors, rescaled, swept_codes, vector_grid


def beam_search(
    weight: Tensor,
    spec: TensorSpec,
    inputs: Inputs,
    solver: BeamSearch,
    factor: Factor | None = None,
    codebook: Tensor | None = None,
) -> Packed:
    """Quantize a weight.

    Args:
        weight: float [N, K].
        spec: ``VectorCodebook``.
        inputs: statistics of the layer's input in the basis of ``weight``.
        solver: options.
        factor: of the same inputs in blocks as wide as a vector, where another weight has needed it before.
        codebook: shared with other layers, which stays as it is; None: learned here.
    Returns:
        The stored form. Never worse in all than the nearest words of books that are learned on the weight, or of those given.
    """
    weight = weight.float()
    start = vector_grid(weight, spec, inputs.gram, codebook)
    assert isinstance(start, WordGrid)
    grid = start = replace(start, beam=solver.beam)
    damping = ridge(inputs.gram, solver.damping)
    gram = inputs.gram.to(weight.device, torch.float32, copy=True)
    gram.diagonal().add_(damping)
    codes = swept_codes(weight, grid, inputs.gram, GPTQ(damping=solver.damping, sweeps=0), factor)
    error = _error(weight, grid, codes, gram)
    for _ in range(solver.rounds):
        before = error
        codes = descended_vectors(weight, codes, grid, inputs.gram, 1, damping)
        grid, error = _refitted(weight, grid, codes, gram, books=codebook is None)
        if error >= before * (1 - solver.tolerance):
            break
    plain = start.encode(weight)
    if _error(weight, grid, codes, inputs.gram) > _error(weight, start, plain, inputs.gram):
        return start.pack(plain)
    return grid.pack(codes)


def _error(weight: Tensor, grid: WordGrid, codes: Tensor, gram: Tensor) -> float:
    delta = (grid.decode(codes) - weight).to(gram.dtype)
    return float(((delta @ gram) * delta).sum())


def _refitted(weight: Tensor, grid: WordGrid, codes: Tensor, gram: Tensor, *, books: bool) -> tuple[WordGrid, float]:
    """Books, if they may change, then scales, that fit the codes best, and the error then; each kept only if it lowers it."""
    error = _error(weight, grid, codes, gram)
    if books:
        tried = replace(grid, codebook=_fitted_books(weight, grid, codes, gram))
        if (found := _error(weight, tried, codes, gram)) < error:
            grid, error = tried, found
    scaled = rescaled(weight, grid, codes, gram)
    assert isinstance(scaled, WordGrid)
    if (found := _error(weight, scaled, codes, gram)) < error:
        grid, error = scaled, found
    return grid, error


def _fitted_books(weight: Tensor, grid: WordGrid, codes: Tensor, gram: Tensor) -> Tensor:
    words, square = grid.codebook.shape[1], grid.scale.square().expand(len(weight), 1)
    return fitted(
        grid.codebook,
        target=sums_of((weight @ gram) * grid.scale, codes, words),
        curvature=lambda books: sums_of((words_of(codes, books) @ gram) * square, codes, words),
        diagonal=sums_of(square * gram.diagonal(), codes, words),
    )
