"""Runtime layers."""

from dqtk.numerics.storage import BUFFERS

from .layers import QuantConv1d, QuantConv2d, QuantConv3d, Quantized, QuantLinear, runtime_class
from .stepped import Stepped

__all__ = ["BUFFERS", "QuantConv1d", "QuantConv2d", "QuantConv3d", "QuantLinear", "Quantized", "Stepped", "runtime_class"]
