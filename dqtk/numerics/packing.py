"""Codes as bytes, 1 to 16 bits each really packed, and the stored form of a weight: the one place that knows its tensors.

Codes are packed along the last dimension, whose length is padded with zeros to a multiple of 8 codes. A *plane* layout keeps
unpacking to shifts and masks on whole vectors, for any width: a width is a sum of 8, 4, 2 and 1, and each part is a plane. Eight
codes c0..c7 of b bits become b bytes, from the low bits up:

    plane of 8 bits:  byte i = c_i                                                     i = 0..7, of codes wider than 8 bits
    plane of 4 bits:  byte i = c_i | c_{i+4} << 4                                      i = 0..3
             [c4c4c4c4 c0c0c0c0] [c5.. c1..] [c6.. c2..] [c7.. c3..]
    plane of 2 bits:  byte i = c_i | c_{i+2} << 2 | c_{i+4} << 4 | c_{i+6} << 6        i = 0..1
    plane of 1 bit:   bit j = c_j
    8 bits:           the code itself, and no padding

So 3 bits are a plane of 2 and one of 1, 6 bits one of 4 and one of 2, 12 bits one of 8 and one of 4, 16 bits two of 8. Signed
codes are stored with an offset of 2^(b-1); 8-bit signed codes are stored as int8 without one. These bytes are the checkpoint
format: golden tests freeze them.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dqtk.spec import (
    GROUPS,
    Codebook,
    E4M3Group,
    E8M0Group,
    Int,
    PerChannel,
    PerGroup,
    PerTensor,
    TensorSpec,
    Trellis,
    TwoLevel,
    VectorCodebook,
)

from .affine import code_range, levels, torch_type
from .floats import e8m0_decode
from .trellis import TILE, decode, from_tiles
from .trellis import packed_width as ring_width
from .trellis import unpack as unpack_states
from .vectors import words_of


def packed_width(bits: int, length: int) -> int:
    """Bytes per row of ``length`` codes."""
    return length if bits == 8 else -(-length // 8) * bits


def _planes(bits: int) -> list[int]:
    return [8] * (bits // 8) + [plane for plane in (4, 2, 1) if bits & plane]


def code_dtype(bits: int) -> torch.dtype:
    """dtype of codes of so many bits: uint8, else int32."""
    return torch.uint8 if bits <= 8 else torch.int32


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes.

    Args:
        codes: integers in [0, 2^bits), any shape [..., L].
        bits: 1 to 16.
    Returns:
        uint8 [..., packed_width(bits, L)].
    Raises:
        ValueError: for another width or a code out of range.
    """
    _check_bits("pack", bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(
            f"pack: codes must be in 0..{2**bits - 1}, got {int(codes.min())}..{int(codes.max())}. Add the offset first."
        )
    codes = codes.to(code_dtype(bits))
    if bits == 8:
        return codes.contiguous()
    c = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    parts, low = [], 0
    for plane in _planes(bits):
        part = (c >> low) & (2**plane - 1)
        byte = part[..., :plane]
        for i in range(1, 8 // plane):
            byte = byte | part[..., i * plane : (i + 1) * plane] << (i * plane)
        parts.append(byte.to(torch.uint8))
        low += plane
    return torch.cat(parts, dim=-1).flatten(-2).contiguous()


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of ``pack``: codes [..., length], uint8 up to 8 bits, else int32. Compiles without graph breaks."""
    _check_bits("unpack", bits)
    if bits == 8:
        return packed
    p = packed.unflatten(-1, (-1, bits)).to(code_dtype(bits))
    codes, low = None, 0
    for plane in _planes(bits):
        byte, mask = p[..., low : low + plane], 2**plane - 1
        part = torch.cat([(byte >> (i * plane)) & mask for i in range(8 // plane)], dim=-1)
        codes = part if codes is None else codes | part << low
        low += plane
    assert codes is not None
    return codes.flatten(-2)[..., :length]


def _check_bits(where: str, bits: int) -> None:
    if bits not in range(1, 17):
        raise ValueError(f"{where}: bits must be from 1 to 16, got {bits}. Split wider codes.")


# --- the stored form of a weight -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A weight [N, K] as stored. These tensors become buffers of a runtime layer and entries of the checkpoint.

    qweight: int8 [N, K] (symmetric 8 bit), float8_e4m3fn or float8_e5m2 [N, K], else uint8 [N, packed_width(bits, K)].
    scale: bfloat16 [N, K / size] per group; float32 [N, 1] per channel and two-level, [1, 1] per tensor and above E4M3 groups; none
    above E8M0. group_scale: [N, K / size]: uint8 (two-level integers, E8M0 exponents) or float8_e4m3fn.
    zero: uint8, shape of ``scale``; asymmetric integers only.
    selector: uint8 [N, packed_width(bits, G)], table of each group, ``bits`` as many as the number of tables needs; several
    tables only.
    codebook: float16 [books, words, length] of vectors, which no layer stores whose books are shared (``nn/books.py``). Their codes
    lie in ``qweight`` uint8 [N, packed_width(code_bits, K / length * books)], those of one vector side by side; ``scale`` is
    float32 [N, 1] or [1, 1].
    Of a trellis, ``qweight`` is uint8 [R, ring_width], a ring for each tile (``trellis.to_tiles``), and ``scale`` float32 [N, 1].
    """

    qweight: Tensor
    scale: Tensor | None = None
    group_scale: Tensor | None = None
    zero: Tensor | None = None
    selector: Tensor | None = None
    codebook: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(spec: TensorSpec, n: int, k: int) -> Layout:
    """Name -> (shape, dtype) of the tensors of a weight [n, k]: what a checkpoint must have.

    Raises ``ValueError`` if the group size does not divide K, or the length of vectors.
    """
    form, granularity = spec.format, spec.granularity
    num_groups = count_groups(spec, k)
    if isinstance(form, Trellis):
        rows, columns = TILE
        rings = -(-n // rows) * -(-k // columns)
        return {
            "qweight": ((rings, ring_width(form, rows * columns)), torch.uint8),
            "scale": ((n, 1), torch.float32),
        }
    if isinstance(form, VectorCodebook):
        stored: Layout = {
            "qweight": ((n, packed_width(form.code_bits, count_vectors(form, k) * form.books)), torch.uint8),
            "scale": ((1, 1) if isinstance(granularity, PerTensor) else (n, 1), torch.float32),
        }
        return stored if form.group is not None else stored | {"codebook": (book_shape(form), torch.float16)}
    one = (1, 1) if isinstance(granularity, PerTensor | E4M3Group) else (n, num_groups if isinstance(granularity, PerGroup) else 1)
    found: Layout = {"qweight": ((n, stored_width(spec, k)), stored_dtype(spec))}
    if not isinstance(granularity, E8M0Group):
        found["scale"] = (one, torch.bfloat16 if isinstance(granularity, PerGroup) else torch.float32)
    if isinstance(granularity, TwoLevel | E8M0Group):
        found["group_scale"] = ((n, num_groups), torch.uint8)
    if isinstance(granularity, E4M3Group):
        found["group_scale"] = ((n, num_groups), torch.float8_e4m3fn)
    if isinstance(form, Int) and not form.symmetric:
        found["zero"] = (one, torch.uint8)
    if isinstance(form, Codebook) and len(form.tables) > 1:
        found["selector"] = ((n, packed_width(selector_bits(form), num_groups)), torch.uint8)
    return found


def book_shape(form: VectorCodebook) -> tuple[int, int, int]:
    """Of the tensor that holds the books, of one layer or of a group: float16."""
    return form.books, form.words, form.length


def selector_bits(form: Codebook) -> int:
    """Bits that name one of the tables."""
    return (len(form.tables) - 1).bit_length()


def empty(parts: Layout, device: torch.device | str) -> dict[str, Tensor]:
    """Uninitialized tensors of a layout."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in parts.items()}


def bytes_of(parts: Layout) -> int:
    """Bytes of the tensors of a layout."""
    found = empty(parts, "meta").values()
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def stored_bytes(spec: TensorSpec, n: int, k: int) -> int:
    """Bytes of codes, scales and zero points of a weight [n, k]: what the file holds for it."""
    return bytes_of(layout(spec, n, k))


def count_groups(spec: TensorSpec, k: int) -> int:
    """Groups in a row of K numbers, of a weight or of an input; 1 where the row shares a scale.

    Raises ``ValueError`` if the group size does not divide K.
    """
    if not isinstance(spec.granularity, GROUPS):
        return 1
    size = spec.granularity.size
    if k % size:
        raise ValueError(f"count_groups: group size must divide the {k} inputs, got {size}. Choose another size.")
    return k // size


def count_vectors(form: VectorCodebook, k: int) -> int:
    """Vectors in a row of K weights. Raises ``ValueError`` if their length does not divide K."""
    if k % form.length:
        raise ValueError(f"count_vectors: length must divide the {k} inputs, got {form.length}. Choose another length.")
    return k // form.length


def stored_dtype(spec: TensorSpec) -> torch.dtype:
    """dtype of ``qweight``."""
    form = spec.format
    if isinstance(form, Int) and form.symmetric and form.bits == 8:
        return torch.int8
    return torch_type(form) or torch.uint8


def stored_width(spec: TensorSpec, k: int) -> int:
    """Columns of ``qweight`` for K inputs."""
    return packed_width(spec.bits, k)


def pack_codes(codes: Tensor, spec: TensorSpec) -> Tensor:
    """``qweight`` of codes [N, K] as ``affine.encode`` gives them."""
    if stored_dtype(spec) == codes.dtype and spec.bits == 8:
        return codes.contiguous()
    offset = 2 ** (spec.bits - 1) if isinstance(spec.format, Int) and spec.format.symmetric else 0
    return pack(codes.to(torch.int16) + offset, spec.bits)


def unpack_codes(qweight: Tensor, spec: TensorSpec, k: int) -> Tensor:
    """Codes [N, K] as ``affine.encode`` gives them."""
    if qweight.dtype != torch.uint8:
        return qweight
    if isinstance(spec.format, Int) and spec.format.symmetric:
        return _signed(qweight, spec.bits, k)
    return unpack(qweight, spec.bits, k)


def _signed(qweight: Tensor, width: int, k: int) -> Tensor:
    return unpack(qweight, width, k).to(torch.int8) - 2 ** (width - 1)


def integer_weight(qweight: Tensor, group_scale: Tensor | None, bits: int, k: int) -> Tensor:
    """The int8 matrix [N, K] behind a stored symmetric weight, group scales multiplied in: weight = scale * integer_weight.

    ``bits`` is the width of the stored codes.
    """
    codes = qweight if qweight.dtype == torch.int8 else _signed(qweight, bits, k)
    if group_scale is None:
        return codes
    return (codes.unflatten(1, (group_scale.shape[1], -1)) * group_scale.to(torch.int8)[..., None]).flatten(1)


def group_steps(packed: Packed, spec: TensorSpec) -> Tensor:
    """float32 [N, G], [N, 1] or [1, 1]: what the levels of a group are multiplied with."""
    if isinstance(spec.granularity, E8M0Group):
        assert packed.group_scale is not None
        return e8m0_decode(packed.group_scale)
    assert packed.scale is not None
    scale = packed.scale.float()
    return scale if packed.group_scale is None else packed.group_scale.float() * scale


def weight_levels(packed: Packed, spec: TensorSpec, k: int) -> Tensor:
    """float32 levels of the codes, [N, K]."""
    codes, form = unpack_codes(packed.qweight, spec, k), spec.format
    if packed.selector is None:
        return levels(codes, form)
    assert isinstance(form, Codebook)
    groups = count_groups(spec, k)
    which = unpack(packed.selector, selector_bits(form), groups).long()[..., None]
    tables = torch.tensor(form.tables, dtype=torch.float32, device=codes.device)
    return tables[which, codes.long().unflatten(1, (groups, -1))].flatten(1)


def dequantize(packed: Packed, spec: TensorSpec, k: int) -> Tensor:
    """The stored weight as float32 [N, K]."""
    if isinstance(spec.format, Trellis):
        return decode_trellis(packed, spec.format, k)
    if isinstance(spec.format, VectorCodebook):
        return decode_vectors(packed, spec.format, k)
    if isinstance(spec.granularity, TwoLevel):  # exactly as the integer kernels have it
        assert packed.scale is not None
        return integer_weight(packed.qweight, packed.group_scale, spec.bits, k).float() * packed.scale
    values, steps = weight_levels(packed, spec, k), group_steps(packed, spec)
    if isinstance(spec.granularity, PerChannel | PerTensor):
        return (values if packed.zero is None else values - packed.zero) * steps
    values = values.unflatten(1, (steps.shape[1], -1))
    values = values if packed.zero is None else values - packed.zero[..., None]
    return (values * steps[..., None]).flatten(1)


def decode_vectors(packed: Packed, form: VectorCodebook, k: int) -> Tensor:
    """The stored weight as float32 [N, K]."""
    assert packed.codebook is not None
    assert packed.scale is not None
    codes = unpack(packed.qweight, form.code_bits, count_vectors(form, k) * form.books)
    return words_of(codes.unflatten(1, (-1, form.books)), packed.codebook) * packed.scale


def decode_trellis(packed: Packed, form: Trellis, k: int) -> Tensor:
    """The stored weight as float32 [N, K]."""
    assert packed.scale is not None
    states = unpack_states(packed.qweight, form, TILE[0] * TILE[1])
    return from_tiles(decode(states, form), packed.scale.shape[0], k, TILE) * packed.scale


def max_group_scale(spec: TensorSpec) -> int:
    """Largest two-level group scale that keeps |group_scale * code| within 127."""
    assert isinstance(spec.format, Int)
    return 127 // code_range(spec.format)[1]
