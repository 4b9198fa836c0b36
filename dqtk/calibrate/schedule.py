"""The times at which a pipeline calls its denoiser in a run, in the denoiser's own unit, found without denoising.

For ``run_times`` the pipeline is called and stopped at its first denoiser call: by then it has told its scheduler all that the
times depend on (number of steps, shift of the picture's size, sigmas of its own), and the one time that the denoiser was given says
in which unit the scheduler's timesteps reach it. That costs the text encoders' part of a run. ``run_calls`` sees every call, for
one of the denoiser.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from dqtk.calls import call_arguments, check_call_names, denoisers, prompt_argument

from .replay import Call, capturing
from .stub import repeating


class _First(Exception):
    """The first denoiser call was reached."""


@torch.no_grad()
def run_times(pipe: Any, prompts: Sequence[str] | None = None, call_kwargs: Mapping[str, Any] | None = None) -> list[float]:
    """The denoiser's time at every step of a run, in order.

    Args:
        pipe: pipeline with real weights.
        prompts: the first is used; None: the number 0 as text or as class.
        call_kwargs: as for ``calibrate``; the number of steps is the pipeline's own unless it is given here.
    Raises:
        ValueError: a bare module, a denoiser that is not called or has no time, a unit that is none of the scheduler's timestep t,
            t / 1000 and 1 - t / 1000 (1000: the steps that it was trained with).
    """
    if isinstance(pipe, nn.Module) or not hasattr(pipe, "scheduler"):
        raise ValueError(
            f"step_policy: shares of a run must be found with a pipeline, got {type(pipe).__name__}. "
            "Give edges in the denoiser's own time."
        )
    time = first_call(pipe, prompts[0] if prompts else "0", call_kwargs).time
    timesteps = [float(t) for t in torch.as_tensor(pipe.scheduler.timesteps).double()]
    if time is None or not timesteps:
        raise ValueError(
            f"step_policy: {type(pipe).__name__} must call its denoiser with a time, got none. "
            "Give edges in the denoiser's own time."
        )
    trained = float(getattr(pipe.scheduler.config, "num_train_timesteps", 1000))
    units = {"t": lambda t: t, "t / trained": lambda t: t / trained, "1 - t / trained": lambda t: 1 - t / trained}
    gaps = {name: abs(unit(timesteps[0]) - time) for name, unit in units.items()}
    best = min(gaps, key=lambda name: gaps[name])
    if gaps[best] > 0.01 * max(1.0, abs(time)):  # what bfloat16 may do to a time
        raise ValueError(
            f"step_policy: the denoiser's time must be the scheduler's timestep t, t / {trained:g} or 1 - t / {trained:g}, got "
            f"{time:g} for t = {timesteps[0]:g}. Give edges in the denoiser's own time."
        )
    return [units[best](t) for t in timesteps]


@torch.no_grad()
def first_call(pipe: Any, prompt: str, call_kwargs: Mapping[str, Any] | None = None) -> Call:
    """The first denoiser call of a run, which is not made. Raises ``ValueError`` for a pipeline that makes none, and for arguments
    that it does not name."""

    def stop(module: nn.Module, args: tuple) -> None:
        raise _First

    with ExitStack() as hooks, suppress(_First), _calls_of(pipe, prompt, call_kwargs, "first_call") as (calls, run):
        for part in denoisers(pipe).values():
            hooks.callback(part.register_forward_pre_hook(stop).remove)
        run()
    return calls[0]


@torch.no_grad()
def run_calls(pipe: Any, prompt: str, call_kwargs: Mapping[str, Any] | None = None) -> list[Call]:
    """All denoiser calls of a run, at the times and with the conditions that it makes them with, to the bit; their latents are not
    those of a run, since each denoiser computes once for calls of one shape and repeats that answer. Raises as ``first_call``."""
    with ExitStack() as stack, _calls_of(pipe, prompt, call_kwargs, "run_calls") as (calls, run):
        for part in denoisers(pipe).values():
            stack.enter_context(repeating(part))
        run()
    return calls


@contextmanager
def _calls_of(
    pipe: Any, prompt: str, call_kwargs: Mapping[str, Any] | None, where: str
) -> Iterator[tuple[list[Call], Callable[[], None]]]:
    """Denoiser calls that are captured while open, of which there must be one, and what runs the pipeline up to its latents."""
    check_call_names(pipe, call_kwargs or {}, f"{where}: call_kwargs")
    kwargs = call_arguments(pipe, call_kwargs) | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    with capturing(denoisers(pipe), lambda name, module, given: None) as calls:
        yield calls, lambda: pipe(**prompt_argument(pipe, [prompt], where), **kwargs)
    if not calls:
        raise ValueError(f"{where}: {type(pipe).__name__} must call its denoiser, got no call. Is it a pipeline that denoises?")


def time_at(times: Sequence[float], share: float) -> float:
    """The time at a share of a run: step i of n stands in the middle of i / n and (i + 1) / n, and time is linear between steps and
    beyond both ends."""
    if len(times) < 2:
        return times[0]
    position = share * len(times) - 0.5
    low = min(max(math.floor(position), 0), len(times) - 2)
    return times[low] + (times[low + 1] - times[low]) * (position - low)
