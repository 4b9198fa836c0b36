"""Widths of codes by measured error: every attention of the kept calls is answered in each pair of widths, under its own orders and
blocks, and compared with the same blocks of numbers that are not rounded.

The idea is SageAttention's (arXiv 2410.02367, section 4.5: a cheaper kernel where its cosine is above 99.8 %) and SageAttention2's
(4 bits where they do, 8 elsewhere), per layer there. Here per head, and what is bounded is the relative error of the head's output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dqtk.calibrate.replay import Call
from dqtk.nn.attention import Blocks, answered
from dqtk.numerics.block_masks import pack
from dqtk.numerics.layout import Layout
from dqtk.spec import AttentionSpec, StaticBlocks

from .densities import power
from .watch import Given, group_of, made_again

TRIED = (4, 8)


def pairs_of(spec: AttentionSpec) -> list[tuple[int, int]]:
    """Bits of queries and keys, of probabilities and values: all that are tried, the cheapest first. The last rounds nothing."""
    each = [[bits for bits in TRIED if given and bits <= given.bits] + [16] for given in (spec.qk, spec.pv)]
    return sorted(((qk, pv) for qk in each[0] for pv in each[1]), key=sum)


@dataclass(slots=True)
class _Errors:
    """Summed over calls and samples. moved: float64 [pairs, H], squared norms of differences; norm: [H], of exact outputs."""

    moved: Tensor
    norm: Tensor


def with_widths(
    module: nn.Module,
    calls: Sequence[Call],
    wanted: Mapping[str, AttentionSpec],
    keep: Mapping[str, Tensor],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, AttentionSpec]:
    """Specs with the width of every head.

    Args:
        module: the unquantized denoiser.
        calls: kept calls of it.
        wanted: path -> spec with ``adapt``, whose layout, orders and edges are known.
        keep: path -> bool [G, H, R, C] of static blocks.
        progress: called after every call that was made again.
    """
    errors: dict[str, _Errors] = {}
    blocks: dict[str, Blocks] = {}

    def see(path: str, layout: Layout, call: Call, given: Given) -> None:
        spec, heads = wanted[path], given.q.shape[1]
        if path not in blocks:
            blocks[path] = _filled(spec, heads, keep.get(path), given.q.device)
        group = group_of(call, spec.mask) if isinstance(spec.mask, StaticBlocks) else 0
        order = torch.stack([layout.index(each, given.q.device) for each in spec.orders]) if any(spec.orders) else None
        live = blocks[path].live_blocks(given.q, given.k, given.mask, layout, order, given.scale)
        chosen = None if live is None else live[min(group, live.shape[0] - 1)]
        tensors = given.q, given.k, given.v, order, chosen, given.mask
        pairs = pairs_of(spec)
        exact = answered(spec, *tensors, given.scale, pairs[-1]).double()
        moved = torch.stack([power(answered(spec, *tensors, given.scale, pair).double() - exact) for pair in pairs])
        mine = errors.setdefault(path, _Errors(torch.zeros_like(moved), torch.zeros_like(moved[0])))
        mine.moved += moved
        mine.norm += power(exact)

    for call in calls if wanted else ():
        made_again(module, [call], list(wanted), see)
        progress()
    return {path: _chosen(spec, errors[path]) for path, spec in wanted.items()}


def _filled(spec: AttentionSpec, heads: int, keep: Tensor | None, device: torch.device) -> Blocks:
    """Blocks that stand in no model yet."""
    blocks = Blocks(spec, heads, device)
    if keep is not None and blocks.live is not None:
        blocks.live.copy_(pack(keep))
    return blocks


def _chosen(spec: AttentionSpec, errors: _Errors) -> AttentionSpec:
    """Of the pairs within the error the cheapest; of several as cheap the most exact."""
    assert spec.adapt is not None
    pairs, per_head = pairs_of(spec), spec.adapt.per_head
    moved, norm = (part if per_head else part.sum(-1, keepdim=True) for part in (errors.moved, errors.norm))
    relative = (moved / norm.clamp(min=1e-30)).sqrt()
    relative[-1] = 0  # nothing is rounded
    picked = []
    for each in relative.T.tolist():
        within = [(sum(pair), error, pair) for pair, error in zip(pairs, each, strict=True) if error <= spec.adapt.error]
        picked.append(min(within)[2])
    heads = picked if per_head else picked * len(errors.norm)
    return replace(spec, qk_bits=tuple(qk for qk, _ in heads), pv_bits=tuple(pv for _, pv in heads))
