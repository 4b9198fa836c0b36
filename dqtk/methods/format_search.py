"""Which exponent/mantissa split loses least (Kuzmin et al. 2022, arXiv 2208.09225; 2408.06995 for diffusion models); of a
calibrated input with several tables, which of them.

One split per tensor: kernels and files have one. The range is searched for every split as its spec says; multiples of the absmax
range are tried, so the search does not depend on the scale of the tensor (LLM-FP4's search over multiples of the exponent bias
does).
"""

from dataclasses import replace

import torch
from torch import Tensor

from dqtk.numerics.affine import find_scale, squared_error
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import BestFloat, Codebook, Float, Format, TensorSpec

ROWS = 256  # of a weight that are looked at
NUMBERS = 2**16  # of an input


def concrete(weight: Tensor, spec: TensorSpec) -> TensorSpec:
    """The spec of a weight [N, K] with the split found, where it asks for one."""
    if not isinstance(spec.format, BestFloat):
        return spec
    rows = weight[:: -(-weight.shape[0] // ROWS)].float()

    def error(form: Float) -> float:
        tried = replace(spec, format=form)
        return float((fit_grid(rows, tried).round(rows) - rows).square().sum())

    return replace(spec, format=min(spec.format.splits, key=error))


def concrete_input(
    sample: Tensor, spec: TensorSpec, ends: tuple[Tensor, Tensor] | None = None
) -> tuple[TensorSpec, Tensor, Tensor | None]:
    """The spec of a static input, its split or table found on a sample [R, K]; scale [1, 1]; zero [1, 1] or None.

    ``ends``: least and largest number ever seen [1], where the sample may miss them.
    """
    numbers = sample.float().flatten()
    # Few of them, drawn at random, tell where most lie; the ends tell how far the range must reach.
    if numbers.numel() > NUMBERS:
        drawn = torch.randint(numbers.numel(), (NUMBERS,), generator=torch.Generator().manual_seed(0))
        some = numbers[drawn.to(numbers.device)]
    else:
        some = numbers
    reach = [end.float().view(1) for end in (numbers.aminmax() if ends is None else ends)]
    row = torch.cat([some, *reach])[None]
    best: tuple[float, TensorSpec, Tensor, Tensor | None] | None = None
    for form in _candidates(spec.format):
        scale, zero = find_scale(row, form, spec.range)
        error = float(squared_error(row, scale, zero, form))
        if best is None or error < best[0]:
            best = (error, replace(spec, format=form), scale, zero)
    assert best is not None
    return best[1:]


def _candidates(form: Format) -> tuple[Format, ...]:
    """What a calibrated input may become: splits of a float, tables of a codebook."""
    if isinstance(form, BestFloat):
        return form.splits
    if isinstance(form, Codebook):
        return tuple(replace(form, tables=(values,)) for values in form.tables)
    return (form,)
