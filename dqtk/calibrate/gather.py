"""Second moments and a sample of layer inputs, from replayed calls: what solvers and transforms work with.

Sites that share an input share one entry. Rows are tokens of a linear and windows of a convolution ([taps * C_in], channel
innermost, zeros where the padding is). Of every call at most ``max_rows`` rows are taken, so that all noise levels and both halves
of guidance count alike. They are drawn at random, seeded: every fixed stride divides some model's grid, and then sees the same
tokens in every call.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels.conv import gather_windows
from dqtk.nn.constant_token import multiples, without
from dqtk.sites import Site

from .levels import at_level
from .replay import Call, replay
from .waypoint import Waypoint

MAX_ROWS = 4096  # of one call
SAMPLE_ROWS = 1024  # kept in all
LARGEST = 1e17  # of an input: the squares of a call of 4096 rows stay far below the end of float32
WIDE, STRIPES = 1024, 6  # inputs whose second moments are summed a triangle at a time
PEAKS = 8  # of one call: rows with the largest numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was seen of one input with K numbers per row.

    gram: float64 [K, K], mean of x x^T; [0, 0] where nobody asked for it. mean: float32 [K]. sample: float32 [R, K], R at most
    ``SAMPLE_ROWS``, drawn evenly from all calls. low, high: float32 [K], least and largest number of every channel. peaks: float32
    [P, K], the rows with the largest numbers of every call. count: rows in the mean. ends: of a convolution, whose inputs are
    rounded a sample at a time, float32 [R, 2 C]: least and largest number of every channel in the sample that a row was cut from;
    None for linears, and in a basis where nobody looked. times, peak_times: float32 [R], [P], time of the denoiser's call
    that a row comes from; 0 where there is none.
    """

    gram: Tensor
    mean: Tensor
    sample: Tensor
    low: Tensor
    high: Tensor
    peaks: Tensor
    count: int
    ends: Tensor | None = None
    times: Tensor | None = None
    peak_times: Tensor | None = None

    @property
    def absmax(self) -> Tensor:
        """float32 [K]: largest magnitude of every channel."""
        return torch.maximum(-self.low, self.high)

    def to(self, device: torch.device) -> "Inputs":
        """The same on another device."""
        names = [field.name for field in fields(self) if isinstance(getattr(self, field.name), Tensor)]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def scaled(self, factor: Tensor) -> "Inputs":
        """The statistics of x * factor, for positive float32 [K]; exact."""
        found = self.mapped(lambda x: x * factor.to(x.dtype))
        ends = None if self.ends is None else self.ends * factor[: self.ends.shape[1] // 2].repeat(2)
        return replace(found, low=self.low * factor, high=self.high * factor, ends=ends)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """The statistics of f(x) for a linear f on the last dimension.

        Exact but for ``low`` and ``high``, which become those of the sample and of the rows with the largest numbers.
        """
        gram = function(function(self.gram).T).T if self.gram.numel() else self.gram
        sample, peaks = function(self.sample), function(self.peaks)
        seen = torch.cat([sample, peaks])
        low, high = seen.amin(dim=0).clamp(max=0), seen.amax(dim=0).clamp(min=0)
        return replace(self, gram=gram, mean=function(self.mean), sample=sample, low=low, high=high, peaks=peaks, ends=None)


def input_name(site: Site) -> str:
    """Name of a site's input: shared, or its own."""
    return site.shared_input or site.id


@dataclass(slots=True)
class _Sum:
    gram: Tensor
    total: Tensor
    low: Tensor
    high: Tensor
    sample: list[Tensor]
    peaks: list[Tensor]
    count: int = 0
    calls: int = 0

    @staticmethod
    def empty(k: int, moments: bool, device: torch.device) -> "_Sum":
        shapes = ((k, k) if moments else (0, 0), (k,))
        gram, total = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
        return _Sum(gram, total, torch.zeros(k, device=device), torch.zeros(k, device=device), [], [])


def gather(
    module: nn.Module,
    calls: Sequence[Call],
    sites: Sequence[Site],
    *,
    without_moments: Collection[str] = (),
    tokens: Mapping[str, Tensor] | None = None,
    max_rows: int = MAX_ROWS,
    waypoint: Waypoint | None = None,
) -> dict[str, Inputs]:
    """Inputs of these sites by ``input_name``, over all calls of their component.

    ``without_moments``: names of inputs whose second moments nobody needs. ``tokens``: [K] by name, which inputs are taken without
    (``nn/constant_token.py``). ``waypoint``: where replays may begin; of all calls of this component.

    Raises:
        ValueError: no calls, a site that no call reaches, or NaN and infinities (names the site and the noise level).
    """
    mine = calls_of(calls, sites[0].component)
    first = {input_name(site): site for site in reversed(sites)}
    sums: dict[str, _Sum] = {}
    per_call = max(1, SAMPLE_ROWS // len(mine))

    def watch(site: Site) -> Callable[[Tensor, Call], None]:
        layer: Any = module.get_submodule(site.path)

        def see(x: Tensor, call: Call) -> None:
            if x.numel():
                name = input_name(site)
                if tokens is not None and name in tokens:
                    token = tokens[name].to(x.device)
                    x = without(x, token, multiples(x, token))
                if name not in sums:
                    sums[name] = _Sum.empty(site.k, name not in without_moments, x.device)
                draw = torch.Generator().manual_seed(sums[name].calls)
                check_finite(site, ends := ends_of(layer, x), call)
                rows = rows_of(layer, x, max_rows, draw)
                beside = torch.cat([_sample_ends(layer, x, len(rows)), rows.new_full((len(rows), 1), call.time or 0.0)], dim=1)
                _add(sums[name], rows, ends, beside, per_call, draw)

        return see

    replay(module, mine, {site.path: watch(site) for site in first.values()}, waypoint)
    for name, site in first.items():
        if name not in sums:
            raise ValueError(
                f"calibrate: {site.id} must be given numbers to learn from, got empty inputs only. Keep it at 16 bits."
            )
    return {name: _finish(found) for name, found in sums.items()}


def calls_of(calls: Sequence[Call], component: str) -> list[Call]:
    """The calls of one component. Raises ``ValueError`` where there are none."""
    mine = [call for call in calls if call.component == component]
    if not mine:
        raise ValueError(
            f"calibrate: calls of {component} must have been kept, got none. Calibrate with this pipeline and plan: "
            "dqtk.calibrate(pipe, prompts, plan)."
        )
    return mine


def rows_of(layer: Any, x: Tensor, max_rows: int, draw: torch.Generator) -> Tensor:
    """float32 rows [R, K] that the layer's weight matrix is multiplied with, at most ``max_rows``, drawn at random."""
    if isinstance(layer, nn.Linear):
        return _some(x.reshape(-1, x.shape[-1]), max_rows, draw).float()
    found, per_sample = [], max(1, max_rows // x.shape[0])
    for sample in x.float():  # one at a time: windows of a large map take taps times its memory
        windows = gather_windows(sample[None], layer.kernel_size, layer.stride, layer.padding, layer.dilation, 0)
        found.append(_some(windows, per_sample, draw).clone())
    return torch.cat(found)


def ends_of(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest number of every column of all rows, float32 [K]; padding is 0."""
    last = x if isinstance(layer, nn.Linear) else x.movedim(1, -1)
    low, high = last.reshape(-1, last.shape[-1]).float().aminmax(dim=0)
    taps = layer.weight[0].numel() // len(low)
    return low.repeat(taps), high.repeat(taps)


def _sample_ends(layer: Any, x: Tensor, num: int) -> Tensor:
    """``Inputs.ends`` of the ``num`` rows taken from this input, as many of every sample; [num, 0] of a linear."""
    if isinstance(layer, nn.Linear):
        return x.new_empty((num, 0), dtype=torch.float32)
    low, high = x.flatten(2).float().aminmax(dim=2)
    return torch.cat([low, high], dim=1).repeat_interleave(num // len(x), dim=0)


def _some(rows: Tensor, num: int, draw: torch.Generator) -> Tensor:
    """At most ``num`` of the rows, in their order."""
    if rows.shape[0] <= num:
        return rows
    return rows[torch.randperm(rows.shape[0], generator=draw)[:num].sort().values.to(rows.device)]


def check_finite(site: Site, ends: tuple[Tensor, Tensor], call: Call) -> None:
    """Raises ``ValueError`` for NaN, infinity, and numbers whose squares are no float32."""
    if not bool((torch.stack(ends).abs() < LARGEST).all()):
        raise ValueError(
            f"calibrate: inputs of {site.id} must be finite, got NaN, infinity or more than 1e17{at_level(call.level)}. "
            "Calibrate in bfloat16 or float32, or keep the site at 16 bits."
        )


def _add(found: _Sum, rows: Tensor, ends: tuple[Tensor, Tensor], beside: Tensor, per_call: int, draw: torch.Generator) -> None:
    """One call's rows. ``beside`` [R, ...] goes with them into the sample; its last column is the time."""
    if found.gram.numel():
        _add_moments(found.gram, rows)
    found.total += rows.sum(dim=0)
    found.low, found.high = torch.minimum(found.low, ends[0]), torch.maximum(found.high, ends[1])
    found.count, found.calls = found.count + rows.shape[0], found.calls + 1
    found.sample.append(_some(torch.cat([rows, beside], dim=1), per_call, draw).cpu().clone())
    largest = rows.abs().amax(dim=1).topk(min(PEAKS, rows.shape[0])).indices
    found.peaks.append(torch.cat([rows[largest], beside[largest, -1:]], dim=1).cpu())


def _add_moments(gram: Tensor, rows: Tensor) -> None:
    """Add x x^T of all rows; of wide inputs its upper triangle, in stripes (notebooks/LOG.md)."""
    if len(gram) < WIDE:
        gram += rows.T @ rows
        return
    for begin, end in _stripes(len(gram)):
        gram[begin:end, begin:] += rows[:, begin:end].T @ rows[:, begin:]


def _stripes(k: int) -> list[tuple[int, int]]:
    width = -(-k // STRIPES)
    return [(begin, min(begin + width, k)) for begin in range(0, k, width)]


def _finish(found: _Sum) -> Inputs:
    k = len(found.total)
    for begin, end in _stripes(k) if len(found.gram) >= WIDE else ():
        found.gram[end:, begin:end] = found.gram[begin:end, end:].T
    each = max(1, SAMPLE_ROWS // 4 // found.calls)  # of every call, so that quiet noise levels keep theirs
    peaks = torch.cat([rows[:each] for rows in found.peaks])
    sample = _some(torch.cat(found.sample), SAMPLE_ROWS, torch.Generator().manual_seed(0))
    return Inputs(
        gram=found.gram.div_(found.count),
        mean=(found.total / found.count).float(),
        sample=sample[:, :k].contiguous(),
        low=found.low,
        high=found.high,
        peaks=peaks[:, :k].contiguous(),
        count=found.count,
        ends=sample[:, k:-1].contiguous() if sample.shape[1] > k + 1 else None,
        times=sample[:, -1].contiguous(),
        peak_times=peaks[:, -1].contiguous(),
    )


def gram_bytes(site: Site) -> int:
    """Memory that the second moments of a site's input take."""
    return 8 * site.k * site.k
