"""Every tensor that a quantized layer stores: those of its weight, of its input, of its transforms and of its low-rank branch.

qweight, scale, group_scale, zero, selector   the weight, see ``packing.Packed``
input_scale   float32 [L]                     static inputs only; L = 1, or one per interval of the noise level (``PerLevel``)
input_zero    int32 [L]                       static integer inputs; x ~ input_scale * (code - zero), codes -2^(b-1) .. 2^(b-1)-1
              float32 [L]                     static unsigned floats; in levels
smooth        bfloat16 [K]                    what the input's channels are multiplied with
signs         uint8 [ceil(K / 8)]             bit 1: the channel is negated before the Hadamard matrix
down, up      bfloat16 [R, K], [N, R]         the branch, on the transformed and not rounded input

A layer with several weights for intervals of the noise level (``ByLevel``) has all of these once per weight, with _2, _3 ... behind
the names of the second and those that follow.
"""

import torch

from dqtk.spec import ByLevel, Float, Hadamard, Int, PerLevel, SiteSpec, Smooth

from .packing import Layout, bytes_of, count_groups, layout, packed_width

BUFFERS = ("qweight", "scale", "group_scale", "zero", "selector", "input_scale", "input_zero", "smooth", "signs", "down", "up")


def suffix_of(index: int) -> str:
    """What stands behind the names of a layer's weight number ``index`` and of what belongs to it."""
    return f"_{index + 1}" if index else ""


def layer_layout(spec: SiteSpec, n: int, k: int, channels: int) -> Layout:
    """Name -> (shape, dtype) of a layer with a weight matrix [n, k].

    ``channels``: of the input; k, unless it is a convolution. Raises ``ValueError`` if a group size does not divide.
    """
    if isinstance(spec, ByLevel):
        found: Layout = {}
        for index, weight in enumerate(spec.weights):
            mine = layer_layout(weight[0], n, k, channels)
            found |= {name + suffix_of(index): part for name, part in mine.items()}
            for other in weight[1:]:
                layer_layout(other, n, k, channels)  # raises for groups of its input
        return found
    found = dict(layout(spec.weight, n, k))
    if spec.input is not None:
        count_groups(spec.input, channels)
    if spec.input is not None and spec.needs_ranges:
        intervals = spec.input.granularity.count if isinstance(spec.input.granularity, PerLevel) else 1
        found["input_scale"] = ((intervals,), torch.float32)
        if isinstance(spec.input.format, Int):
            found["input_zero"] = ((intervals,), torch.int32)
        if isinstance(spec.input.format, Float) and not spec.input.format.signed:
            found["input_zero"] = ((intervals,), torch.float32)
    for transform in spec.transforms:
        if isinstance(transform, Smooth):
            found["smooth"] = ((channels,), torch.bfloat16)
        if isinstance(transform, Hadamard):
            found["signs"] = ((packed_width(1, channels),), torch.uint8)
    if spec.low_rank is not None:
        rank = min(spec.low_rank.rank, n, k)
        found["down"], found["up"] = ((rank, k), torch.bfloat16), ((n, rank), torch.bfloat16)
    return found


def layer_bytes(spec: SiteSpec, n: int, k: int, channels: int) -> int:
    """Bytes of all of them: what the file holds for the layer, bias aside."""
    return bytes_of(layer_layout(spec, n, k, channels))
