"""Codes as bytes: 2-, 3-, 4- and 8-bit integers really packed, and back.

Codes are packed along the last dimension, whose length is padded with zeros to a multiple of 8 codes. A *plane* layout keeps
unpacking to shifts and masks on whole vectors, for any width. Eight codes c0..c7 of b bits become b bytes:

    4 bits:  byte i = c_i | c_{i+4} << 4                       i = 0..3
             [c4c4c4c4 c0c0c0c0] [c5.. c1..] [c6.. c2..] [c7.. c3..]
    2 bits:  byte i = c_i | c_{i+2} << 2 | c_{i+4} << 4 | c_{i+6} << 6     i = 0..1
    3 bits:  bytes 0, 1 hold the low two bits as above; byte 2 holds the high bits, bit j = high bit of c_j
    8 bits:  the code itself

Signed codes are stored with an offset of 2^(b-1), b the stored width; 8-bit signed codes are stored as int8 without one. Codes of
5, 6 and 7 bits are stored in 8, with the offset. These bytes are the checkpoint format: golden tests freeze them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqtk.spec import Float, Int, PerChannel, PerGroup, PerTensor, TensorSpec, TwoLevel

from .affine import code_range

WIDTHS = (2, 3, 4, 8)


def packed_width(bits: int, length: int) -> int:
    """Bytes per row of ``length`` codes."""
    return length if bits == 8 else -(-length // 8) * bits


def storage_bits(bits: int) -> int:
    """The packed width that holds ``bits``-bit codes: 2, 3, 4 or 8."""
    return next(width for width in WIDTHS if width >= bits)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: integers in [0, 2^bits), any shape [..., L].
        bits: 2, 3, 4 or 8.
    Returns:
        uint8 [..., packed_width(bits, L)].
    Raises:
        ValueError: for another width or a code out of range.
    """
    _check_bits("pack", bits)
    if codes.numel() and (codes.min() < 0 or codes.max() >= 2**bits):
        raise ValueError(
            f"pack: codes must be in 0..{2**bits - 1}, got {int(codes.min())}..{int(codes.max())}. Add the offset first."
        )
    codes = codes.to(torch.uint8)
    if bits == 8:
        return codes.contiguous()
    length = codes.shape[-1]
    c = torch.nn.functional.pad(codes, (0, -length % 8)).unflatten(-1, (-1, 8))
    if bits == 4:
        out = c[..., :4] | c[..., 4:] << 4
    else:
        low = c & 3
        out = low[..., 0:2] | low[..., 2:4] << 2 | low[..., 4:6] << 4 | low[..., 6:8] << 6
        if bits == 3:
            weights = 2 ** torch.arange(8, device=c.device)
            high = ((c >> 2).long() * weights).sum(-1, keepdim=True).to(torch.uint8)
            out = torch.cat([out, high], dim=-1)
    return out.flatten(-2).contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of ``pack``: uint8 codes [..., length]. Compiles without graph breaks."""
    _check_bits("unpack", bits)
    if bits == 8:
        return packed
    p = packed.unflatten(-1, (-1, bits))
    if bits == 4:
        codes = torch.cat([p & 15, p >> 4], dim=-1)
    else:
        low = p[..., :2]
        codes = torch.cat([low & 3, low >> 2 & 3, low >> 4 & 3, low >> 6], dim=-1)
        if bits == 3:
            shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
            codes = codes | ((p[..., 2:] >> shifts) & 1) << 2
    return codes.flatten(-2)[..., :length]


def _check_bits(where: str, bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"{where}: bits must be one of {WIDTHS}, got {bits}. Store other widths in the next larger one.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A weight [N, K] as stored. These tensors become buffers of a runtime layer and entries of the checkpoint.

    qweight: int8 [N, K] (symmetric 8 bit), float8_e4m3fn [N, K] (FP8), else uint8 [N, packed_width(bits, K)].
    scale: float32 [N, G]; G = 1 per channel and two-level, K / size per group; [1, 1] per tensor.
    group_scale: uint8 [N, K / size], two-level only.
    zero: uint8, shape of ``scale``; asymmetric only.
    """

    qweight: Tensor
    scale: Tensor
    group_scale: Tensor | None = None
    zero: Tensor | None = None


def empty_packed(spec: TensorSpec, n: int, k: int, device: torch.device | str) -> Packed:
    """Uninitialized storage of a weight [n, k] under ``spec``: the shapes and dtypes a checkpoint must have."""

    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    num_groups = count_groups(spec, k)
    scale_shape = (
        (1, 1) if isinstance(spec.granularity, PerTensor) else (n, num_groups if isinstance(spec.granularity, PerGroup) else 1)
    )
    two_level = isinstance(spec.granularity, TwoLevel)
    asymmetric = isinstance(spec.format, Int) and not spec.format.symmetric
    return Packed(
        qweight=empty((n, stored_width(spec, k)), stored_dtype(spec)),
        scale=empty(scale_shape, torch.float32),
        group_scale=empty((n, num_groups), torch.uint8) if two_level else None,
        zero=empty(scale_shape, torch.uint8) if asymmetric else None,
    )


def count_groups(spec: TensorSpec, k: int) -> int:
    """Groups in a row of K inputs; 1 where the row shares a scale. Raises ``ValueError`` if the group size does not divide K."""
    if not isinstance(spec.granularity, PerGroup | TwoLevel):
        return 1
    size = spec.granularity.size
    if k % size:
        raise ValueError(f"count_groups: group size must divide the {k} inputs of the weight, got {size}. Choose another size.")
    return k // size


def stored_dtype(spec: TensorSpec) -> torch.dtype:
    """dtype of ``qweight``."""
    if isinstance(spec.format, Float):
        return torch.float8_e4m3fn
    return torch.int8 if spec.bits == 8 and spec.format.symmetric else torch.uint8


def stored_width(spec: TensorSpec, k: int) -> int:
    """Columns of ``qweight`` for K inputs."""
    return k if isinstance(spec.format, Float) else packed_width(storage_bits(spec.bits), k)


def stored_bytes(spec: TensorSpec, n: int, k: int) -> int:
    """Bytes of codes, scales and zero points of a weight [n, k]: what the file holds for it."""
    packed = empty_packed(spec, n, k, "meta")
    tensors = (packed.qweight, packed.scale, packed.group_scale, packed.zero)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def pack_codes(codes: Tensor, spec: TensorSpec) -> Tensor:
    """``qweight`` of codes [N, K] as ``affine.encode`` gives them."""
    if stored_dtype(spec) == codes.dtype and (isinstance(spec.format, Float) or spec.bits == 8):
        return codes.contiguous()
    assert isinstance(spec.format, Int)
    width = storage_bits(spec.bits)
    offset = 2 ** (width - 1) if spec.format.symmetric else 0
    return pack(codes.to(torch.int16) + offset, width)


def unpack_codes(qweight: Tensor, spec: TensorSpec, k: int) -> Tensor:
    """Codes [N, K]: int8 (symmetric), uint8 (asymmetric) or float8_e4m3fn."""
    if qweight.dtype != torch.uint8:
        return qweight
    assert isinstance(spec.format, Int)
    width = storage_bits(spec.bits)
    return _signed(qweight, width, k) if spec.format.symmetric else unpack(qweight, width, k)


def _signed(qweight: Tensor, width: int, k: int) -> Tensor:
    # At width 8 the conversion to int8 wraps around and the subtraction wraps back.
    return unpack(qweight, width, k).to(torch.int8) - 2 ** (width - 1)


def integer_weight(qweight: Tensor, group_scale: Tensor | None, bits: int, k: int) -> Tensor:
    """The int8 matrix [N, K] behind a stored symmetric weight, group scales multiplied in: weight = scale * integer_weight.

    ``bits`` is the stored width (2, 3, 4 or 8).
    """
    codes = qweight if qweight.dtype == torch.int8 else _signed(qweight, bits, k)
    if group_scale is None:
        return codes
    return (codes.unflatten(1, (group_scale.shape[1], -1)) * group_scale.to(torch.int8)[..., None]).flatten(1)


def dequantize(packed: Packed, spec: TensorSpec, k: int) -> Tensor:
    """The stored weight as float32 [N, K]."""
    if packed.group_scale is not None:
        return integer_weight(packed.qweight, packed.group_scale, storage_bits(spec.bits), k).float() * packed.scale
    codes = unpack_codes(packed.qweight, spec, k).float()
    if isinstance(spec.granularity, PerChannel | PerTensor):
        return (codes if packed.zero is None else codes - packed.zero) * packed.scale
    codes = codes.unflatten(1, (packed.scale.shape[1], -1))
    codes = codes if packed.zero is None else codes - packed.zero[..., None]
    return (codes * packed.scale[..., None]).flatten(1)


def max_group_scale(spec: TensorSpec) -> int:
    """Largest two-level group scale that keeps |group_scale * code| within 127."""
    assert isinstance(spec.format, Int)
    return 127 // code_range(spec.format)[1]
