"""dqtk:: ops of weights stored as words of learned books: decoded to the compute dtype, then torch's own matmul.

The linear op never expands a weight as a whole on the CPU (``on_cpu.py``), nor where torch looks the words up: a chunk of rows is
decoded, multiplied and forgotten. The numbers are those of ``packing.dequantize``, rounded to the compute dtype, bit for bit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import gpu, native
from dqtk.numerics.packing import Packed, unpack
from dqtk.numerics.vectors import words_of
from dqtk.spec import TensorSpec

from .on_cpu import linear_on_cpu
from .straight_through import sum_to_bias

CHUNK_BYTES = {"cpu": 4 << 20}  # decoded through torch at a time, as float32
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
    return decode_through_torch(qweight, codebook, scale, k, dtype)


def decode_through_torch(qweight: Tensor, codebook: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The reference, some rows at a time."""
    weight = torch.empty((qweight.shape[0], k), dtype=dtype, device=qweight.device)
    for rows in _chunks(qweight, k):
        weight[rows] = decode_vectors_reference(qweight[rows], codebook, _of_rows(scale, rows), k, dtype)
    return weight


@decode_vectors.register_kernel("cpu")
def _(qweight, codebook, scale, k, dtype):
    library = native.load()
    if library is None or dtype not in native.TYPES:
        return decode_through_torch(qweight, codebook, scale, k, dtype)
    decoder = native.vector_decoder(library, qweight, codebook, scale, k)
    return decoder.rows(0, torch.empty((qweight.shape[0], k), dtype=dtype))


@decode_vectors.register_kernel("cuda")
def decode_vectors_on_cuda(qweight, codebook, scale, k, dtype) -> Tensor:
    """The op on a CUDA device: in Triton, else through torch; ``gpu.describe`` says whether and why."""
    if gpu.serves(qweight.device) and dtype in gpu.TYPES:
        return gpu.decode_vectors(qweight, codebook, scale, k, dtype)
    return decode_through_torch(qweight, codebook, scale, k, dtype)


@decode_vectors.register_fake
def _(qweight, codebook, scale, k, dtype):
    return qweight.new_empty((qweight.shape[0], k), dtype=dtype)


@torch.library.custom_op("dqtk::linear_vectors", mutates_args=())
def linear_vectors(x: Tensor, qweight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor) -> Tensor:
    """[..., N] = x W^T + bias in the dtype of ``x`` [..., K]. Other arguments: ``VectorDecoding``."""
    return linear_through_torch(x, qweight, bias, codebook, scale)


def linear_through_torch(x: Tensor, qweight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor) -> Tensor:
    """The product with the reference, some rows of the weight at a time."""
    k, dtype = x.shape[-1], x.dtype
    y = x.new_empty((*x.shape[:-1], qweight.shape[0]))
    bias = None if bias is None else bias.to(dtype)
    for rows in _chunks(qweight, k):
        weight = decode_vectors_reference(qweight[rows], codebook, _of_rows(scale, rows), k, dtype)
        y[..., rows] = F.linear(x, weight, None if bias is None else bias[rows])
    return y


@linear_vectors.register_kernel("cpu")
def _(x, qweight, bias, codebook, scale):
    library = native.load()
    if library is None or x.dtype not in native.TYPES or x.numel() == 0:
        return linear_through_torch(x, qweight, bias, codebook, scale)
    return linear_on_cpu(native.vector_decoder(library, qweight, codebook, scale, x.shape[-1]), x, bias)


@linear_vectors.register_kernel("cuda")
def linear_vectors_on_cuda(x, qweight, bias, codebook, scale) -> Tensor:
    """The op on a CUDA device: the whole weight decoded in Triton, then torch's matmul; else as the reference."""
    if not (gpu.serves(x.device) and x.dtype in gpu.TYPES):
        return linear_through_torch(x, qweight, bias, codebook, scale)
    weight = gpu.decode_vectors(qweight, codebook, scale, x.shape[-1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


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
