"""A layer of vectors while it learns: its scales and, if it has any, its books, with gradients; codes stay.

    word = stored word + unit * moved          unit: root mean square of the words of a book, so one learning rate serves all layers
    scale = stored scale * exp(s)

Both are rounded to their stored dtypes in every forward and the derivative of that is passed over, so that storing changes no
number. (VQDM's second phase trains the same numbers, arXiv 2409.00492, section 3.)
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.nn.products import WEIGHT, Stored
from dqtk.numerics.packing import Packed, count_vectors, dequantize, unpack
from dqtk.numerics.storage import stored_name
from dqtk.numerics.vectors import words_of
from dqtk.spec import VectorCodebook


class TrainedVectors:
    """The learned numbers of one layer of vectors, or of one part of a layer whose input is split.

    parameters: float32 by name: ``moved`` [M, W, D] where there are books, and ``scale``, the logarithm of a factor on every scale.
    """

    def __init__(self, layer: Any, stored: Stored, index: int):
        self.layer, self.stored, self.index = layer, stored, index
        module: Any = stored
        packed, spec = Packed(**{name: getattr(stored, name) for name in WEIGHT}), stored.spec.weight
        assert packed.scale is not None
        self.start_scale, form = packed.scale, spec.format
        self.parameters = {"scale": nn.Parameter(torch.zeros_like(packed.scale))}
        if not isinstance(form, VectorCodebook):
            self.numbers = dequantize(replace(packed, scale=torch.ones_like(packed.scale)), spec, module.k)
            self.start = None
            return
        assert packed.codebook is not None
        self.start = packed.codebook.float()
        codes = unpack(packed.qweight, form.code_bits, count_vectors(form, module.k) * form.books)
        self.codes = codes.unflatten(1, (-1, form.books))
        self.unit = self.start.square().mean(dim=(1, 2), keepdim=True).sqrt()
        self.parameters["moved"] = nn.Parameter(torch.zeros_like(self.start))

    def codebook(self) -> Tensor | None:
        """The books as they would be stored; float32 numbers. None of a trellis."""
        if self.start is None:
            return None
        words = self.start + self.unit * self.parameters["moved"]
        return words + (words.half().float() - words).detach()

    def scale(self) -> Tensor:
        """The scales, float32, in their shape."""
        return self.start_scale * self.parameters["scale"].exp()

    def weight(self) -> Tensor:
        """float32 [N, K]: the numbers that ``packing.dequantize`` finds after ``store``, bit for bit."""
        books = self.codebook()
        return (self.numbers if books is None else words_of(self.codes, books)) * self.scale()

    @torch.no_grad()
    def store(self) -> None:
        """Put books and scales into the layer."""
        books = self.codebook()
        if books is not None:
            setattr(self.layer, stored_name("codebook", self.index), books.half())
        setattr(self.layer, stored_name("scale", self.index), self.scale())
