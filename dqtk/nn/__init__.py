"""Runtime layers."""

from dqtk.numerics.storage import BUFFERS

from .books import Books, books_of, forget_books, place_books
from .kept import KeptDecoded, keep_decoded, kept_weights
from .layers import QuantConv1d, QuantConv2d, QuantConv3d, Quantized, QuantLinear, runtime_class
from .stepped import Stepped

__all__ = [
    "BUFFERS",
    "Books",
    "KeptDecoded",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantLinear",
    "Quantized",
    "Stepped",
    "books_of",
    "forget_books",
    "keep_decoded",
    "kept_weights",
    "place_books",
    "runtime_class",
]
