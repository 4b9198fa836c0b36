"""A 16-bit branch of low rank that takes the large part of a weight off the rounded rest (SVDQuant, Li et al. 2024, arXiv
2411.05007).

W ~ up @ down + Q(W - up @ down). The first branch is the best approximation of W; then branch and rest alternate, the branch
being the best approximation of what rounding the rest left over, and the pair with the least output error is kept. Sites that
share an input share ``down``: the branch is found on their weights stacked. The output error counts what rounding the weight does
to the calibration inputs, and what rounding the inputs does to the rest: the noise of inputs grows with the weight that meets it,
which is why the branch pays.

The decomposition is randomized (Halko et al. 2011), seeded; the factors are rounded to bfloat16 before the rest is taken, so the
rest makes up for that too.
"""

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import LowRank, TensorSpec

from .descent import output_error

OVERSAMPLING, POWER_ITERATIONS = 10, 4


def low_rank(
    weight: Tensor, spec: TensorSpec, inputs: Inputs, branch: LowRank, input_noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The factors of the branch.

    Args:
        weight: float [N, K], of all sites that share the input, stacked.
        spec: how the rest will be stored.
        inputs: statistics of the input in the basis of ``weight``.
        branch: rank and number of alternations.
        input_noise: float32 [K], mean square of what rounding does to each input; None where inputs stay.
    Returns:
        down bfloat16 [R, K] and up bfloat16 [N, R]; R at most N and K.
    """
    weight = weight.float()
    best, least = None, float("inf")
    target = weight
    for _ in range(branch.iterations):
        down, up = _factors(target, branch.rank)
        rest = weight - up.float() @ down.float()
        rounded = fit_grid(rest, spec).round(rest)
        error = float(output_error(rest, rounded, inputs.gram).sum())
        if input_noise is not None:
            error += float((rounded.square() * input_noise).sum())
        if best is not None and error >= least:
            break
        best, least = (down, up), error
        target = weight - rounded
    assert best is not None
    return best


def _factors(target: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down and up; as ``torch.svd_lowrank``, but from a generator of its own: the sketch is the same on every device."""
    rank = min(rank, *target.shape)
    num = min(rank + OVERSAMPLING, *target.shape)
    sketch = torch.randn(target.shape[1], num, generator=torch.Generator().manual_seed(0)).to(target.device)
    basis = torch.linalg.qr(target @ sketch).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(target @ torch.linalg.qr(target.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ target, full_matrices=False)
    root = values[:rank].sqrt()
    up = (basis @ left[:, :rank]) * root
    return (right[:rank] * root[:, None]).bfloat16().contiguous(), up.bfloat16().contiguous()
