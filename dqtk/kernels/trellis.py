"""dqtk:: ops of weights that are trellis codes, and the search for these codes. ``numerics/trellis.py`` says what they mean.

A weight is cut into tiles and each tile is a ring (``numerics/trellis.py``: ``to_tiles``).
"""

import sys
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import gpu, native
from dqtk.numerics.packing import Packed
from dqtk.numerics.trellis import TILE, decode, encode, from_tiles, search_inputs, unpack
from dqtk.ops import report_of
from dqtk.spec import TensorSpec, Trellis

from .on_cpu import linear_on_cpu
from .straight_through import sum_to_bias


@dataclass(frozen=True, kw_only=True, slots=True)
class TrellisDecoding:
    """What the ops need beside the codes of a stored weight. scale: float32 [N, 1]."""

    trellis: Trellis
    scale: Tensor

    @staticmethod
    def of(packed: Packed, spec: TensorSpec) -> "TrellisDecoding":
        assert isinstance(spec.format, Trellis)
        assert packed.scale is not None
        return TrellisDecoding(trellis=spec.format, scale=packed.scale)

    def _how(self) -> tuple[int, ...]:
        return *TILE, self.trellis.state_bits, self.trellis.bits, self.trellis.vector

    def weight(self, qweight: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """The stored weight [N, K]."""
        return decode_trellis(qweight, self.scale, self.scale.shape[0], k, *self._how(), dtype)

    def linear(self, x: Tensor, qweight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        return linear_trellis(x, qweight, bias, self.scale, self.scale.shape[0], *self._how())


def encode_trellis(x: Tensor, trellis: Trellis, *, weight: Tensor | None = None) -> Tensor:
    """``trellis.encode``, the same states, through the native search on a CPU that has one, else through torch.

    ``report_of("trellis_search", device)`` says which; a line on stderr does, once, of torch on a CPU. A thread of the native
    search holds T 2^(L - KV) / V bytes meanwhile: 4 MiB for a row of 256 numbers at L = 16 and 2 bits.
    """
    library = native.load() if x.device.type == "cpu" else None
    if library is None:
        if x.device.type == "cpu":
            _say_slow()
        return encode(x, trellis, weight=weight)
    return native.trellis_search(library, *search_inputs(x, trellis, weight), trellis)


@cache
def _say_slow() -> None:
    print(f"dqtk: trellis codes are found by {report_of('trellis_search', 'cpu')}", file=sys.stderr)


def decode_trellis_reference(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype) -> Tensor:
    """[n, k] in ``dtype``: the meaning of ``decode_trellis``."""
    trellis, tile = Trellis(state_bits=state_bits, bits=bits, vector=vector), (tile_rows, tile_columns)
    w_NK = from_tiles(decode(unpack(packed, trellis, tile_rows * tile_columns), trellis), n, k, tile)
    return (w_NK if scale is None else w_NK * scale.float()).to(dtype).contiguous()


@torch.library.custom_op("dqtk::decode_trellis", mutates_args=())
def decode_trellis(
    packed: Tensor,
    scale: Tensor | None,
    n: int,
    k: int,
    tile_rows: int,
    tile_columns: int,
    state_bits: int,
    bits: int,
    vector: int,
    dtype: torch.dtype,
) -> Tensor:
    """A weight [n, k] from the bits of its tiles, in float32 and then rounded to ``dtype``.

    Args:
        packed: uint8 [R, W] as ``trellis.pack`` gives them, a row for each tile in the order of ``to_tiles``.
        scale: float [n, 1] or [1, 1] that rows are multiplied with; None: 1.
        tile_rows, tile_columns: a tile; both at least 1.
        state_bits, bits, vector: of the ``Trellis``.
    """
    return decode_trellis_reference(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype)


@decode_trellis.register_kernel("cpu")
def _(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype):
    library = native.load()
    if library is None or dtype not in native.TYPES:
        return decode_trellis_reference(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype)
    trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
    decoder = native.trellis_decoder(library, packed, scale, n, k, (tile_rows, tile_columns), trellis)
    return decoder.rows(0, torch.empty((n, k), dtype=dtype))


@decode_trellis.register_kernel("cuda")
def decode_trellis_on_cuda(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype) -> Tensor:
    """The op on a CUDA device: in Triton, else through torch; ``gpu.describe`` says whether and why."""
    how = packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype
    decoded = gpu.decode_trellis(*how) if gpu.serves(packed.device) else None
    return decode_trellis_reference(*how) if decoded is None else decoded


@decode_trellis.register_fake
def _(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, dtype):
    return packed.new_empty((n, k), dtype=dtype)


@torch.library.custom_op("dqtk::linear_trellis", mutates_args=())
def linear_trellis(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    n: int,
    tile_rows: int,
    tile_columns: int,
    state_bits: int,
    bits: int,
    vector: int,
) -> Tensor:
    """[..., n] = x W^T + bias in the dtype of ``x`` [..., K], with W decoded to that dtype. Others: ``decode_trellis``.

    ``tile_rows`` must divide 64: on the CPU some rows are decoded at a time, so that W is never expanded as a whole.
    """
    how = n, x.shape[-1], tile_rows, tile_columns, state_bits, bits, vector
    weight = decode_trellis_reference(packed, scale, *how, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


@linear_trellis.register_kernel("cpu")
def _(x, packed, bias, scale, n, tile_rows, tile_columns, state_bits, bits, vector):
    assert 64 % tile_rows == 0
    k, library = x.shape[-1], native.load()
    if library is None or x.dtype not in native.TYPES or x.numel() == 0:
        weight = decode_trellis_reference(packed, scale, n, k, tile_rows, tile_columns, state_bits, bits, vector, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()
    trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
    decoder = native.trellis_decoder(library, packed, scale, n, k, (tile_rows, tile_columns), trellis)
    return linear_on_cpu(decoder, x, bias)


@linear_trellis.register_kernel("cuda")
def linear_trellis_on_cuda(x, packed, bias, scale, n, tile_rows, tile_columns, state_bits, bits, vector) -> Tensor:
    """The op on a CUDA device: the whole weight decoded, then torch's matmul."""
    weight = decode_trellis_on_cuda(packed, scale, n, x.shape[-1], tile_rows, tile_columns, state_bits, bits, vector, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


@linear_trellis.register_fake
def _(x, packed, bias, scale, n, tile_rows, tile_columns, state_bits, bits, vector):
    return x.new_empty((*x.shape[:-1], n))


def _save(ctx, inputs, output) -> None:
    x, packed, bias, scale, n, *how = inputs
    ctx.save_for_backward(packed, scale)
    ctx.how, ctx.dtype, ctx.bias_dtype = (n, x.shape[-1], *how), x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):
    grad_x = grad @ decode_trellis(*ctx.saved_tensors, *ctx.how, ctx.dtype) if ctx.needs_input_grad[0] else None
    grad_bias = sum_to_bias(grad, -1).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, None, grad_bias, *[None] * 7


linear_trellis.register_autograd(_backward, setup_context=_save)
