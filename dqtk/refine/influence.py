"""How much an error of the denoiser's output counts in the final latents, by noise level.

What an early step does wrong later ones may mend, and of the last one nothing is mended; the mean over all calls knows nothing of
that. So noise of a known power is added to the original's output at one step of a run at a time: the error of the final latents
over that power is what an error at this level counts. It needs no quantized model. MSFP (arXiv 2505.21591) weighs by the
scheduler's factor of the noise prediction instead, which says what one step does and nothing of the steps behind it.

``correct/sensitive_steps.py`` asks the other question, how much the error that a quantized model makes in an interval counts: it
swaps denoisers where this adds noise of one power.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dqtk.calibrate.levels import bucket_of
from dqtk.calibrate.record import level_of
from dqtk.calls import check_prompts, denoisers, final_latents, given_arguments
from dqtk.nn.correction import output_of, replaced


@torch.no_grad()
def influence_of(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_intervals: int = 20,
    size: float = 0.02,
    seed: int = 0,
    call_kwargs: Mapping[str, Any] | None = None,
) -> tuple[float, ...]:
    """For ``Distill(influence=...)``. One run per step, and one more.

    To be measured in float32, as in 16 bits the other rounding behind the noise counts as much: a ``UserWarning`` says so.

    Args:
        pipe: the original pipeline.
        prompts: at least one; all in one batch, prompt i from generator seed + i.
        num_intervals: of the noise level's angle asin(level), equal; the first holds the least noise.
        size: of the noise, as the output's root-mean-square share: small, so that its effect is proportional.
        seed: of the runs and the noise.
        call_kwargs: as for ``calibrate``, with the number of steps.
    Returns:
        Per interval, its mean over the steps in it; 1 on average over steps. An interval without a step has that of the nearest.
    Raises:
        ValueError: no list of prompts, a size or a number of intervals that is not positive, arguments that the pipeline does not
            name, or denoisers that are called without a time.
    """
    check_prompts(prompts, "influence_of", "Two show most of it.")
    if not 0 < size < math.inf:
        raise ValueError(f"influence_of: size must be a positive share of the output, got {size!r}. The default is 0.02.")
    if not (isinstance(num_intervals, int) and num_intervals >= 1):
        raise ValueError(f"influence_of: num_intervals must be a positive integer, got {num_intervals!r}. The default is 20.")
    rounded = {str(kind).removeprefix("torch.") for part in denoisers(pipe).values() if (kind := _dtype(part)) != torch.float32}
    if rounded:
        warnings.warn(
            f"influence_of: denoisers should be in float32, got {', '.join(sorted(rounded))}. Other rounding behind the noise is "
            "an error too, and hides what early steps count: load with dtype=torch.float32.",
            stacklevel=2,
        )
    with _disturbed(pipe, None, size, seed) as seen:
        exact = final_latents(pipe, prompts, seed, call_kwargs, "influence_of")
    counts: dict[int, list[float]] = {}
    for step, level in enumerate(seen.levels):
        with _disturbed(pipe, step, size, seed) as now:
            got = final_latents(pipe, prompts, seed, call_kwargs, "influence_of")
        counts.setdefault(bucket_of(level, num_intervals), []).append(float((got - exact).square().sum()) / now.power)
    mean = math.fsum(value for found in counts.values() for value in found) / len(seen.levels)
    nearest = [min(counts, key=lambda bucket: abs(bucket - i)) for i in range(num_intervals)]
    return tuple(math.fsum(counts[bucket]) / len(counts[bucket]) / mean for bucket in nearest)


def _dtype(part: nn.Module) -> torch.dtype:
    return next((p.dtype for p in part.parameters() if p.is_floating_point()), torch.float32)


class _Seen:
    """Noise levels of the steps of a run, and the power of the noise that was added."""

    def __init__(self) -> None:
        self.levels: list[float] = []
        self.power = 0.0


@contextmanager
def _disturbed(pipe: Any, step: int | None, size: float, seed: int) -> Iterator[_Seen]:
    """While open, denoisers say what they said with noise, in one step. Calls at one level are one step."""
    seen, draw = _Seen(), torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        level = level_of(pipe, module, given_arguments(module, args, kwargs))
        if level is None:
            raise ValueError(f"influence_of: {type(module).__name__} must be called with a time, got none. It has no steps.")
        if not seen.levels or seen.levels[-1] != level:
            seen.levels.append(level)
        if step != len(seen.levels) - 1:
            return output
        exact = output_of(output).float()
        noise = torch.randn(exact.shape, generator=draw).to(exact.device) * exact.square().mean().sqrt() * size
        seen.power += float(noise.square().sum())
        return replaced(output, (exact + noise).to(output_of(output).dtype))

    with ExitStack() as hooks:
        for part in denoisers(pipe).values():
            hooks.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
        yield seen
