"""Kernels of the CPU in C++, compiled at first use: ``load`` gives them or None, ``describe`` says which, or why none."""

from .calls import TYPES, Decoder, conv_int8, linear_int8
from .library import describe, load

__all__ = ["TYPES", "Decoder", "conv_int8", "describe", "linear_int8", "load"]
