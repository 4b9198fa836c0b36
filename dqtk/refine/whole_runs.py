"""The loss of whole runs: how far the student's final latents are from the original's, from the same noise, with gradients.

What a student does wrong in one step it meets again in the next, and what is wrong alike in all of them adds up along a run. A mean
over calls of the original's trajectory sees neither (the lab log). So the pipeline itself runs with the student in it and is
differentiated: denoiser, guidance and scheduler as the user has them, for any of them. Back-propagation through sampling is known
from reward fine-tuning (DRaFT, Clark et al. 2023, arXiv 2309.17400); the reward here is to paint what the original paints.

Every stored weight is made once per run, not once per call. Text encoders are passed by, and so are calls of another denoiser (an
expert of other noise levels): gradients reach the student around them, through the scheduler.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dqtk.calls import denoisers, final_latents, given_arguments, time_of
from dqtk.checkpoint import quantized_layers
from dqtk.nn.products import Stored
from dqtk.spec import WholeRuns

from .judge import LEAST, Painter


class Runs:
    """Runs of a pipeline, and the final latents that it had when this was made."""

    def __init__(self, pipe: Any, choice: WholeRuns, call_kwargs: Mapping[str, Any] | None):
        """``pipe``: not yet quantized. Raises ``ValueError`` as ``Painter``."""
        self.pipe, self.choice, self.call_kwargs = pipe, choice, call_kwargs
        steps: set[float] = set()
        with ExitStack() as hooks:
            for part in denoisers(pipe).values():
                hooks.callback(part.register_forward_pre_hook(_times_into(steps), with_kwargs=True).remove)
            self.exact = Painter(pipe, choice, call_kwargs).exact
        self.num_steps = len(steps)

    def __len__(self) -> int:
        return len(self.choice.prompts)

    def loss(self, index: int, module: nn.Module) -> Tensor:
        """Natural logarithm [] of the mean squared error of final latents, as the exact ones' share, with gradients of a denoiser
        of the pipeline.

        Raises ``ValueError`` for a pipeline that cannot be differentiated.
        """
        choice, exact = self.choice, self.exact[index]
        skipped = 0 if choice.last is None else self.num_steps - choice.last
        with _differentiated(self.pipe, module, skipped, choice.recompute):
            made = final_latents(
                self.pipe, [choice.prompts[index]], choice.seed + index, self.call_kwargs, "refine", gradients=True
            )
        if torch.is_grad_enabled() and not made.requires_grad:
            raise ValueError(
                f"refine: runs must be None for {type(self.pipe).__name__}, whose final latents carry no gradient of "
                f"{type(module).__name__}. Learn from calls."
            )
        return ((made - exact).square().sum() / exact.square().sum()).clamp(min=LEAST).log()


def _times_into(steps: set[float]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        steps.add(_time(module, args, kwargs))

    return hook


def _time(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> float:
    """The time of a call, of its first row. Raises ``ValueError`` for a denoiser without one."""
    time = time_of(given_arguments(module, args, kwargs))
    if time is None:
        raise ValueError(
            f"refine: runs must be None for {type(module).__name__}, which is called without a time. Learn from calls."
        )
    return float(time.flatten()[0])


@contextmanager
def _differentiated(pipe: Any, module: nn.Module, skipped: int, recompute: bool) -> Iterator[None]:
    """While open, calls of the denoiser record gradients, those of the first steps and all other networks none."""
    forward, weights, seen = module.forward, _weights(module), set()

    def once(*args: Any, **kwargs: Any) -> Any:
        with _served(weights):
            return forward(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        seen.add(_time(module, args, kwargs))
        if len(seen) <= skipped:
            with torch.no_grad():
                return once(*args, **kwargs)
        return checkpoint(once, *args, use_reentrant=False, **kwargs) if recompute else once(*args, **kwargs)

    mine = set(module.parameters())
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not module]
    passed = [p for part in networks for p in part.parameters() if p.requires_grad and p not in mine]
    others = [part for part in denoisers(pipe).values() if part is not module]
    for parameter in passed:
        parameter.requires_grad_(False)
    try:
        with ExitStack() as swaps:
            swaps.enter_context(_calling(module, call))
            for part in others:
                swaps.enter_context(_calling(part, torch.no_grad()(part.forward)))
            yield
    finally:
        for parameter in passed:
            parameter.requires_grad_(True)


@contextmanager
def _calling(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, a module computes with this; whoever had replaced its ``forward`` before finds it as it was."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _weights(module: nn.Module) -> dict[Stored, Tensor]:
    """Of all that learns in the denoiser: what it stands for now."""
    stored: Sequence[Any] = [part for layer in quantized_layers(module).values() for part in (layer.parts or (layer,))]
    return {part: part.learned() for part in stored if part.learned is not None}


@contextmanager
def _served(weights: Mapping[Stored, Tensor]) -> Iterator[None]:
    """While open, weights are not made anew."""
    made = {part: part.learned for part in weights}
    for part, weight in weights.items():
        vars(part)["learned"] = lambda weight=weight: weight
    try:
        yield
    finally:
        for part, learned in made.items():
            vars(part)["learned"] = learned
