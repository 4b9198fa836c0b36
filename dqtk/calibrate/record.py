"""Record the inputs of sites while a pipeline runs. Hooks live inside a context manager; nothing stays on the modules."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from dqtk.calls import given_arguments, time_of
from dqtk.resolve import adapters
from dqtk.sites import DENOISERS, Site, components_of

from .levels import at_level, bucket_of, noise_level
from .stats import NO_LEVEL, InputStat, Key, Stats


class _Call:
    """The denoiser call in progress: noise-level bucket, and whether the batch holds both guidance branches."""

    bucket = NO_LEVEL
    level: float | None = None
    guided = False


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
        num_prompts: prompts per pipeline call: a denoiser batch twice as large holds the unconditional half first.
    """
    parts = components_of(pipe)
    calls = {name: _Call() for name in parts}
    with ExitStack() as hooks:
        for name, part in parts.items():
            if DENOISERS.fullmatch(name):
                level = _level_hook(name, calls[name], pipe, stats, num_prompts)
                hooks.callback(part.register_forward_pre_hook(level, with_kwargs=True).remove)
        for site in sites:
            layer = parts[site.component].get_submodule(site.path)
            seen = _site_hook(site, calls[site.component], stats)
            hooks.callback(layer.register_forward_pre_hook(seen, with_kwargs=True).remove)
        yield


def level_of(pipe: Any, module: nn.Module, given: Mapping[str, Any]) -> float | None:
    """Noise level of a denoiser call with these arguments; None for one without a time."""
    time = time_of(given)
    if time is None:
        return None
    adapter = adapters().get(type(module).__name__)
    return noise_level(pipe.scheduler, time, reversed_time=adapter is not None and adapter.reversed_time)


def _level_hook(name: str, call: _Call, pipe: Any, stats: Stats, num_prompts: int):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = given_arguments(module, args, kwargs)
        level = level_of(pipe, module, given)
        if level is not None:
            call.bucket, call.level = bucket_of(level, stats.num_buckets), level
            time = _first(time_of(given))
            stats.saw(name, call.bucket, time, time)
        sample = next(iter(given.values()), None)  # [B, ...], or a list of B samples
        call.guided = sample is not None and len(sample) == 2 * num_prompts

    return hook


def _first(time: Tensor | None) -> float:
    assert time is not None
    return float(time.detach().reshape(-1)[0])


def _site_hook(site: Site, call: _Call, stats: Stats):
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel() == 0:
            return
        halves = {"all": x}
        if call.guided and x.shape[0] % 2 == 0:
            uncond, cond = x.chunk(2)
            halves = {"uncond": uncond, "cond": cond}
        for branch, part in halves.items():
            seen = observe(part, site.kind)
            if not math.isfinite(seen.low) or not math.isfinite(seen.high):
                raise ValueError(
                    f"calibrate: inputs of {site.id} must be finite, got NaN or infinity{at_level(call.level)}. "
                    "Calibrate in bfloat16 or float32, or keep the site at 16 bits."
                )
            stats.add(Key(site.id, call.bucket, branch), seen)

    return hook
