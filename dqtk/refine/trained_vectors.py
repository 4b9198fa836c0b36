"""A layer of vectors while it learns: its books and scales, with gradients; codes stay.

    word = stored word + unit * moved          unit: root mean square of the words of a book, so one learning rate serves all layers
    scale = stored scale * exp(s)

Both are rounded to their stored dtypes in every forward and the derivative of that is passed over, so that storing changes no
number. (VQDM's second phase trains the same numbers, arXiv 2409.00492, section 3.)
"""

from typing import Any

import torch
from torch import Tensor, nn

from dqtk.nn.products import WEIGHT, Stored
from dqtk.numerics.packing import Packed, count_vectors, unpack
from dqtk.numerics.storage import stored_name
from dqtk.numerics.vectors import words_of
from dqtk.spec import VectorCodebook


class TrainedWords:
    """The learned numbers of one layer of words, or of one part of a layer whose input is split.

    parameters: float32 by name: ``moved`` [M, W, D], and ``scale``, the logarithm of a factor on every scale.
    """

    def __init__(self, layer: Any, stored: Stored, index: int):
        self.layer, self.stored, self.index = layer, stored, index
        module: Any = stored
        packed, form = Packed(**{name: getattr(stored, name) for name in WEIGHT}), stored.spec.weight.format
        assert isinstance(form, VectorCodebook)
        assert packed.codebook is not None
        assert packed.scale is not None
        self.start, self.start_scale = packed.codebook.float(), packed.scale
        codes = unpack(packed.qweight, form.code_bits, count_vectors(form, module.k) * form.books)
        self.codes = codes.unflatten(1, (-1, form.books))
        self.unit = self.start.square().mean(dim=(1, 2), keepdim=True).sqrt()
        self.parameters = {
            "moved": nn.Parameter(torch.zeros_like(self.start)),
            "scale": nn.Parameter(torch.zeros_like(packed.scale)),
        }

    def codebook(self) -> Tensor:
        """The books as they would be stored; float32 numbers."""
        words = self.start + self.unit * self.parameters["moved"]
        return words + (words.half().float() - words).detach()

    def scale(self) -> Tensor:
        """The scales, float32, in their shape."""
        return self.start_scale * self.parameters["scale"].exp()

    def weight(self) -> Tensor:
        """float32 [N, K]: the numbers that ``packing.dequantize`` finds after ``store``, bit for bit."""
        return words_of(self.codes, self.codebook()) * self.scale()

    @torch.no_grad()
    def store(self) -> None:
        """Put books and scales into the layer."""
        setattr(self.layer, stored_name("codebook", self.index), self.codebook().half())
        setattr(self.layer, stored_name("scale", self.index), self.scale())
