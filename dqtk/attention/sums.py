"""How much attention lies in every block, for every order of the tokens, without a map of all scores.

Rows of probabilities are made some at a time, and summed over blocks by products with a matrix that says which token lies in
which block.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 16, 512  # at least and at most
PROBABILITIES_AT_ONCE = 2**26  # of all heads, 256 MiB in float32
MOST_ROWS = 4096  # of a head that are looked at; the blocks of a longer sequence are seen through some of their rows
ROWS_PER_BLOCK = 8  # at least, on average


@dataclass(frozen=True, slots=True)
class BlockSums:
    """Of every head. mass: float32 [H, R, C], attention per query, summed over keys and averaged over the queries of a block (rows
    sum to 1). most: largest probability. small: share of probabilities below a limit; the last two where they were asked for."""

    mass: Tensor
    most: Tensor | None = None
    small: Tensor | None = None


def some_rows(num: int, blocks: int, device: torch.device) -> Tensor:
    """int64, ascending: all rows, or a seeded draw of them. Even steps would see some columns of a grid and never the others."""
    most = max(MOST_ROWS, ROWS_PER_BLOCK * blocks)
    if num <= most:
        return torch.arange(num, device=device)
    return torch.randperm(num, generator=torch.Generator().manual_seed(0))[:most].sort().values.to(device)


def rows_at_once(heads: int, num: int) -> int:
    """Queries whose probabilities [H, r, N] are held together."""
    least, most = ROWS_AT_ONCE
    return min(max(PROBABILITIES_AT_ONCE // (heads * num), least), most)


def probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time of one sample: their numbers int64 [r], and float32 [H, r, N].

    Args:
        q, k: [H, N, D]. mask: bool or float, broadcastable to [H, N, N]. scale: of the scores. rows: int64, which.
    """
    keys = k.float().transpose(1, 2)
    for part in rows.split(rows_at_once(q.shape[0], q.shape[1])):
        scores = q[:, part].float() @ keys * scale
        if mask is not None:
            given = mask[..., part, :] if mask.shape[-2] > 1 else mask
            scores = scores.masked_fill(~given, -torch.inf) if given.dtype == torch.bool else scores + given.float()
        yield part, scores.softmax(-1).nan_to_num(0.0)  # a query that sees no key has no attention


def block_sums(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    indices: Sequence[Tensor],
    block: Sequence[int],
    *,
    small: float | None = None,
    largest: bool = False,
) -> list[BlockSums]:
    """Of one sample, for every order.

    Args:
        q, k, mask, scale: see ``probabilities``.
        indices: per order, int [N]: the token at every place.
        block: queries and keys of a block.
        small: count probabilities below this. largest: find the largest; both cost a gather per order.
    """
    (heads, num), device = q.shape[:2], q.device
    shape = [math.ceil(num / size) for size in block]
    orders = [index.long().to(device) for index in indices]
    places = [torch.empty_like(index).scatter_(0, index, torch.arange(num, device=device)) for index in orders]
    sums = [torch.zeros(heads, *shape, device=device) for _ in orders]
    most = [torch.zeros(heads, *shape, device=device) for _ in orders] if largest else []
    little = [torch.zeros(heads, *shape, device=device) for _ in orders] if small is not None else []
    seen = [torch.zeros(shape[0], device=device) for _ in orders]
    columns = [F.one_hot(place // block[1], shape[1]).float() for place in places]
    for part, p in probabilities(q, k, mask, scale, some_rows(num, shape[0], device)):
        for i, place in enumerate(places):
            home = place[part] // block[0]
            sums[i].index_add_(1, home, p @ columns[i])
            seen[i].index_add_(0, home, torch.ones(len(part), device=device))
            if small is not None:
                little[i].index_add_(1, home, (p < small).float() @ columns[i])
            if most:
                ordered = F.pad(p[..., orders[i]], (0, -num % block[1])).unflatten(-1, (-1, block[1])).amax(-1)
                target = home[None, :, None].expand_as(ordered)
                most[i].scatter_reduce_(1, target, ordered, reduce="amax")
    found = []
    for i in range(len(orders)):
        missed = seen[i] == 0
        if bool(missed.any()):  # of a long sequence: as the others are on average
            sums[i][:, missed] = (sums[i].sum(1) / seen[i].sum())[:, None]
        rows = seen[i].clamp(min=1)[:, None]
        widths = columns[i].sum(0)
        found.append(BlockSums(sums[i] / rows, most[i] if most else None, little[i] / rows / widths if little else None))
    return found
