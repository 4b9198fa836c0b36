"""Ranges of layers' inputs over the noise level, by role: why one range for all levels may not fit.

Seen on the original while pictures are compared, or taken from calibration. A layer's range at a level is what a grid there must
span (0 included); one range for all levels must span the widest. The rest is bits: at a level where the range is a quarter of the
widest, a scale for all levels leaves two bits unused.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dqtk.calibrate.levels import level_of_bucket
from dqtk.calibrate.record import level_of
from dqtk.calibrate.stats import NO_LEVEL, Stats
from dqtk.calls import denoisers, given_arguments
from dqtk.sites import Site, find_sites

MOST = 6  # roles drawn: those whose ranges move most

Widths = dict[tuple[str, float], float]  # (site id, noise level) -> what its inputs spanned there


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeCurve:
    """``unused``: bits that one range for all levels leaves unused, the median over the role's layers, one value per level."""

    role: str
    num_layers: int
    levels: tuple[float, ...]
    unused: tuple[float, ...]


@contextmanager
def ranges_seen(pipe: Any) -> Iterator[Widths]:
    """Record what the inputs of every layer of the denoisers span, while open. Levels that cannot be told are left out."""
    found: Widths = {}
    with ExitStack() as hooks:
        for name, part in denoisers(pipe).items():
            at: list[float | None] = [None]
            hooks.callback(part.register_forward_pre_hook(_level_hook(pipe, at), with_kwargs=True).remove)
            for site in find_sites(part, name):
                layer = part.get_submodule(site.path)
                hooks.callback(layer.register_forward_pre_hook(_width_hook(site, at, found), with_kwargs=True).remove)
        yield found


def _level_hook(pipe: Any, at: list[float | None]):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        try:
            at[0] = level_of(pipe, module, given_arguments(module, args, kwargs))
        except (ValueError, AttributeError):  # times that differ within a call; a pipeline without a scheduler
            at[0] = None

    return hook


def _width_hook(site: Site, at: list[float | None], found: Widths):
    def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if at[0] is None or not isinstance(x, Tensor) or not x.numel():
            return
        low, high = (float(end) for end in x.detach().aminmax())
        width = max(high, 0.0) - min(low, 0.0)
        if math.isfinite(width):
            found[site.id, at[0]] = max(found.get((site.id, at[0]), 0.0), width)

    return hook


def widths_of(stats: Stats) -> Widths:
    """The same from calibration, a level in the middle of every bucket."""
    ends: dict[tuple[str, float], tuple[float, float]] = {}
    for key, seen in stats.inputs.items():
        if key.bucket != NO_LEVEL:
            place = key.site, level_of_bucket(key.bucket, stats.num_buckets)
            low, high = ends.get(place, (0.0, 0.0))
            ends[place] = min(low, float(seen.low)), max(high, float(seen.high))
    return {place: high - low for place, (low, high) in ends.items()}


def range_curves(widths: Mapping[tuple[str, float], float], sites: Sequence[Site]) -> tuple[RangeCurve, ...]:
    """One curve per role, that which moves most first; levels from noise to picture. Roles seen at one level only are left out."""
    per_site: dict[str, dict[float, float]] = {}
    for (site_id, level), width in widths.items():
        per_site.setdefault(site_id, {})[level] = width
    by_role: dict[str, list[dict[float, float]]] = {}
    seen = set()
    for site in sites:
        mine = per_site.get(site.id, {})
        if (site.shared_input or site.id) not in seen and max(mine.values(), default=0) > 0:  # q, k and v read one input
            seen.add(site.shared_input or site.id)
            by_role.setdefault(_role(site), []).append(mine)
    curves = []
    for role, layers in by_role.items():
        levels = sorted({level for layer in layers for level in layer}, reverse=True)
        unused = [[math.log2(max(layer.values()) / layer[level]) for layer in layers if layer.get(level)] for level in levels]
        known = [(level, statistics.median(values)) for level, values in zip(levels, unused, strict=True) if values]
        if len(known) > 1:
            at, bits = zip(*known, strict=True)
            curves.append(RangeCurve(role=role, num_layers=len(layers), levels=at, unused=bits))
    return tuple(sorted(curves, key=lambda curve: (-max(curve.unused), curve.role)))


def _role(site: Site) -> str:
    """The role, in words: of projections that read one input, the input."""
    if site.role in ("self_attn.q", "self_attn.k", "self_attn.v"):
        return "self_attn.q, k, v"
    return "cross_attn.k, v" if site.role in ("cross_attn.k", "cross_attn.v") else site.role
