"""Kernels of the CPU in C++, compiled at first use: ``load`` gives them or None, ``describe`` says which, or why none."""

from .calls import IntegerLayer, attention, block_attention, conv_int8, linear_int8, takes_blocks, weight_decoder
from .decoder import FEW_ROWS, TYPES, Decoder
from .library import cpu_flags, describe, load
from .trellis import trellis_decoder, trellis_search
from .vectors import vector_decoder

__all__ = [
    "FEW_ROWS",
    "TYPES",
    "Decoder",
    "IntegerLayer",
    "attention",
    "block_attention",
    "conv_int8",
    "cpu_flags",
    "describe",
    "linear_int8",
    "load",
    "takes_blocks",
    "trellis_decoder",
    "trellis_search",
    "vector_decoder",
    "weight_decoder",
]
