"""From kept calls to orders, masks and widths of every attention.

The calls are made again, and what each attention is given is seen on its way: once for the orders; once more, in the chosen orders,
for how much attention lies in every block at which noise level; and where specs ask for it for the error of outputs, at some
densities and in some widths. Maps of all scores are never held.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calibrate.replay import Call
from dqtk.nn.attention import install_blocks
from dqtk.numerics.block_masks import pack
from dqtk.numerics.layout import Layout
from dqtk.sites import AttentionSite
from dqtk.spec import AttentionSpec, Incoherence, Order, OutputError, Recall, StaticBlocks, WeightedSum

from .masks import edges_of, kept_blocks, warn_of_guards
from .sums import BlockSums, block_sums
from .watch import Given, made_again
from .widths import with_widths

LEAST_BLOCKS = 32
SHARE = 0.25  # of blocks, at which orders are compared where no mask leaves any out


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenAttention:
    """``spec`` with all that calibration finds; ``keep``: bool [G, H, R, C] of static blocks."""

    site: AttentionSite
    spec: AttentionSpec
    keep: Tensor | None = None


def place_attention(denoiser: nn.Module, chosen: ChosenAttention) -> None:
    """Put what was found into the model."""
    blocks = install_blocks(denoiser, chosen.site.path, chosen.spec, "quantize")
    if chosen.keep is not None and blocks.live is not None:
        blocks.live.copy_(pack(chosen.keep))


def passes(specs: Iterable[AttentionSpec]) -> int:
    """How often ``choose`` makes every kept call again, at most."""
    given = list(specs)
    measured = any(isinstance(spec.mask, StaticBlocks) and isinstance(spec.mask.by, OutputError) for spec in given)
    return 2 + measured + any(spec.adapt is not None for spec in given)


@torch.no_grad()
def choose(
    module: nn.Module,
    calls: Sequence[Call],
    wanted: Mapping[AttentionSite, AttentionSpec],
    *,
    progress: Callable[[], object] = lambda: None,
) -> list[ChosenAttention]:
    """Orders and masks of the attentions of a denoiser.

    Args:
        module: the unquantized denoiser.
        calls: kept calls of it.
        wanted: what each attention shall be; specs that calibration adds nothing to come back as they are.
        progress: called after every call that was made again.
    Raises:
        ValueError: an attention that no call reaches, or that computes its scores elsewhere.
    """
    learned = {site.path: spec for site, spec in wanted.items() if spec.needs_stats}
    found: dict[str, AttentionSpec] = {}
    keep: dict[str, Tensor] = {}
    if learned:
        layouts = _layouts(module, calls, learned)
        learned = {path: replace(spec, block=fitting(spec.block, layouts[path])) for path, spec in learned.items()}
        found = _ordered(module, calls, learned, layouts, progress)
        for path, spec in found.items():
            if isinstance(spec.mask, StaticBlocks):
                found[path] = replace(spec, mask=replace(spec.mask, edges=edges_of(calls, spec.mask)))
        keep = kept_blocks(module, calls, {p: spec for p, spec in found.items() if isinstance(spec.mask, StaticBlocks)}, progress)
        adaptive = {path: spec for path, spec in found.items() if spec.adapt is not None}
        found |= with_widths(module, calls, adaptive, keep, progress)
        found |= {path: _counted(found[path], mask) for path, mask in keep.items()}
        warn_of_guards({path: found[path] for path in keep}, keep)
    return [ChosenAttention(site=site, spec=found.get(site.path, spec), keep=keep.get(site.path)) for site, spec in wanted.items()]


def _counted(spec: AttentionSpec, keep: Tensor) -> AttentionSpec:
    """With the share of blocks that came out."""
    assert isinstance(spec.mask, StaticBlocks)
    return replace(spec, mask=replace(spec.mask, computed=round(int(keep.sum()) / keep.numel(), 6)))


def _layouts(module: nn.Module, calls: Sequence[Call], wanted: Mapping[str, AttentionSpec]) -> dict[str, Layout]:
    found: dict[str, Layout] = {}

    def see(path: str, layout: Layout, *_: Any) -> None:
        found.setdefault(path, layout)

    made_again(module, calls[:1], list(wanted), see)
    return found


def fitting(block: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Halves of a block, down to 16, as long as a sequence has fewer than ``LEAST_BLOCKS`` of them: few blocks leave no choice."""
    found = []
    for size in block:
        while layout.tokens / size < LEAST_BLOCKS and size % 32 == 0:
            size //= 2
        found.append(size)
    return tuple(found)


# --- orders --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Scores:
    """Per head and order, summed over calls and samples."""

    values: Tensor
    others: Tensor
    orders: list[int] = field(default_factory=list)


def _ordered(
    module: nn.Module,
    calls: Sequence[Call],
    wanted: Mapping[str, AttentionSpec],
    layouts: Mapping[str, Layout],
    progress: Callable[[], object],
) -> dict[str, AttentionSpec]:
    """Specs with layout and orders."""
    plain = {path: replace(spec, layout=layouts[path].numbers) for path, spec in wanted.items()}
    sorting = [path for path, spec in wanted.items() if spec.order is not None and len(layouts[path].orders()) > 1]
    scores: dict[str, _Scores] = {}

    def see(path: str, layout: Layout, call: Call, given: Given) -> None:
        spec, orders = wanted[path], layout.orders()
        assert spec.order is not None
        indices = [layout.index(order, given.q.device) for order in orders]
        small = spec.order.small if isinstance(spec.order, WeightedSum) else None
        for one in given.samples():
            sums = block_sums(
                one.q, one.k, one.mask, one.scale, indices, spec.block, small=small, largest=not isinstance(spec.order, Recall)
            )
            scored = [_score(spec, layout, each) for each in sums]
            values, others = (torch.stack(part, dim=1).cpu() for part in zip(*scored, strict=True))
            if path not in scores:
                scores[path] = _Scores(torch.zeros_like(values), torch.zeros_like(others), orders)
            scores[path].values += values
            scores[path].others += others

    if sorting:
        for call in calls:
            made_again(module, [call], sorting, see)
            progress()
    for path, seen in scores.items():
        best = _best(wanted[path].order, seen, wanted[path].one_order)
        plain[path] = replace(plain[path], orders=tuple(seen.orders[index] for index in best))
    return plain


def _score(spec: AttentionSpec, layout: Layout, sums: BlockSums) -> tuple[Tensor, Tensor]:
    """Two numbers per head, the second for the paper's formula only: float32 [H] each. More is better in none but recall."""
    zero = torch.zeros(sums.mass.shape[0])
    if isinstance(spec.order, Incoherence | WeightedSum):
        assert sums.most is not None
        widths = torch.full((sums.mass.shape[2],), float(spec.block[1]), device=sums.mass.device)
        widths[-1] = layout.tokens - (sums.mass.shape[2] - 1) * spec.block[1]
        mean = sums.mass / widths
        incoherence = (sums.most / mean.clamp(min=1e-12)).mean((1, 2))
        if isinstance(spec.order, Incoherence):
            return incoherence, zero
        assert sums.small is not None
        return (sums.small >= spec.order.share).float().mean((1, 2)), incoherence
    density = getattr(spec.mask, "density", 1.0)
    density = SHARE if density == 1 else density
    mass = sums.mass.flatten(1)
    return mass.topk(max(1, round(density * mass.shape[1])), dim=1).values.sum(1) / mass.sum(1), zero


def _best(order: Order | None, seen: _Scores, one: bool) -> list[int]:
    """Which of the orders, for every head. Ties go to the first."""
    values, others = (part.mean(0, keepdim=True).expand_as(part) if one else part for part in (seen.values, seen.others))
    if isinstance(order, WeightedSum):
        cost = order.alpha * values / values.sum(1, keepdim=True) + (1 - order.alpha) * others / others.sum(1, keepdim=True)
    else:
        cost = values if isinstance(order, Incoherence) else -values
    return cost.argmin(1).tolist()
