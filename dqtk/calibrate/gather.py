"""Second moments and a sample of layer inputs, from replayed calls: what solvers and transforms work with.

Sites that share an input share one entry. Rows are tokens of a linear and windows of a convolution ([taps * C_in], channel
innermost, zeros where the padding is). Of every call at most ``max_rows`` rows are taken, evenly, so that all noise levels and both
halves of guidance count alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels.conv import gather_windows
from dqtk.sites import Site

from .replay import Call, replay

MAX_ROWS = 4096  # of one call
SAMPLE_ROWS = 1024  # kept in all


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What was seen of one input with K numbers per row.

    gram: float64 [K, K], mean of x x^T. mean: float32 [K]. sample: float32 [R, K], R at most ``SAMPLE_ROWS``. count: rows in
    the mean.
    """

    gram: Tensor
    mean: Tensor
    sample: Tensor
    count: int

    def to(self, device: torch.device) -> "Inputs":
        """The same on another device."""
        return replace(self, gram=self.gram.to(device), mean=self.mean.to(device), sample=self.sample.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """The statistics of f(x) for a linear f on the last dimension."""
        gram = function(function(self.gram).T).T
        return replace(self, gram=gram, mean=function(self.mean), sample=function(self.sample))


def input_name(site: Site) -> str:
    """Name of a site's input: shared, or its own."""
    return site.shared_input or site.id


@dataclass(slots=True)
class _Sum:
    gram: Tensor
    total: Tensor
    sample: list[Tensor]
    count: int = 0


def gather(module: nn.Module, calls: Sequence[Call], sites: Sequence[Site], *, max_rows: int = MAX_ROWS) -> dict[str, Inputs]:
    """Inputs of these sites by ``input_name``, over all calls of their component.

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
                _add(sums, site, rows_of(layer, x, max_rows), per_call, call)

        return see

    replay(module, mine, {site.path: watch(site) for site in first.values()})
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


def rows_of(layer: Any, x: Tensor, max_rows: int) -> Tensor:
    """float32 rows [R, K] that the layer's weight matrix is multiplied with, at most ``max_rows``, evenly chosen."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: -(-rows.shape[0] // max_rows)].float()
    found, per_sample = [], max(1, max_rows // x.shape[0])
    for sample in x.float():  # one at a time: windows of a large map take taps times its memory
        windows = gather_windows(sample[None], layer.kernel_size, layer.stride, layer.padding, layer.dilation, 0)
        found.append(windows[:: -(-windows.shape[0] // per_sample)].clone())
    return torch.cat(found)


def _add(sums: dict[str, _Sum], site: Site, rows: Tensor, per_call: int, call: Call) -> None:
    total = rows.sum(dim=0)
    if not bool(torch.isfinite(total).all()):  # as good as looking at every number, and much cheaper
        where = "" if call.level is None else f" at noise level {call.level:.3f}"
        raise ValueError(
            f"calibrate: inputs of {site.id} must be finite, got NaN or infinity{where}. "
            "Calibrate in bfloat16 or float32, or keep the site at 16 bits."
        )
    k = rows.shape[1]
    name = input_name(site)
    if name not in sums:
        sums[name] = _Sum(torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64), [])
    found = sums[name]
    found.gram += (rows.T @ rows).double().cpu()
    found.total += total.double().cpu()
    found.count += rows.shape[0]
    found.sample.append(rows[:: -(-rows.shape[0] // per_call)].cpu().clone())


def _finish(found: _Sum) -> Inputs:
    sample = torch.cat(found.sample)
    mean = (found.total / found.count).float()
    return Inputs(gram=found.gram / found.count, mean=mean, sample=sample[:: -(-len(sample) // SAMPLE_ROWS)], count=found.count)


def gram_bytes(site: Site) -> int:
    """Memory that the second moments of a site's input take."""
    return 8 * site.k * site.k
