"""Runtime layers."""

from dqtk.numerics.storage import BUFFERS

from .layers import QuantConv1d, QuantConv2d, QuantConv3d, Quantized, QuantLinear, runtime_class

__all__ = ["BUFFERS", "QuantConv1d", "QuantConv2d", "QuantConv3d", "QuantLinear", "Quantized", "runtime_class"]
