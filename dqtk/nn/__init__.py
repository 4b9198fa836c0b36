"""Runtime layers."""

from .layers import FLOAT_BUFFERS, QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear, Quantized, runtime_class

__all__ = ["FLOAT_BUFFERS", "QuantConv1d", "QuantConv2d", "QuantConv3d", "QuantLinear", "Quantized", "runtime_class"]
