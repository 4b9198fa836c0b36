"""Choices as frozen data: number format, granularity, how a range is found, of one tensor and of one layer.

One dataclass per choice; the type is the key (``methods`` and ``numerics`` dispatch on it), absence is ``None``, there are no mode
strings. Everything here is data that a plan can hold without importing the code that acts on it. JSON is strict both ways: an
unknown type or field is an error that names the place and suggests the nearest known word.

Shapes are given for a weight seen as a matrix [N, K]: N output features, K input features; a convolution's K is (taps, C_in) with
the channel innermost, so that a group lies along C_in at one tap.
"""

from .by_level import ByLevel, SiteSpec, describe, each_of, kinds_of, level_edges, weights_of
from .formats import (
    GROUPS,
    MSE,
    STATIC,
    AbsMax,
    BestFloat,
    Codebook,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Format,
    Granularity,
    Int,
    PerChannel,
    PerGroup,
    PerLevel,
    PerTensor,
    PerToken,
    Range,
    TensorSpec,
    TwoLevel,
)
from .frozen import frozen
from .layer import (
    GPTQ,
    RTN,
    AdaRound,
    ConstantToken,
    Hadamard,
    LayerSpec,
    LowRank,
    ShortcutSplit,
    Smooth,
    Solver,
    Transform,
    without,
)
from .refine import Distill, Reconstruct, Refiner
from .text import canonical, did_you_mean, from_json, to_json

__all__ = [
    "GPTQ",
    "GROUPS",
    "MSE",
    "RTN",
    "STATIC",
    "AbsMax",
    "AdaRound",
    "BestFloat",
    "ByLevel",
    "Codebook",
    "ConstantToken",
    "Distill",
    "Dynamic",
    "E4M3Group",
    "E8M0Group",
    "Float",
    "Format",
    "Granularity",
    "Hadamard",
    "Int",
    "LayerSpec",
    "LowRank",
    "PerChannel",
    "PerGroup",
    "PerLevel",
    "PerTensor",
    "PerToken",
    "Range",
    "Reconstruct",
    "Refiner",
    "ShortcutSplit",
    "SiteSpec",
    "Smooth",
    "Solver",
    "TensorSpec",
    "Transform",
    "TwoLevel",
    "canonical",
    "describe",
    "did_you_mean",
    "each_of",
    "from_json",
    "frozen",
    "kinds_of",
    "level_edges",
    "to_json",
    "weights_of",
    "without",
]
