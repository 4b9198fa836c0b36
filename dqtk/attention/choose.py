"""From kept calls to orders and masks of every attention.

The calls are made again, and what each attention is given is seen on its way: once for the orders, once more, in the chosen orders,
for how much attention lies in every block at which noise level. Maps of all scores are never held.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqtk.calibrate.replay import Call, arguments_for
from dqtk.calls import layouts_of
from dqtk.nn.attention import install_blocks
from dqtk.numerics.block_masks import guards, largest, pack
from dqtk.numerics.layout import Layout
from dqtk.sites import AttentionSite
from dqtk.spec import AttentionSpec, Incoherence, Order, Recall, StaticBlocks, WeightedSum

from .sums import BlockSums, block_sums

LEAST_BLOCKS = 32
SHARE = 0.25  # of blocks, at which orders are compared where no mask leaves any out

Seen = Callable[[str, Tensor, Tensor, Tensor | None, float], None]


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


@contextmanager
def watching(module: nn.Module, paths: Sequence[str], seen: Seen) -> Iterator[None]:
    """While open, ``seen`` is told what these attentions give to ``scaled_dot_product_attention``: path, q and k [B, H, N, D], the
    mask, the scale."""
    open_now: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if function is F.scaled_dot_product_attention and open_now:
                names = ("query", "key", "value", "attn_mask")
                found = dict(zip(names, args, strict=False)) | given
                q, scale = found["query"], found.get("scale")
                seen(open_now[-1], q, found["key"], found.get("attn_mask"), q.shape[-1] ** -0.5 if scale is None else scale)
            return function(*args, **given)

    with ExitStack() as stack:
        for path in paths:
            part = module.get_submodule(path)
            stack.callback(part.register_forward_pre_hook(lambda *_, path=path: open_now.append(path)).remove)
            stack.callback(part.register_forward_hook(lambda *_: open_now.pop() and None, always_call=True).remove)
        stack.enter_context(Watch())
        yield


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
    sums: dict[str, list[Tensor]] = {}
    if learned:
        layouts = _layouts(module, calls, learned)
        learned = {path: replace(spec, block=fitting(spec.block, layouts[path])) for path, spec in learned.items()}
        found = _ordered(module, calls, learned, layouts, progress)
        for path, spec in found.items():
            if isinstance(spec.mask, StaticBlocks):
                found[path] = replace(spec, mask=replace(spec.mask, edges=_edges(calls, spec.mask)))
        static = {path: spec for path, spec in found.items() if isinstance(spec.mask, StaticBlocks)}
        if static:
            sums = _masses(module, calls, static, progress)
    keep = _kept({path: found[path] for path in sums}, sums)
    return [ChosenAttention(site=site, spec=found.get(site.path, spec), keep=keep.get(site.path)) for site, spec in wanted.items()]


def _made_again(module: nn.Module, calls: Sequence[Call], paths: Sequence[str], seen: Callable[..., None]) -> set[str]:
    """Make calls; ``seen``: (path, layout, call, q, k, mask, scale). Returns the paths that were reached."""
    reached = set()
    for call in calls:
        arguments = arguments_for(module, call)
        layouts = layouts_of(module, arguments)

        def see(path: str, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, call=call, layouts=layouts) -> None:
            reached.add(path)
            if q.shape[2] not in layouts or q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"attention: {path} must be of a sequence of {sorted(layouts)} tokens to itself, got {q.shape[2]} queries and "
                    f"{k.shape[2]} keys. Its family's adapter must say what they are (docs/attention.md)."
                )
            seen(path, layouts[q.shape[2]], call, q, k, mask, scale)

        with watching(module, paths, see):
            module(**arguments)
    missing = sorted(set(paths) - reached)
    if missing:
        raise ValueError(
            f"attention: {missing[0]} must compute scaled_dot_product_attention in torch in some kept call, got none. Was another "
            "backend chosen with set_attention_backend? Reset it, or keep this one at 16 bits."
        )
    return reached


def _layouts(module: nn.Module, calls: Sequence[Call], wanted: Mapping[str, AttentionSpec]) -> dict[str, Layout]:
    found: dict[str, Layout] = {}

    def see(path: str, layout: Layout, *_: Any) -> None:
        found.setdefault(path, layout)

    _made_again(module, calls[:1], list(wanted), see)
    return found


def fitting(block: Sequence[int], layout: Layout) -> tuple[int, ...]:
    """Halves of a block, down to 16, as long as a sequence has fewer than ``LEAST_BLOCKS`` of them: few blocks leave no choice."""
    found = []
    for size in block:
        while layout.tokens / size < LEAST_BLOCKS and size % 32 == 0:
            size //= 2
        found.append(size)
    return tuple(found)


def of_sample(mask: Tensor | None, sample: int, batch: int) -> Tensor | None:
    """A sample's mask, [H or 1, N or 1, N], of one that is broadcastable to [B, H, N, N]."""
    if mask is None:
        return None
    whole = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    return whole.expand(batch, *whole.shape[1:])[sample]


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

    def see(path: str, layout: Layout, call: Call, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> None:
        spec, orders = wanted[path], layout.orders()
        assert spec.order is not None
        indices = [layout.index(order, q.device) for order in orders]
        small = spec.order.small if isinstance(spec.order, WeightedSum) else None
        for sample in range(q.shape[0]):
            given = of_sample(mask, sample, q.shape[0])
            sums = block_sums(
                q[sample],
                k[sample],
                given,
                scale,
                indices,
                spec.block,
                small=small,
                largest=not isinstance(spec.order, Recall),
            )
            one = [_score(spec, layout, each) for each in sums]
            values, others = (torch.stack(part, dim=1).cpu() for part in zip(*one, strict=True))
            if path not in scores:
                scores[path] = _Scores(torch.zeros_like(values), torch.zeros_like(others), orders)
            scores[path].values += values
            scores[path].others += others

    if sorting:
        for call in calls:
            _made_again(module, [call], sorting, see)
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
    density = SHARE if spec.mask is None or spec.mask.density == 1 else spec.mask.density
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


# --- masks ---------------------------------------------------------------------------------------------------------------


def _edges(calls: Sequence[Call], mask: StaticBlocks) -> tuple[float, ...]:
    """Times between intervals with about as many kept calls each; fewer intervals where calls have few times."""
    times = sorted({call.time for call in calls if call.time is not None})
    groups = min(mask.groups, len(times))
    cuts = [math.ceil(i * len(times) / groups) for i in range(1, groups)]
    return tuple((times[cut - 1] + times[cut]) / 2 for cut in cuts)


def _masses(
    module: nn.Module, calls: Sequence[Call], wanted: Mapping[str, AttentionSpec], progress: Callable[[], object]
) -> dict[str, list[Tensor]]:
    """Per attention and interval: float32 [H, R, C], mean attention per query, in the chosen orders."""
    sums: dict[str, list[Tensor]] = {}
    number: dict[str, list[int]] = {}

    def see(path: str, layout: Layout, call: Call, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> None:
        spec = wanted[path]
        assert isinstance(spec.mask, StaticBlocks)
        group = int(torch.searchsorted(torch.tensor(spec.mask.edges), torch.tensor(call.time or 0.0), right=True))
        orders = spec.orders or (0,) * q.shape[1]
        used = sorted(set(orders))
        indices = [layout.index(order, q.device) for order in used]
        for sample in range(q.shape[0]):
            given = of_sample(mask, sample, q.shape[0])
            found = block_sums(q[sample], k[sample], given, scale, indices, spec.block)
            mine = torch.stack([found[used.index(order)].mass[head].cpu() for head, order in enumerate(orders)])
            groups = sums.setdefault(path, [torch.zeros_like(mine) for _ in range(len(spec.mask.edges) + 1)])
            groups[group] += mine
            number.setdefault(path, [0] * len(groups))[group] += 1

    for call in calls:
        _made_again(module, [call], list(wanted), see)
        progress()
    return {path: [each / max(num, 1) for each, num in zip(sums[path], number[path], strict=True)] for path in sums}


def _kept(specs: Mapping[str, AttentionSpec], sums: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """bool [G, H, R, C] per attention: the blocks with most attention within the budget, which may be one for all."""
    keep: dict[str, Tensor] = {}
    together: dict[tuple, list[str]] = {}
    for path, spec in specs.items():
        assert isinstance(spec.mask, StaticBlocks)
        key = (spec.mask.density, spec.block, spec.layout) if spec.mask.together else (path,)
        together.setdefault(key, []).append(path)
    for paths in together.values():
        spec = specs[paths[0]]
        assert isinstance(spec.mask, StaticBlocks)
        guard = guards(Layout(*spec.layout), spec.block)
        masses = [torch.stack(sums[path]) for path in paths]
        if spec.mask.together:
            flat = torch.cat([mass.flatten(0, 1) for mass in masses])
            chosen = largest(flat, guard, spec.mask.density).split([mass.shape[0] * mass.shape[1] for mass in masses])
            for path, mass, mine in zip(paths, masses, chosen, strict=True):
                keep[path] = mine.view(mass.shape)
        else:
            for path, mass in zip(paths, masses, strict=True):
                each = [largest(head, guard, spec.mask.density) for head in mass.flatten(0, 1)]
                keep[path] = torch.stack(each).view(mass.shape)
    return keep
