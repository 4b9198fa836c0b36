"""How pipelines and their denoisers are called: prompts or class labels, arguments a family needs, the time of a denoiser call."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .resolve import call_kwargs_for
from .sites import DENOISERS
from .spec import did_you_mean

TIME_NAMES = ("timestep", "timesteps", "t")


def call_arguments(pipe: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the pipeline's family needs, under what the caller gave.

    Raises ``ValueError`` for a name that looks like one of the pipeline's arguments: many take others, and say nothing.
    """
    known = list(inspect.signature(pipe.__call__).parameters)
    for name in given or {}:
        if name not in known and (near := did_you_mean(name, known, cutoff=0.85)):
            raise ValueError(f"call_kwargs: name must be an argument of {type(pipe).__name__}, got {name!r}.{near}")
    return call_kwargs_for(pipe) | dict(given or {})


def prompt_argument(pipe: Any, prompts: Sequence[str], where: str) -> dict[str, Any]:
    """``{"prompt": [...]}``, or ``{"class_labels": [...]}`` for a class-conditional pipeline (numbers or label names).

    Raises:
        ValueError: a pipeline that takes neither, or an unknown label.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters:
        return {"prompt": list(prompts)}
    if "class_labels" in parameters:
        return {"class_labels": [_class_label(pipe, prompt, where) for prompt in prompts]}
    raise ValueError(
        f"{where}: the pipeline must take 'prompt' or 'class_labels', got {type(pipe).__name__} with {sorted(parameters)}. "
        "Unconditional pipelines are not supported yet."
    )


def _class_label(pipe: Any, prompt: str, where: str) -> int:
    if prompt.strip().isdigit():
        return int(prompt)
    labels = getattr(pipe, "labels", None) or {}
    if prompt not in labels:
        raise ValueError(f"{where}: a class-conditional prompt must be a number or a known label, got {prompt!r}. Use '0', '1', ….")
    return int(labels[prompt])


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoising components by name: ``unet``, ``transformer``, and numbered ones such as ``transformer_2``."""
    return {name: part for name, part in pipe.components.items() if DENOISERS.fullmatch(name) and isinstance(part, nn.Module)}


def given_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those given by position first."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def time_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """The time that a denoiser was called with, as the caller gave it; None for one without time."""
    found = next((arguments[name] for name in TIME_NAMES if arguments.get(name) is not None), None)
    return None if found is None else torch.as_tensor(found)
