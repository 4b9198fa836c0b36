"""dqtk:: ops of weights stored as words of learned books: some output rows at a time are looked up, then torch's own matmul.

A weight is never expanded as a whole by the linear op: a chunk of rows is decoded into the compute dtype, multiplied and
forgotten, on every device. The numbers are those of ``packing.dequantize``, rounded to the compute dtype.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk.numerics.packing import Packed, unpack
from dqtk.numerics.vectors import words_of
from dqtk.spec import TensorSpec

from .straight_through import sum_to_bias

CHUNK_BYTES = {"cpu": 4 << 20}  # decoded at a time, as float32
OTHER_CHUNK_BYTES = 256 << 20  # on devices that want large products


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorDecoding:
    """What the ops need beside the codes. codebook: float16 [M, W, D]. scale: float32 [N, 1] or [1, 1]."""

    codebook: Tensor
    scale: Tensor

    @staticmethod
    def of(packed: Packed, spec: TensorSpec) -> "VectorDecoding":
        assert packed.codebook is not None
        assert packed.scale is not None
        return VectorDecoding(codebook=packed.codebook, scale=packed.scale)

    def weight(self, qweight: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """The stored weight [N, K]."""
        return decode_vectors(qweight, self.codebook, self.scale, k, dtype)

    def linear(self, x: Tensor, qweight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        return linear_vectors(x, qweight, bias, self.codebook, self.scale)


def decode_vectors_reference(qweight: Tensor, codebook: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[N, K] in ``dtype``: the meaning of ``decode_vectors``."""
    books, words, length = codebook.shape
    codes = unpack(qweight, (words - 1).bit_length(), k // length * books)
    return (words_of(codes.unflatten(1, (-1, books)), codebook) * scale).to(dtype)


@torch.library.custom_op("dqtk::decode_vectors", mutates_args=())
def decode_vectors(qweight: Tensor, codebook: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """A stored weight as floats [N, K], rounded from float32 to ``dtype``. Arguments: ``VectorDecoding``."""
    weight = torch.empty((qweight.shape[0], k), dtype=dtype, device=qweight.device)
    for rows in _chunks(qweight, k):
        weight[rows] = decode_vectors_reference(qweight[rows], codebook, _of_rows(scale, rows), k, dtype)
    return weight


@decode_vectors.register_fake
def _(qweight, codebook, scale, k, dtype):
    return qweight.new_empty((qweight.shape[0], k), dtype=dtype)


@torch.library.custom_op("dqtk::linear_vectors", mutates_args=())
def linear_vectors(x: Tensor, qweight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor) -> Tensor:
    """[..., N] = x W^T + bias in the dtype of ``x`` [..., K]. Other arguments: ``VectorDecoding``."""
    k, dtype = x.shape[-1], x.dtype
    y = x.new_empty((*x.shape[:-1], qweight.shape[0]))
    bias = None if bias is None else bias.to(dtype)
    for rows in _chunks(qweight, k):
        weight = decode_vectors_reference(qweight[rows], codebook, _of_rows(scale, rows), k, dtype)
        y[..., rows] = F.linear(x, weight, None if bias is None else bias[rows])
    return y


@linear_vectors.register_fake
def _(x, qweight, bias, codebook, scale):
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _chunks(qweight: Tensor, k: int) -> list[slice]:
    n = qweight.shape[0]
    length = max(64, CHUNK_BYTES.get(qweight.device.type, OTHER_CHUNK_BYTES) // (4 * k))
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def _of_rows(scale: Tensor, rows: slice) -> Tensor:
    return scale if scale.shape[0] == 1 else scale[rows]


def _save(ctx, inputs, output) -> None:
    x, qweight, bias, codebook, scale = inputs
    ctx.save_for_backward(qweight, codebook, scale)
    ctx.k, ctx.dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):
    qweight, codebook, scale = ctx.saved_tensors
    grad_x = grad @ decode_vectors(qweight, codebook, scale, ctx.k, ctx.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = sum_to_bias(grad, -1).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias, None, None


linear_vectors.register_autograd(_backward, setup_context=_save)
