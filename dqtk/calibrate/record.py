"""Record the inputs of sites while a pipeline runs. Hooks live inside a context manager; nothing stays on the modules."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from dqtk.calls import given_arguments, time_of
from dqtk.resolve import adapters
from dqtk.sites import DENOISERS, Site, components_of

from .guidance import ALL, Branches, Halves
from .levels import at_level, bucket_of, noise_level
from .stats import NO_LEVEL, InputStat, Key, Stats


class _Component:
    """Of one component in a run: the noise-level bucket of the call in progress, and what its sites see, put where it belongs.

    Whether a call is one of two that a step has, one per half of guidance, is known when the step ends. What its sites saw waits.
    """

    def __init__(self, module: nn.Module, num_prompts: int, stats: Stats):
        self.bucket = NO_LEVEL
        self.level: float | None = None
        self.halves, self.stats = Halves(module, num_prompts), stats
        self._waiting: list[dict[str, InputStat]] = []  # of every call of the step in progress: site -> what it saw

    def begin(self, given: Mapping[str, Any], level: float | None) -> None:
        """A denoiser call begins."""
        self._settle(self.halves.see(given))
        self._waiting.append({})
        if level is not None:
            self.bucket, self.level = bucket_of(level, self.stats.num_buckets), level

    def saw(self, site: Site, branch: str, seen: InputStat) -> None:
        """A site saw this, of a branch, or of a call whose branch is not known yet."""
        if branch == ALL[0] and self._waiting:
            call = self._waiting[-1]
            call[site.id] = call[site.id].merge(seen) if site.id in call else seen
        else:
            self.stats.add(Key(site.id, self.bucket, branch), seen)

    def end(self) -> None:
        """The run is over."""
        self._settle(self.halves.end())

    def _settle(self, branches: Sequence[Branches]) -> None:
        """The step is over, whose calls held these; of a call with both halves only what is not split by them is waiting."""
        if branches:
            waiting, self._waiting = self._waiting, []
            for held, call in zip(branches, waiting, strict=True):
                for site, seen in call.items():
                    self.stats.add(Key(site, self.bucket, held[0] if len(held) == 1 else ALL[0]), seen)


def observe(x: Tensor, kind: str) -> InputStat:
    """Statistics of one input: [..., K] of a linear, [B, C, *S] of a convolution."""
    x = x.detach().float()
    channels = x.movedim(1, -1) if kind == "conv" else x
    rows = channels.reshape(-1, channels.shape[-1])
    return InputStat(rows.amin().cpu().view(1), rows.amax().cpu().view(1), rows.abs().amax(dim=0).cpu(), rows.shape[0])


@contextmanager
def recording(pipe: Any, sites: Sequence[Site], stats: Stats, num_prompts: int) -> Iterator[None]:
    """While open, every call of a site adds to ``stats``.

    Args:
        pipe: pipeline or module.
        sites: what to watch.
        stats: filled in place.
        num_prompts: prompts per pipeline call, which tells the halves of guidance (``guidance.py``). One run of the pipeline.
    """
    parts = components_of(pipe)
    places = {name: _Component(part, num_prompts, stats) for name, part in parts.items()}
    with ExitStack() as hooks:
        for name, part in parts.items():
            if DENOISERS.fullmatch(name):
                level = _level_hook(name, places[name], pipe)
                hooks.callback(part.register_forward_pre_hook(level, with_kwargs=True).remove)
        for site in sites:
            layer = parts[site.component].get_submodule(site.path)
            seen = _site_hook(site, places[site.component])
            hooks.callback(layer.register_forward_pre_hook(seen, with_kwargs=True).remove)
        yield
    for place in places.values():
        place.end()


def level_of(pipe: Any, module: nn.Module, given: Mapping[str, Any]) -> float | None:
    """Noise level of a denoiser call with these arguments; None for one without a time."""
    time = time_of(given)
    if time is None:
        return None
    adapter = adapters().get(type(module).__name__)
    return noise_level(pipe.scheduler, time, reversed_time=adapter is not None and adapter.reversed_time)


def _level_hook(name: str, place: _Component, pipe: Any):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = given_arguments(module, args, kwargs)
        level = level_of(pipe, module, given)
        place.begin(given, level)
        if level is not None:
            time = _first(time_of(given))
            place.stats.saw(name, place.bucket, time, time)

    return hook


def _first(time: Tensor | None) -> float:
    assert time is not None
    return float(time.detach().reshape(-1)[0])


def _site_hook(site: Site, place: _Component):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return
        held = place.halves.now
        branches = held if x.shape[0] % len(held) == 0 else ALL
        for branch, part in zip(branches, x.chunk(len(branches)), strict=True):
            seen = observe(part, site.kind)
            if not math.isfinite(seen.low) or not math.isfinite(seen.high):
                raise ValueError(
                    f"calibrate: inputs of {site.id} must be finite, got NaN or infinity{at_level(place.level)}. "
                    "Calibrate in bfloat16 or float32, or keep the site at 16 bits."
                )
            place.saw(site, branch, seen)

    return hook
