"""Which part of a run suffers most from quantization: every interval is quantized by itself, the rest of the run is the original.

What is measured is the error of the final latents, because an early error is carried and changed by every step behind it. Two
pipelines are held at once: the original, and the quantized one, whose denoisers serve the calls of one interval at a time.

``refine/influence.py`` needs no quantized model: it adds noise of one power to single steps, and so finds what an error counts
and not how large it is.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dqtk.calibrate.schedule import run_times, time_at
from dqtk.calibrate.stub import served
from dqtk.calls import check_prompts, denoisers, final_latents, given_arguments, time_of

LEAST = 1e-12  # an error that counts: rounding of float32, so that a prompt which a part does not touch decides nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """error: mean squared error of the final latents, as the original's share, when only this part of a run is quantized; geometric
    mean over prompts, so that one that turns over into another picture does not decide alone.

    begin, end: shares of the run, as ``policy.Interval`` has them.
    """

    begin: float
    end: float
    error: float


@torch.no_grad()
def sensitive_steps(
    pipe: Any,
    quantized: Any,
    prompts: Sequence[str],
    *,
    num_intervals: int = 20,
    seed: int = 0,
    call_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Sensitivity]:
    """Intervals of equal share, the most sensitive first. One run per interval and prompt, and one of the original.

    Args:
        pipe: the original pipeline.
        quantized: the same pipeline, quantized.
        prompts: at least one; prompt i starts from generator seed + i.
        num_intervals: as many as a run has steps, or fewer.
        call_kwargs: as for ``calibrate``, with the number of steps.
        progress: show a bar with the time left.
    Raises:
        ValueError: no prompts, no intervals, denoisers that are not the same, as ``run_times``.
    """
    theirs = denoisers(quantized)
    check_prompts(prompts, "sensitive_steps", "Two show most of it.")
    if num_intervals < 1:
        raise ValueError(f"sensitive_steps: num_intervals must be at least 1, got {num_intervals}. As many as a run has steps.")
    if set(theirs) != set(denoisers(pipe)):
        raise ValueError(
            f"sensitive_steps: quantized must have the denoisers {sorted(denoisers(pipe))}, got {sorted(theirs)}. "
            "Pass both pipelines of one model."
        )
    times = run_times(pipe, prompts, call_kwargs)
    bounds = [index / num_intervals for index in range(num_intervals + 1)]
    exact = _latents(pipe, prompts, seed, call_kwargs)
    found = []
    for begin, end in tqdm(list(pairwise(bounds)), desc="sensitive steps", unit="part", disable=not progress):
        with ExitStack() as stack:
            for name, part in denoisers(pipe).items():
                stack.enter_context(served(part, _either(part, theirs[name], _inside(times, begin, end))))
            got = _latents(pipe, prompts, seed, call_kwargs)
        found.append(Sensitivity(begin=begin, end=end, error=geometric_error(got, exact)))
    return sorted(found, key=lambda part: -part.error)


def geometric_error(got: Tensor, exact: Tensor) -> float:
    """Squared error of each of [P, ...] as its exact one's share, geometric mean over P; below ``LEAST`` it counts as that.

    Raises ``ValueError`` for latents that are no numbers.
    """
    errors = (got - exact).square().flatten(1).sum(1) / exact.square().flatten(1).sum(1)
    if not bool(errors.isfinite().all()):
        raise ValueError("sensitive_steps: final latents must be numbers, got NaN or infinity. Is one of the models damaged?")
    return float(errors.clamp(min=LEAST).log().mean().exp())


def _latents(pipe: Any, prompts: Sequence[str], seed: int, call_kwargs: Mapping[str, Any] | None) -> Tensor:
    """float32 [P, ...] on the CPU, a run per prompt."""
    runs = (final_latents(pipe, [prompt], seed + i, call_kwargs, "sensitive_steps") for i, prompt in enumerate(prompts))
    return torch.cat(list(runs))


def _inside(times: Sequence[float], begin: float, end: float) -> Callable[[float], bool]:
    """Whether a time lies in a part of a run; one at an edge lies above it, as in ``nn.steps``."""
    first, last = (-torch.inf, torch.inf) if times[-1] > times[0] else (torch.inf, -torch.inf)
    ends = first if begin <= 0 else time_at(times, begin), last if end >= 1 else time_at(times, end)
    return lambda time: min(ends) <= time < max(ends)


def _either(module: nn.Module, other: nn.Module, inside: Callable[[float], bool]) -> Callable[..., Any]:
    """Calls of a denoiser whose time is inside are made by the other one."""
    own: Any = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        time = time_of(given_arguments(module, args, kwargs))
        if time is None:
            raise ValueError(f"sensitive_steps: {type(module).__name__} must be called with a time, got none. It has no steps.")
        serves = other if inside(float(time.detach().float().reshape(-1)[0])) else own
        return serves(*args, **kwargs)

    return forward
