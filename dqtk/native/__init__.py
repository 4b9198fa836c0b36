"""Kernels of the CPU in C++, compiled at first use: ``load`` gives them or None, ``describe`` says which, or why none."""

from .calls import FEW_ROWS, TYPES, Decoder, IntegerLayer, attention, block_attention, conv_int8, linear_int8, takes_blocks
from .library import cpu_flags, describe, load
from .trellis import TrellisDecoder, trellis_search

__all__ = [
    "FEW_ROWS",
    "TYPES",
    "Decoder",
    "IntegerLayer",
    "TrellisDecoder",
    "attention",
    "block_attention",
    "conv_int8",
    "cpu_flags",
    "describe",
    "linear_int8",
    "load",
    "takes_blocks",
    "trellis_search",
]
