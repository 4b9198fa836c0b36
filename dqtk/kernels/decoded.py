"""dqtk:: ops of layers whose weights alone are rounded: decode to the compute dtype, then torch's own matmul.

On the CPU the linear op never expands a weight as a whole (``on_cpu.py``). The decoded numbers equal ``packing.dequantize`` bit for
bit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import gpu, native
from dqtk.numerics.floats import values_of
from dqtk.numerics.packing import Packed, group_steps, integer_weight, unpack
from dqtk.spec import Codebook, Float, Int, TensorSpec, TwoLevel

from .on_cpu import linear_on_cpu
from .straight_through import sum_to_bias


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoding:
    """What the ops need beside the codes: weight = (level - zero) * step.

    steps: float32 [N, G], [N, 1] or [1, 1]. zero: uint8, its shape, or None. group_scale: uint8 [N, G], which integer codes are
    multiplied with first (``TwoLevel``). levels: float32 [tables, 2^bits] of codes that are no integers; selector: table of each
    group, packed. bits: width of a code. signed: integer codes are stored with an offset of 2^(bits-1), or as int8.
    """

    steps: Tensor
    zero: Tensor | None
    group_scale: Tensor | None
    selector: Tensor | None
    levels: Tensor | None
    bits: int
    signed: bool

    @staticmethod
    def of(packed: Packed, spec: TensorSpec) -> "Decoding":
        form, two_level = spec.format, isinstance(spec.granularity, TwoLevel)
        steps = packed.scale if two_level else group_steps(packed, spec)
        assert steps is not None
        levels, device = None, packed.qweight.device
        if isinstance(form, Float):
            levels = values_of(torch.arange(2**form.bits, dtype=torch.uint8, device=device), form)[None]
        elif isinstance(form, Codebook):
            levels = torch.tensor(form.tables, dtype=torch.float32, device=device)
        return Decoding(
            steps=steps.float(),
            zero=packed.zero,
            group_scale=packed.group_scale if two_level else None,
            selector=packed.selector,
            levels=levels,
            bits=spec.bits,
            signed=isinstance(form, Int) and form.symmetric,
        )

    def arguments(self) -> tuple:
        """In the order of the ops."""
        return self.steps, self.zero, self.group_scale, self.selector, self.levels, self.bits, self.signed

    def weight(self, qweight: Tensor, k: int, dtype: torch.dtype) -> Tensor:
        """The stored weight [N, K]."""
        return decode_weight(qweight, *self.arguments(), k, dtype)

    def linear(self, x: Tensor, qweight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        return linear_decoded(x, qweight, bias, *self.arguments())


def decode_reference(qweight, steps, zero, group_scale, selector, levels, bits, signed, k, dtype) -> Tensor:
    """[N, K] in ``dtype``: the meaning of ``decode_weight``."""
    groups = steps.shape[1]
    if levels is None:
        codes = integer_weight(qweight, group_scale, bits, k) if signed else unpack(qweight, bits, k)
        values = codes.float().unflatten(1, (groups, -1))
    else:
        codes = unpack(qweight.view(torch.uint8), bits, k).long()
        if selector is None:
            values = levels[0][codes].unflatten(1, (groups, -1))
        else:
            which = unpack(selector, (levels.shape[0] - 1).bit_length(), groups).long()[..., None]
            values = levels[which, codes.unflatten(1, (groups, -1))]
    if zero is not None:
        values = values - zero[..., None]
    return (values * steps[..., None]).flatten(1).to(dtype)


@torch.library.custom_op("dqtk::decode_weight", mutates_args=())
def decode_weight(
    qweight: Tensor,
    steps: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    selector: Tensor | None,
    levels: Tensor | None,
    bits: int,
    signed: bool,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """A stored weight as floats [N, K], rounded from float32 to ``dtype``. Arguments: ``Decoding``."""
    return decode_reference(qweight, steps, zero, group_scale, selector, levels, bits, signed, k, dtype)


@decode_weight.register_kernel("cpu")
def _(qweight, steps, zero, group_scale, selector, levels, bits, signed, k, dtype):
    library = native.load()
    if library is None or dtype not in native.TYPES:
        return decode_reference(qweight, steps, zero, group_scale, selector, levels, bits, signed, k, dtype)
    decoder = native.weight_decoder(library, qweight, steps, zero, group_scale, selector, levels, bits, signed, k)
    return decoder.rows(0, torch.empty((qweight.shape[0], k), dtype=dtype))


@decode_weight.register_fake
def _(qweight, steps, zero, group_scale, selector, levels, bits, signed, k, dtype):
    return steps.new_empty((qweight.shape[0], k), dtype=dtype)


@torch.library.custom_op("dqtk::linear_decoded", mutates_args=())
def linear_decoded(
    x: Tensor,
    qweight: Tensor,
    bias: Tensor | None,
    steps: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    selector: Tensor | None,
    levels: Tensor | None,
    bits: int,
    signed: bool,
) -> Tensor:
    """[..., N] = x W^T + bias in the dtype of ``x`` [..., K], with W decoded to that dtype. Other arguments: ``Decoding``."""
    weight = decode_reference(qweight, steps, zero, group_scale, selector, levels, bits, signed, x.shape[-1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


@linear_decoded.register_kernel("cpu")
def _(x, qweight, bias, steps, zero, group_scale, selector, levels, bits, signed):
    k, library = x.shape[-1], native.load()
    if library is None or x.dtype not in native.TYPES or x.numel() == 0:
        weight = decode_reference(qweight, steps, zero, group_scale, selector, levels, bits, signed, k, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()
    decoder = native.weight_decoder(library, qweight, steps, zero, group_scale, selector, levels, bits, signed, k)
    return linear_on_cpu(decoder, x, bias)


@linear_decoded.register_kernel("cuda")
def linear_decoded_on_cuda(x, qweight, bias, steps, zero, group_scale, selector, levels, bits, signed) -> Tensor:
    """The op on a CUDA device: a Triton kernel that decodes as it multiplies, else torch; ``gpu.describe`` says whether and why."""
    stored = qweight, steps, zero, group_scale, selector, levels, bits, signed
    y = gpu.linear_decoded(x.reshape(-1, x.shape[-1]), bias, *stored) if gpu.serves(x.device) else None
    if y is not None:
        return y.view(*x.shape[:-1], qweight.shape[0])
    weight = decode_reference(*stored, x.shape[-1], x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


@linear_decoded.register_fake
def _(x, qweight, bias, steps, zero, group_scale, selector, levels, bits, signed):
    return x.new_empty((*x.shape[:-1], qweight.shape[0]))


def _save(ctx, inputs, output) -> None:
    x, qweight, bias, *tensors, ctx.bits, ctx.signed = inputs
    ctx.save_for_backward(qweight, *tensors)
    ctx.k, ctx.dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ decode_weight(*ctx.saved_tensors, ctx.bits, ctx.signed, ctx.k, ctx.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = sum_to_bias(grad, -1).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *[None] * 7


linear_decoded.register_autograd(_backward, setup_context=_save)
