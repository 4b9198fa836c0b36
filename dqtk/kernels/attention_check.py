"""Whether a kernel of attention answers as torch does, looked at before its first answer goes anywhere.

Attention kernels are known for being wrong on one device and not on another (noise on one architecture after an update, black
pictures, more tokens than an index can count), and a wrong one draws a picture all the same. So the first call of every kind on
every device is made a second time, small: first and last head of the first sample, of its own numbers; the first block of queries
with all blocks of keys, and the last with those that are live for it. It costs a few rows of one call, once per process, and fails
closed.
A kind is a device, a dtype, channels, blocks, widths, what is given (order, live blocks, mask) and the power of two of the tokens.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LIMITS = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest norm of the difference, as a share of the answer's. Right kernels stay below a tenth of it, wrong ones are far beyond."""
ROUNDED = 0.1
"""The same for rounded ones: where a number falls between two codes, kernels and reference may differ by one of them."""

_passed: set[tuple[Any, ...]] = set()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """run: with the arguments of dqtk::block_attention. which: tells it from others. name: in words. remedy: how to do without.
    limit: in place of ``LIMITS``."""

    run: Callable[..., Tensor]
    which: Hashable
    name: Callable[[], str]
    remedy: str
    limit: float | None = None


def check_kernel(kernel: Kernel, plain: Callable[..., Tensor], *arguments: Any) -> None:
    """Compare a kernel with what it must answer, unless it has passed for this kind of call.

    Args:
        plain: the same through torch.
        arguments: of the call that is about to be answered.
    Raises:
        ValueError: it answers something else.
    """
    q, k, v, order, live, mask, block_q, block_k, scale, *settings = arguments
    kind = _kind(kernel.which, q, v, order, live, mask, block_q, block_k, *settings)
    if kind in _passed or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    heads = slice(None, None, max(1, q.shape[1] - 1))
    q, k, v = (t[:1, heads] for t in (q, k, v))
    order = None if order is None else order[heads]
    mask = _part(mask, heads)
    some = _first_and_last(live, heads, q, block_q, block_k)
    given = q, k, v, order, None if live is None else some, mask, block_q, block_k, scale, *settings
    limit = kernel.limit or (LIMITS[q.dtype] if settings[:2] == [16, 16] else ROUNDED)
    expected = plain(*(t.float() for t in given[:3]), order, some, mask, block_q, block_k, scale, *settings)
    rows = _compared(order, q, block_q)
    expected, found = (t.float().gather(2, rows.expand(-1, -1, -1, v.shape[3])) for t in (expected, kernel.run(*given)))
    if not bool(expected.isfinite().all()):
        return  # nothing to compare with: what comes in is not finite, and must stay visible
    error = float((found - expected).norm() / torch.maximum(expected.norm(), 1e-6 * v.float().norm()).clamp(min=1e-30))
    if not error <= limit:  # NaN too
        shape = f"{q.shape[2]} tokens, {q.shape[3]} channels, blocks of {block_q} by {block_k}"
        raise ValueError(
            f"attention: {kernel.name()} on {q.device} must answer as torch's own attention does, within {limit:g} of its norm, "
            f"got {error:.3g} ({str(q.dtype).removeprefix('torch.')}, {shape}). {kernel.remedy} Nothing was drawn with it."
        )
    _passed.add(kind)


def forget() -> None:
    """Look again at the next call of every kind."""
    _passed.clear()


def _kind(which: Hashable, q: Tensor, v: Tensor, order, live, mask, block_q: int, block_k: int, *settings: Any) -> tuple[Any, ...]:
    tokens = q.shape[2]
    shape = q.shape[3], v.shape[3], tokens.bit_length(), tokens % block_q == 0, tokens % block_k == 0
    seen = None if mask is None else (mask.dtype, mask.ndim > 1 and mask.shape[-2] > 1)
    return which, q.device, q.dtype, *shape, block_q, block_k, order is None, live is None, seen, *settings


def _part(mask: Tensor | None, heads: slice) -> Tensor | None:
    """Of the first sample and some heads."""
    if mask is None or mask.ndim < 3:
        return mask
    of_heads = mask[..., heads, :, :] if mask.shape[-3] > 1 else mask
    return of_heads[:1] if mask.ndim == 4 else of_heads


def _first_and_last(live: Tensor | None, heads: slice, q: Tensor, block_q: int, block_k: int) -> Tensor:
    """uint8 [heads, R, bytes]: live blocks of the last block of queries, all of the first, none of the others."""
    rows, columns = -(-q.shape[2] // block_q), -(-q.shape[2] // block_k)
    bits = torch.zeros((q.shape[1], rows, -(-columns // 8)), dtype=torch.uint8, device=q.device)
    bits[:, -1] = 255 if live is None else live[heads, -1]
    bits[:, 0] = 255
    return bits


def _compared(order: Tensor | None, q: Tensor, block_q: int) -> Tensor:
    """int64 [1, heads, rows, 1]: tokens of the first and the last block of queries."""
    num = q.shape[2]
    last = (num - 1) // block_q * block_q
    places = torch.cat([torch.arange(min(block_q, num), device=q.device), torch.arange(last, num, device=q.device)])
    rows = places.expand(q.shape[1], -1) if order is None else order.long()[:, places]
    return rows[None, :, :, None]
