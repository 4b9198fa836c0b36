"""Live blocks through torch's FlexAttention, for devices that dqtk has no kernels of its own for (ROCm, XPU).

    DQTK_FLEX    "on": 16-bit attention over live blocks goes through it, on every device; unset: never

It is compiled at the first call of every shape, which takes seconds and a compiler (Triton, or C++ on the CPU). It is asked for and
never chosen by itself. Integers, and a call without live blocks, are not its.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from dqtk.numerics.block_masks import unpack

NAME = "torch's FlexAttention"
GRAPHS = 64  # kinds of calls of a process; another is an error of torch's, since its answer uncompiled would be slow


def wanted() -> bool:
    """Whether it is asked for. Raises ``ValueError`` for a setting that is none."""
    setting = os.environ.get("DQTK_FLEX", "")
    if setting not in ("", "on"):
        raise ValueError(f"DQTK_FLEX must be on or unset, got {setting!r}. Unset it for dqtk's own kernels.")
    return setting == "on"


def takes(sparse: bool, block_q: int, block_k: int, qk_bits: int, pv_bits: int) -> bool:
    """Whether it is asked for and serves such a call of ``block_attention``.

    Blocks are powers of two; others (7 by 11, bfloat16) were seen to come out as no numbers on a CPU.
    """
    fit = all(size >= 16 and size & (size - 1) == 0 for size in (block_q, block_k))
    return wanted() and sparse and fit and (qk_bits, pv_bits) == (16, 16)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    live: Tensor,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> Tensor:
    """The op of that name over live blocks, unrounded."""
    num = q.shape[2]
    rows = None if order is None else order.long()
    if rows is not None:
        q, k, v = (t.gather(2, rows[None, :, :, None].expand(len(t), -1, -1, t.shape[3])) for t in (q, k, v))
    if mask is not None:
        mask = mask.view(*(1,) * (4 - mask.ndim), *mask.shape)
    keep = unpack(live, -(-num // block_k))
    number = keep.sum(-1, dtype=torch.int32)
    first = torch.argsort(keep.to(torch.int32), dim=-1, descending=True, stable=True).to(torch.int32)
    from torch._dynamo import config  # seconds

    with config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS):
        y = _compiled()(q, k, v, keep, number, first, rows, mask, block_q, block_k, scale)
    if rows is not None:
        y = torch.empty_like(y).scatter_(2, rows[None, :, :, None].expand_as(y), y)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def _attend(q, k, v, keep, number, first, rows, mask, block_q, block_k, scale) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def seen(b, h, i, j):  # where torch does not skip blocks, it asks for every pair
        return keep[h, i // block_q, j // block_k]

    def scored(score, b, h, i, j):
        if mask is None:
            return score
        row, column = (i, j) if rows is None else (rows[h, i], rows[h, j])
        places = zip((b, h, row, column), mask.shape, strict=True)
        said = mask[tuple(torch.zeros_like(place) if size == 1 else place for place, size in places)]
        return torch.where(said, score, -torch.inf) if mask.dtype == torch.bool else score + said

    blocks = BlockMask.from_kv_blocks(
        torch.zeros_like(number)[None],  # of blocks of which a part is seen: one tensor in both places does not compile
        torch.zeros_like(first)[None],
        number[None],
        first[None],
        BLOCK_SIZE=(block_q, block_k),
        mask_mod=seen,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,  # gradients' part; it does not compile where a compiled model calls this
    )
    found = flex_attention(q, k, v, score_mod=scored, block_mask=blocks, scale=scale)
    assert isinstance(found, Tensor)
    return found
