"""Words of learned books looked up in Triton: a program reads the codes of some vectors and writes the sums of their words.

Numbers are those of ``vectors.words_of`` times the scale, rounded to the dtype, bit for bit. One launch decodes a weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import EXACT, dense, rounded_to

BLOCK = 1024  # numbers of a program


@triton.jit
def _code(row, at, inside, BITS: tl.constexpr):
    """Code ``at`` of a packed row, in the planes of numerics/packing.py: of 8, 4, 2 and 1 bits, eight codes in ``BITS`` bytes."""
    if BITS == 8:
        code = tl.load(row + at, mask=inside, other=0).to(tl.int32)
    else:
        byte, i = row + at // 8 * BITS, at % 8
        code = at * 0
        if BITS > 8:
            code = tl.load(byte + i, mask=inside, other=0).to(tl.int32)
        if BITS == 16:
            code |= tl.load(byte + 8 + i, mask=inside, other=0).to(tl.int32) << 8
        if BITS & 4:
            plane = (tl.load(byte + (BITS & 8) + i % 4, mask=inside, other=0).to(tl.int32) >> (i // 4 * 4)) & 15
            code |= plane << (BITS & 8)
        if BITS & 2:
            plane = (tl.load(byte + (BITS & 12) + i % 2, mask=inside, other=0).to(tl.int32) >> (i // 2 * 2)) & 3
            code |= plane << (BITS & 12)
        if BITS & 1:
            plane = (tl.load(byte + (BITS & 14), mask=inside, other=0).to(tl.int32) >> i) & 1
            code |= plane << (BITS & 14)
    return code


@triton.jit
def _decode(
    packed, books, scale, y, count, across, width,
    BITS: tl.constexpr, WORDS: tl.constexpr, LENGTH: tl.constexpr, BOOKS: tl.constexpr, SCALE_STEP: tl.constexpr,
    VECTORS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """y [N, K] of ``count`` vectors, ``across`` of them in a row, whose codes take ``width`` bytes. PADDED: a power of two."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    inside, row, j = vector < count, vector // across, tl.arange(0, PADDED)
    first = (vector % across).to(tl.int32) * BOOKS
    codes, both = packed + row * width, inside[:, None] & (j < LENGTH)[None, :]
    word = _code(codes, first, inside, BITS)[:, None] * LENGTH + j[None, :]
    total = tl.load(books + word, mask=both, other=0.0).to(tl.float32)
    for book in tl.static_range(1, BOOKS):
        word = (_code(codes, first + book, inside, BITS) + book * WORDS)[:, None] * LENGTH + j[None, :]
        total += tl.load(books + word, mask=both, other=0.0).to(tl.float32)
    total *= tl.load(scale + row * SCALE_STEP, mask=inside, other=0.0)[:, None]
    tl.store(y + vector[:, None] * LENGTH + j[None, :], rounded_to(total, y.dtype.element_ty), mask=both)


def decode_vectors(qweight: Tensor, codebook: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """[N, k] in ``dtype``: float32, bfloat16 or float16. Arguments as the dqtk::decode_vectors op has them."""
    (books, words, length), n = codebook.shape, qweight.shape[0]
    y = torch.empty((n, k), dtype=dtype, device=qweight.device)
    if y.numel() == 0:
        return y
    packed, codebook, scale = dense(qweight, codebook, scale.float())
    padded = triton.next_power_of_2(length)
    across, vectors = k // length, BLOCK // padded
    with torch.cuda.device_of(packed):
        _decode[(triton.cdiv(n * across, vectors),)](
            packed,
            codebook,
            scale,
            y,
            n * across,
            across,
            packed.shape[1],
            BITS=(words - 1).bit_length(),
            WORDS=words,
            LENGTH=length,
            BOOKS=books,
            SCALE_STEP=int(scale.numel() > 1),
            VECTORS=vectors,
            PADDED=padded,
            **EXACT,
        )
    return y
