"""Where to cut the noise levels into intervals, so that one range per interval serves the inputs of a model's layers.

Calibration keeps a range per bucket of the noise level. Neighbouring buckets are joined where that costs least: rounding noise goes
with the square of the range, so an interval costs each of its calls the squared ratio of the interval's range to its bucket's own.
The cuts are the best there are (dynamic programming) and the same for all layers of a denoiser, which then follow one state. Edges
lie midway between times that were seen, in the denoiser's own time: another number of steps falls on either side of them.

Scales per step: EfficientDM (He et al. 2023, arXiv 2310.03270); a finite set of steps: TFMQ-DM (arXiv 2311.16503).
Intervals chosen by drift, here in place of one per step, need no table as long as the schedule and do not depend on its length.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dqtk.plan import Choice
from dqtk.spec import LayerSpec, PerLevel, PerTensor, each_of, kinds_of

from .placement import ByDrift
from .stats import Stats

SMALL_DRIFT = 1.1  # of the squared ratio, mean over intervals: below it one range costs a layer hardly anything
_LEAST = 1e-2  # of a layer's whole range: the narrowest a bucket counts


def settled(work: Sequence[Choice], stats: Stats) -> list[Choice]:
    """The choices with the edges of every ``PerLevel`` found; ``PerTensor`` where a layer's range hardly drifts.

    Raises ``ValueError`` where statistics do not say at which times a denoiser was called.
    """
    alike: dict[tuple[str, int], list[str]] = {}
    for choice in work:
        for most in {granularity.most for spec in kinds_of(choice.spec) if (granularity := _open(spec))}:
            alike.setdefault((choice.site.component, most), []).append(choice.site.id)
    answers: dict[tuple[str, int], PerLevel | PerTensor] = {}
    for (component, most), sites in alike.items():
        edges = edges_of(stats, component, sites, most)
        for site, gain in zip(sites, drift(stats, sites, edges).tolist(), strict=True):
            answers[site, most] = PerLevel(most=most, edges=edges) if edges and gain >= SMALL_DRIFT else PerTensor()

    def answered(site: str, spec: LayerSpec) -> LayerSpec:
        granularity = _open(spec)
        if granularity is None or spec.input is None:
            return spec
        return replace(spec, input=replace(spec.input, granularity=answers[site, granularity.most]))

    return [
        choice if choice.spec is None else replace(choice, spec=each_of(choice.spec, partial(answered, choice.site.id)))
        for choice in work
    ]


def _open(spec: LayerSpec) -> PerLevel | None:
    """The granularity of an input whose edges are to be found."""
    granularity = None if spec.input is None else spec.input.granularity
    return granularity if isinstance(granularity, PerLevel) and not granularity.edges else None


def edges_of(stats: Stats, component: str, sites: Sequence[str], most: int) -> tuple[float, ...]:
    """Edges between at most ``most`` intervals of a denoiser's time, ascending; none where it was called at one level only."""
    buckets = _by_time(stats, component)
    low, high, calls = _table(stats, sites, buckets)
    own = _width(low, high)
    own = torch.maximum(own, _LEAST * _width(low.amin(1), high.amax(1))[:, None])
    num = len(buckets)
    cost = torch.full((num, num), torch.inf, dtype=torch.float64)
    for first in range(num):
        for last in range(first, num):
            part = slice(first, last + 1)
            joined = _width(low[:, part].amin(1), high[:, part].amax(1))[:, None]
            cost[first, last] = (calls[:, part] * _ratio(joined, own[:, part])).sum()
    times = [stats.times[component, bucket] for bucket in buckets]
    edges: list[float] = []
    for cut in _cuts(cost, most):
        middle = (times[cut - 1][1] + times[cut][0]) / 2
        if not edges or middle > edges[-1]:  # else spans of merged statistics overlap there
            edges.append(middle)
    return tuple(edges)


def ranges_at(stats: Stats, site: str, edges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Least and largest input of a site in every interval, float32 [L] each; in one that it was not called in, those of all.

    edges: in the denoiser's own time; a bucket that one lies in counts on both sides. Raises ``ValueError`` as
    ``Stats.input_range``, and where statistics do not say at which times the denoiser was called.
    """
    component = site.partition(":")[0]
    low, high = (end.repeat(len(edges) + 1) for end in stats.input_range(site))
    buckets = _by_time(stats, component)
    seen = _table(stats, [site], buckets)
    spans = torch.tensor([stats.times[component, bucket] for bucket in buckets], dtype=torch.float64)
    first, last = torch.bucketize(spans, torch.tensor(edges, dtype=torch.float64), right=True).T
    for index in range(len(low)):
        mine = (first <= index) & (index <= last) & (seen[2][0] > 0)
        if bool(mine.any()):
            low[index], high[index] = seen[0][0, mine].amin(), seen[1][0, mine].amax()
    return low, high


def drift(stats: Stats, sites: Sequence[str], edges: Sequence[float]) -> Tensor:
    """Mean squared ratio of a site's whole range to its range in the interval, over intervals; float64 [S], at least 1."""
    found = []
    for site in sites:
        low, high = ranges_at(stats, site, edges)
        whole = _width(low.amin(), high.amax())
        own = torch.maximum(_width(low, high), _LEAST * whole)
        found.append(_ratio(whole, own).mean())
    return torch.stack(found)


def by_drift(stats: Stats) -> ByDrift:
    """A placement that follows the drift of these ranges: mean over sites of |log of the range's ratio|, per bucket of the level.

    Half of what lies between two buckets that were called counts for each of them; buckets between them share it. Raises
    ``ValueError`` for statistics of fewer than two levels.
    """
    found, count = torch.zeros(stats.num_buckets, dtype=torch.float64), 0
    for component in sorted({component for component, _ in stats.times}):
        sites = sorted({key.site for key in stats.inputs if key.site.startswith(component + ":")})
        buckets = sorted(bucket for name, bucket in stats.times if name == component)
        low, high, calls = _table(stats, sites, buckets)
        for width, seen in zip(_width(low, high), calls, strict=True):
            known = [(b, value) for b, value, share in zip(buckets, width.tolist(), seen.tolist(), strict=True) if share and value]
            for (left, before), (right, after) in pairwise(known):
                way = abs(math.log(after / before)) / (right - left)
                found[left] += way / 2
                found[left + 1 : right] += way
                found[right] += way / 2
            count += len(known) > 1
    if not count:
        raise ValueError(
            "calibrate: statistics must hold ranges at two noise levels at least, got none. "
            "Calibrate a static recipe, such as w8a8-static, at ten steps or more."
        )
    return ByDrift(moved=tuple((found / count).tolist()))


def _by_time(stats: Stats, component: str) -> list[int]:
    """Buckets of a denoiser in the order of its time."""
    mine = sorted(((*times, bucket) for (name, bucket), times in stats.times.items() if name == component))
    if not mine:
        raise ValueError(
            f"calibrate: statistics must say at which times {component} was called, got none. "
            "They are from an older version, or it has no time; calibrate again, or use PerTensor."
        )
    return [bucket for _, _, bucket in mine]


def _table(stats: Stats, sites: Sequence[str], buckets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Least, largest input and share of calls, of every site in every bucket: [S, buckets] each; 0 where it was not called."""
    place = {(site, bucket): (i, j) for i, site in enumerate(sites) for j, bucket in enumerate(buckets)}
    low, high, calls = (torch.zeros(len(sites), len(buckets), dtype=torch.float64) for _ in range(3))
    for key, seen in stats.inputs.items():
        where = place.get((key.site, key.bucket))
        if where is not None:
            known = bool(calls[where])
            low[where] = min(float(low[where]), float(seen.low)) if known else float(seen.low)
            high[where] = max(float(high[where]), float(seen.high)) if known else float(seen.high)
            calls[where] += seen.count
    return low, high, calls / calls.sum(1, keepdim=True).clamp(min=1)


def _width(low: Tensor, high: Tensor) -> Tensor:
    """What a grid from ``low`` to ``high`` must span; it always holds 0."""
    return high.clamp(min=0).double() - low.clamp(max=0).double()


def _ratio(whole: Tensor, own: Tensor) -> Tensor:
    return torch.where(own > 0, whole / own.clamp(min=torch.finfo(torch.float64).tiny), torch.ones_like(own)).square()


def _cuts(cost: Tensor, most: int) -> list[int]:
    """Where to cut 0 .. n into at most ``most`` intervals of least total cost: the first index of each but the first."""
    num = len(cost)
    best, how = cost[0].clone(), torch.zeros(min(most, num), num, dtype=torch.int64)
    for parts in range(1, min(most, num)):
        # one more interval, beginning behind ``cut`` intervals' last bucket
        tried = torch.stack([torch.cat([torch.full((cut,), torch.inf), best[cut - 1] + cost[cut, cut:]]) for cut in range(1, num)])
        least = tried.min(0)
        how[parts] = torch.where(least.values < best, least.indices + 1, 0)
        best = torch.minimum(least.values, best)
    return _walk_back(how, num - 1)


def _walk_back(how: Tensor, end: int) -> list[int]:
    cuts: list[int] = []
    for parts in range(len(how) - 1, 0, -1):
        cut = int(how[parts, end])
        if cut:
            cuts.append(cut)
            end = cut - 1
    return cuts[::-1]
