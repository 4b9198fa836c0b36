"""Round to nearest: find each row's range, round, pack. The baseline every other solver must beat on its own objective."""

from torch import Tensor

from dqtk.numerics.packing import Packed, count_groups, empty, layout
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import PerTensor, TensorSpec

BLOCK = 2**18  # weights rounded at a time


def rtn(weight: Tensor, spec: TensorSpec) -> Packed:
    """Quantize a weight.

    Args:
        weight: float [N, K]; K divisible by the group size.
        spec: format, granularity and range.
    Returns:
        The stored form; see ``Packed``.
    Raises:
        ValueError: the group size does not divide K.
    """
    n, k = weight.shape
    count_groups(spec, k)
    if isinstance(spec.granularity, PerTensor):
        return _rtn_rows(weight, spec, None)
    # Output channels do not depend on each other; blocks of them bound the temporaries of the range search.
    amax = weight.abs().amax().view(1, 1)
    tensors, rows = empty(layout(spec, n, k), weight.device), max(1, BLOCK // k)
    for start in range(0, n, rows):
        block = _rtn_rows(weight[start : start + rows], spec, amax).tensors()
        for name, stored in tensors.items():
            if stored.shape[0] == n:
                stored[start : start + rows] = block[name]
            else:  # one number for all rows
                stored.copy_(block[name])
    return Packed(**tensors)


def _rtn_rows(weight: Tensor, spec: TensorSpec, amax: Tensor | None) -> Packed:
    return fit_grid(weight, spec, amax).pack(weight)
