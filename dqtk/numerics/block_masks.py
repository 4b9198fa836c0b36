"""Masks of blocks: which are always there, which are chosen, how they are stored and carried to another resolution.

A mask is bool [..., R, C]: blocks of queries by blocks of keys, in the order that the tokens are read in.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import ORDERS, Layout


def counts(layout: Layout, block: Sequence[int]) -> tuple[int, int]:
    """R and C: blocks of queries and of keys."""
    return math.ceil(layout.tokens / block[0]), math.ceil(layout.tokens / block[1])


def guards(layout: Layout, block: Sequence[int]) -> Tensor:
    """bool [R, C]: blocks that are computed whatever they hold: the diagonal, text, and a last block that is not whole."""
    rows, columns = counts(layout, block)
    start, end = layout.before, layout.tokens - layout.after
    keep = torch.zeros(rows, columns, dtype=torch.bool)
    for r in range(rows):
        first, last = r * block[0], min((r + 1) * block[0], layout.tokens)
        keep[r, first // block[1] : math.ceil(last / block[1])] = True
    for axis, size in enumerate(block):
        text = [i for i in range(keep.shape[axis]) if i * size < start or min((i + 1) * size, layout.tokens) > end]
        if layout.tokens % size:
            text.append(keep.shape[axis] - 1)
        keep.index_fill_(axis, torch.tensor(text, dtype=torch.long), True)
    return keep


def largest(mass: Tensor, guard: Tensor, density: float) -> Tensor:
    """bool [..., R, C]: the guards, the largest block of every row, and the largest others up to a share of all blocks.

    Args:
        mass: float [..., R, C]; one budget for all of it.
        guard: bool [R, C].
        density: share of the blocks; guards and largest ones of rows stay, however many they are.
    """
    keep = guard.expand_as(mass).clone()
    keep.scatter_(-1, mass.argmax(-1, keepdim=True), True)
    left = round(density * keep.numel()) - int(keep.sum())
    if left > 0:
        rest = mass.masked_fill(keep, -torch.inf).flatten()
        keep.view(-1)[rest.topk(min(left, rest.numel())).indices] = True
    return keep


def largest_of_all(parts: Sequence[Tensor], guard: Tensor, density: float) -> list[Tensor]:
    """``largest`` of all parts under one budget, without joining them: numbers are counted by their bits, which are ordered as they
    are. Of equal ones the first stay.

    Args:
        parts: float16 [..., R, C], not negative. guard: bool [R, C]. density: share of the blocks of all parts.
    Returns:
        bool [..., R, C] each.
    """
    flat = [part.reshape(-1, *guard.shape) for part in parts]
    keep = [guard.expand_as(heads).clone().scatter_(-1, heads.argmax(-1, keepdim=True), True) for heads in flat]
    each = [
        (mass.view(torch.int16), kept)
        for heads, mask in zip(flat, keep, strict=True)
        for mass, kept in zip(heads, mask, strict=True)
    ]
    left = round(density * sum(part.numel() for part in parts)) - sum(int(mask.sum()) for mask in keep)
    number = torch.zeros(2**15, dtype=torch.int64, device=guard.device)
    for bits, kept in each:
        number += torch.bincount(bits[~kept], minlength=2**15)
    above = number.flip(0).cumsum(0).flip(0)  # how many are at least this
    if left > 0:
        last = int((above >= left).sum()) - 1  # the bits of the smallest that stay; -1: all stay
        equal = left - int(above[last + 1]) if last + 1 < 2**15 else left
        for bits, kept in each:
            more = ~kept & (bits > last)
            ties = (bits == last) & ~kept
            ties &= ties.flatten().cumsum(0).view_as(ties) <= equal
            equal -= int(ties.sum())
            kept |= more | ties
    return [mask.view(part.shape) for mask, part in zip(keep, parts, strict=True)]


def near(layout: Layout, order: int, block: Sequence[int], density: float) -> Tensor:
    """bool [R, C]: guards, then blocks whose centres are nearest in the grid, each axis in units of its length."""
    centres = [_centres(layout, order, size) for size in block]
    scale = torch.tensor(layout.grid, dtype=torch.float32)
    distance = ((centres[0][:, None] - centres[1][None]) / scale).abs().amax(-1)
    return largest(-distance, guards(layout, block), density)


def radial(layout: Layout, order: int, block: Sequence[int], density: float) -> Tensor:
    """bool [R, C]: guards, then blocks with the smallest distance in a frame times the power of two of the distance in frames."""
    centres = [_centres(layout, order, size) for size in block]
    apart = (centres[0][:, None] - centres[1][None]).abs()
    within = (apart[..., 1] * layout.columns + apart[..., 2]) / (layout.rows * layout.columns)
    cost = (within + 1 / (layout.rows * layout.columns)) * 2 ** apart[..., 0].clamp(min=1).log2().ceil()
    return largest(-cost, guards(layout, block), density)


def pooled(
    q: Tensor,
    k: Tensor,
    index: Tensor | None,
    guard: Tensor,
    block: Sequence[int],
    scale: float,
    density: float,
    mask: Tensor | None = None,
) -> Tensor:
    """bool [H, R, C]: guards, the largest block of every row, and the largest others up to ``row_budget``, by softmax(mean
    query times mean key).

    Args:
        q, k: [B, H, N, D]; samples share the choice. index: int [H, N] or None: the token at every place.
        guard: bool [R, C], on their device.
        density: share of the blocks; guards and largest ones of rows stay, however many they are.
        mask: bool or float, broadcastable to [B, H, N, N], in the original order; or None. Keys that no query sees have no part in
            means; a block counts as the share of its pairs that are seen, each with the weight that a float mask gives it.
    """
    seen = None if mask is None else _weights(mask, k.shape[2])
    of_keys = torch.ones(1, 1, k.shape[2], device=k.device) if seen is None else (seen > 0).any(2).float()
    of_keys = of_keys.expand(k.shape[0], k.shape[1], -1)
    centred = k.float() - _mean(k.float(), of_keys, k.shape[2])
    weights = torch.ones_like(of_keys), of_keys
    means = [
        _mean(_in_order(x.float(), index), _in_order(w[..., None], index)[..., 0], size)
        for x, w, size in zip((q, centred), weights, block, strict=True)
    ]
    expected = means[0] @ means[1].transpose(2, 3) * scale
    if seen is not None:
        shares = _shares(seen, index, block, k.shape[1])
        hidden = ~(shares > 0).any(-1, keepdim=True)  # rows that see nothing choose as if they saw all alike
        expected = (expected + shares.log()).masked_fill(hidden, 0.0)
    expected = expected.softmax(-1).mean(0)
    first = expected.masked_fill(guard, torch.inf).argsort(dim=-1, descending=True, stable=True)
    within = torch.arange(guard.shape[1], device=guard.device) < row_budget(guard, len(expected), density)[..., None]
    return torch.zeros_like(within).scatter(-1, first, within).scatter(-1, expected.argmax(-1, keepdim=True), True)


def row_budget(guard: Tensor, heads: int, density: float) -> Tensor:
    """int64 [H, R]: how many blocks each row gets where rows are not compared with each other: all the same number, or their guards
    (bool [R, C]) where those are more, so that the share of all blocks is met; a remainder is spread evenly, a block to a row.

    On the guards' device, and nothing is read back from it.
    """
    held, columns = guard.sum(1), guard.shape[1]
    levels = torch.arange(columns + 1, device=guard.device)
    spent = torch.maximum(held, levels[:, None]).sum(1) * heads
    budget = round(density * heads * guard.numel())
    level = ((spent <= budget).sum() - 1).clamp(min=0)
    left = (budget - spent.gather(0, level[None])).clamp(min=0)
    more = ((held <= level) & (level < columns)).expand(heads, -1)
    number = more.flatten().cumsum(0).view(more.shape)
    every = number[-1, -1].clamp(min=1)
    extra = more & (number * left // every > (number - 1) * left // every)
    return torch.maximum(held, level) + extra


def _weights(mask: Tensor, num: int) -> Tensor:
    """float32 [B or 1, H or 1, N or 1, N]: what every pair's exponential is multiplied by."""
    whole = mask[(None,) * (4 - mask.ndim)].expand(-1, -1, -1, num)
    return whole.float() if whole.dtype == torch.bool else whole.float().exp()


def _in_order(x: Tensor, index: Tensor | None) -> Tensor:
    """x [B, H, N, D] with the token at every place."""
    return x if index is None else x.gather(2, index.long()[None, :, :, None].expand_as(x))


def _mean(x: Tensor, weights: Tensor, size: int) -> Tensor:
    """[B, H, blocks, D]: weighted means of x [B, H, N, D] over blocks of tokens; 0 where weights [B, H, N] are."""
    pad = -x.shape[2] % size
    sums = F.pad(x * weights[..., None], (0, 0, 0, pad)).unflatten(2, (-1, size)).sum(3)
    return sums / F.pad(weights, (0, pad)).unflatten(2, (-1, size)).sum(3).clamp(min=1e-12)[..., None]


def _shares(seen: Tensor, index: Tensor | None, block: Sequence[int], heads: int) -> Tensor:
    """[B or 1, H, R or 1, C]: mean weight of every block's pairs."""
    found = seen if index is None else seen.expand(-1, heads, -1, -1)
    for axis, size in ((3, block[1]), (2, block[0])):
        if found.shape[axis] > 1:
            moved = _in_order(found.transpose(2, axis), index)
            found = _mean(moved, torch.ones_like(moved[..., 0]), size).transpose(2, axis)
    return found


def above(
    q: Tensor,
    k: Tensor,
    index: Tensor | None,
    guard: Tensor,
    block: Sequence[int],
    scale: float,
    threshold: float,
    mask: Tensor | None = None,
) -> Tensor:
    """bool [H, R, C]: guards, and blocks in which some query has a probability of at least ``threshold`` of its row's largest.

    Args:
        q, k: [B, H, N, D]; samples share the choice. index: int [H, N] or None: the token at every place.
        guard: bool [R, C]. mask: bool or float, broadcastable to [B, H, N, N], in the original order; or None.
    """
    (batch, heads, num, _), pad = q.shape, -q.shape[2] % block[1]
    found = guard.expand(heads, *guard.shape).clone()
    whole = None if mask is None else mask.expand(batch, heads, num, num)
    for h in range(heads):
        order = torch.arange(num, device=q.device) if index is None else index[h].long()
        keys = k[:, h].index_select(1, order).float().transpose(1, 2)
        for r, rows in enumerate(order.split(block[0])):
            scores = q[:, h].index_select(1, rows).float() @ keys * scale
            if whole is not None:
                part = whole[:, h].index_select(1, rows).index_select(2, order)
                scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
            largest_of = F.pad(scores, (0, pad), value=-torch.inf).unflatten(2, (-1, block[1])).amax(3)
            found[h, r] |= (largest_of >= largest_of.amax(2, keepdim=True) + math.log(threshold)).any(1).any(0)
    return found


def _centres(layout: Layout, order: int, size: int) -> Tensor:
    """float32 [blocks, 3]: mean frame, row and column of the grid's tokens of every block; 0 for blocks of text alone."""
    where = layout.positions(order).float()
    held = where[:, :1] >= 0
    pad = -where.shape[0] % size
    sums = F.pad(where * held, (0, 0, 0, pad)).unflatten(0, (-1, size)).sum(1)
    number = F.pad(held.float(), (0, 0, 0, pad)).unflatten(0, (-1, size)).sum(1)
    return sums / number.clamp(min=1)


def pack(keep: Tensor) -> Tensor:
    """uint8 [..., R, ceil(C / 8)] of bool [..., R, C]: block j is bit j % 8 of byte j // 8."""
    padded = F.pad(keep.to(torch.uint8), (0, -keep.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """Inverse of ``pack``."""
    one = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[..., None] >> one) & 1).flatten(-2)[..., :columns].bool()


def carried(keep: Tensor, source: Layout, target: Layout, order: int, block: Sequence[int]) -> Tensor:
    """bool [..., R', C']: a mask of one layout for another, both read in the same order.

    A block is computed where any block that covers the same part of the grid was; so the density can only grow. Text and ends get
    their guards.
    """
    mine = [_homes(source, target, order, size) for size in block]
    moved = keep.float() if keep.dtype == torch.bool else keep
    rows, columns = (torch.zeros(*shape) for shape in ((mine[0][0], keep.shape[-2]), (mine[1][0], keep.shape[-1])))
    rows[mine[0][1], mine[0][2]] = 1
    columns[mine[1][1], mine[1][2]] = 1
    return (rows @ moved @ columns.T > 0) | guards(target, block)


def _homes(source: Layout, target: Layout, order: int, size: int) -> tuple[int, Tensor, Tensor]:
    """Number of blocks of the target; and pairs (block of the target, block of the source that holds the same place)."""
    where = target.positions(order)
    inside = where[:, 0] >= 0
    scaled = [
        ((where[:, axis].double() + 0.5) * source.grid[axis] / target.grid[axis]).long().clamp(max=source.grid[axis] - 1)
        for axis in range(3)
    ]
    rank = torch.empty(source.grid, dtype=torch.long)
    places = torch.arange(rank.numel())
    rank.permute(ORDERS[order]).copy_(places.view([source.grid[axis] for axis in ORDERS[order]]))
    home = (rank[scaled[0], scaled[1], scaled[2]] + source.before) // size
    blocks = torch.arange(target.tokens) // size
    return math.ceil(target.tokens / size), blocks[inside], home[inside]
