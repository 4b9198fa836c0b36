"""Every tensor that a quantized layer stores: those of its weight, of its input, of its transforms and of its low-rank branch.

qweight, scale, group_scale, zero, selector, codebook   the weight, see ``packing.Packed``; shared books are ``nn/books.py``'s
input_scale   float32 [L]                     static inputs only; L = 1, or one per interval of the noise level (``PerLevel``)
input_zero    int32 [L]                       static integer inputs; x ~ input_scale * (code - zero), codes -2^(b-1) .. 2^(b-1)-1
              float32 [L]                     static unsigned floats; in levels
smooth        bfloat16 [K]                    what the input's channels are multiplied with
signs         uint8 [ceil(K / 8)]             bit 1: the channel is negated before the Hadamard matrix
down, up      bfloat16 [R, K], [N, R]         the branch, on the transformed and not rounded input
token         bfloat16 [K]                    an input row that is the same for every prompt
token_output  bfloat16 [N]                    what the exact weight makes of it, without the bias

A layer whose input is split stores the tensors of every part, as of a layer with the part's channels. Those of the first have these
names, those of the second the same with ``_2`` behind them, and so on. The token is the whole layer's. A layer with several weights
for intervals of the noise level (``ByLevel``) stores the tensors of every weight in the same way; it has no parts and no token.
"""

import re
from typing import NamedTuple

import torch

from dqtk.spec import ByLevel, ConstantToken, Float, Hadamard, Int, LayerSpec, PerLevel, ShortcutSplit, SiteSpec, Smooth, without

from .packing import Layout, bytes_of, count_groups, layout, packed_width

BUFFERS = (
    "qweight",
    "scale",
    "group_scale",
    "zero",
    "selector",
    "codebook",
    "input_scale",
    "input_zero",
    "smooth",
    "signs",
    "down",
    "up",
    "token",
    "token_output",
)


class Part(NamedTuple):
    """Channels ``start`` to ``stop`` of a split layer's input, and what happens to them."""

    place: int
    spec: LayerSpec
    start: int
    stop: int


def parts_of(spec: LayerSpec, channels: int) -> tuple[Part, ...]:
    """The parts of a layer's input; none where it is not split, or where nobody has looked yet.

    Raises ``ValueError`` for a split behind the last channel.
    """
    at = next((transform.at for transform in spec.transforms if isinstance(transform, ShortcutSplit)), ())
    if not at:
        return ()
    if at[-1] >= channels:
        raise ValueError(f"ShortcutSplit: at must be below the layer's {channels} input channels, got {at}. Leave it empty.")
    rest = without(spec, ConstantToken, ShortcutSplit)
    bounds = (0, *at, channels)
    return tuple(Part(i, rest, bounds[i], bounds[i + 1]) for i in range(len(at) + 1))


def stored_name(name: str, index: int) -> str:
    """Name of a part's (or weight's) tensor in its layer."""
    return name if index == 0 else f"{name}_{index + 1}"


def tensor_name(stored: str) -> str:
    """Inverse of ``stored_name``, without the part."""
    return re.sub(r"_\d+$", "", stored)


def is_stored(name: str) -> bool:
    """Whether a tensor of a quantized layer is one of these, and no parameter."""
    return tensor_name(name) in BUFFERS


def layer_layout(spec: SiteSpec, n: int, k: int, channels: int) -> Layout:
    """Name -> (shape, dtype) of a layer with a weight matrix [n, k].

    ``channels``: of the input; k, unless it is a convolution. Raises ``ValueError`` if a group size does not divide.
    """
    found: Layout = {}
    if isinstance(spec, ByLevel):
        for index, weight in enumerate(spec.weights):
            layouts = [layer_layout(kind, n, k, channels) for kind in weight]  # of all: raises for groups of any input
            found |= {stored_name(name, index): what for name, what in layouts[0].items()}
        return found
    parts = parts_of(spec, channels)
    if parts:
        for part in parts:
            width = part.stop - part.start
            own = layer_layout(part.spec, n, k // channels * width, width)
            found |= {stored_name(name, part.place): what for name, what in own.items()}
        return found | _token_layout(spec, n, k)
    found = layout(spec.weight, n, k)
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
    return found | _token_layout(spec, n, k)


def _token_layout(spec: LayerSpec, n: int, k: int) -> Layout:
    constant = any(isinstance(transform, ConstantToken) for transform in spec.transforms)
    return {"token": ((k,), torch.bfloat16), "token_output": ((n,), torch.bfloat16)} if constant else {}


def layer_bytes(spec: SiteSpec, n: int, k: int, channels: int) -> int:
    """Bytes of all of them: what the file holds for the layer, bias aside."""
    return bytes_of(layer_layout(spec, n, k, channels))
