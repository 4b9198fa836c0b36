"""Which blocks are computed: those with most attention, within one budget, a share each, or what a head's error asks for."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dqtk.calibrate.replay import Call
from dqtk.numerics.block_masks import guards, largest, largest_of_all
from dqtk.numerics.layout import Layout
from dqtk.spec import AttentionSpec, OutputError, StaticBlocks

from .densities import blocks_by_error
from .sums import block_sums
from .watch import Given, group_of, made_again


def edges_of(calls: Sequence[Call], mask: StaticBlocks) -> tuple[float, ...]:
    """Times between intervals with about as many kept calls each; fewer intervals where calls have few times."""
    times = sorted({call.time for call in calls if call.time is not None})
    groups = min(mask.groups, len(times))
    cuts = [math.ceil(i * len(times) / groups) for i in range(1, groups)]
    return tuple((times[cut - 1] + times[cut]) / 2 for cut in cuts)


def kept_blocks(
    module: nn.Module, calls: Sequence[Call], wanted: Mapping[str, AttentionSpec], progress: Callable[[], object] = lambda: None
) -> dict[str, Tensor]:
    """bool [G, H, R, C] per attention with static blocks, whose orders and edges are known.

    Args:
        module: the unquantized denoiser.
        calls: kept calls of it.
        wanted: path -> spec. progress: called after every call that was made again.
    """
    if not wanted:
        return {}
    masses = _masses(module, calls, wanted, progress)
    measured = {path: spec for path, spec in wanted.items() if isinstance(_mask(spec).by, OutputError)}
    ranked = {path: spec for path, spec in wanted.items() if path not in measured}
    return _kept(ranked, masses) | blocks_by_error(module, calls, measured, masses, progress)


def warn_of_guards(specs: Mapping[str, AttentionSpec], keep: Mapping[str, Tensor]) -> None:
    """Warns where the blocks that are always computed are more than the density asks for.

    Args:
        specs: path -> spec with static blocks. keep: path -> bool [G, H, R, C] of them.
    """
    together: dict[tuple, list[str]] = {}
    for path, spec in specs.items():
        mask = replace(_mask(spec), edges=(), computed=None)
        together.setdefault((mask, spec.block, spec.layout), []).append(path)
    for (mask, block, _), paths in together.items():
        computed, blocks = (sum(int(number(keep[path])) for path in paths) for number in (Tensor.sum, Tensor.numel))
        shares = 1 if mask.together else sum(keep[path].shape[:2].numel() for path in paths)
        if computed > mask.density * blocks + shares:  # each is rounded
            least = " The lowest density whose error is measured is another limit." if isinstance(mask.by, OutputError) else ""
            warnings.warn(
                f"quantize: {computed / blocks:.3f} of the {block[0]}x{block[1]} blocks of {len(paths)} attentions are computed, "
                f"though {mask.density:g} were asked for: the diagonal, text, a ragged end and one block per row always are."
                f"{least} Smaller blocks have fewer of them.",
                stacklevel=2,
            )


def _mask(spec: AttentionSpec) -> StaticBlocks:
    assert isinstance(spec.mask, StaticBlocks)
    return spec.mask


def _masses(
    module: nn.Module, calls: Sequence[Call], wanted: Mapping[str, AttentionSpec], progress: Callable[[], object]
) -> dict[str, Tensor]:
    """Per attention: float16 [G, H, R, C], mean attention per query, in the chosen orders, as a multiple of even attention.

    All attentions are summed at once, for a call goes through all of them, and blocks grow with the square of a sequence: hence
    half the bytes of float32. A running mean in float16 is off by a thousandth after some tens of calls; prompts differ by more.
    """
    means: dict[str, Tensor] = {}
    number: dict[tuple[str, int], int] = {}

    def see(path: str, layout: Layout, call: Call, given: Given) -> None:
        spec, heads = wanted[path], given.q.shape[1]
        orders = spec.orders or (0,) * heads
        used = sorted(set(orders))
        indices, group = [layout.index(order, given.q.device) for order in used], group_of(call, _mask(spec))
        for one in given.samples():
            found = block_sums(one.q, one.k, one.mask, one.scale, indices, spec.block)
            mine = torch.stack([found[used.index(order)].mass[head].cpu() for head, order in enumerate(orders)])
            if path not in means:
                means[path] = torch.zeros(len(_mask(spec).edges) + 1, *mine.shape, dtype=torch.float16)
            times = number[path, group] = number.get((path, group), 0) + 1
            before = means[path][group].float()
            means[path][group] = before + (mine * mine.shape[-1] - before) / times

    for call in calls:
        made_again(module, [call], list(wanted), see)
        progress()
    return means


def _kept(specs: Mapping[str, AttentionSpec], masses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """bool [G, H, R, C] per attention: the blocks with most attention within the budget, which may be one for all."""
    keep: dict[str, Tensor] = {}
    together: dict[tuple, list[str]] = {}
    for path, spec in specs.items():
        mask = _mask(spec)
        together.setdefault((mask, spec.block, spec.layout) if mask.together else (path,), []).append(path)
    for paths in together.values():
        spec, mask = specs[paths[0]], _mask(specs[paths[0]])
        guard = guards(Layout(*spec.layout), spec.block)
        if mask.together:
            keep |= zip(paths, largest_of_all([masses[path] for path in paths], guard, mask.density), strict=True)
        for path in () if mask.together else paths:
            each = [largest(head, guard, mask.density) for head in masses[path].flatten(0, 1)]
            keep[path] = torch.stack(each).view(masses[path].shape)
    return keep
