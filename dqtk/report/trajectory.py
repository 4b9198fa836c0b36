"""How far the denoiser's output drifts, step by step: along its own trajectory, and fed the original's inputs.

Two questions, two curves. *Own trajectory*: both pipelines run freely from the same noise; the gap at step s holds the error of
step s and everything before it, which is what the picture suffers. *Same inputs*: the original's recorded inputs of step s go
through the candidate's denoiser; that is the error which quantization makes at this noise level alone, and what a per-step
remedy can act on.

Outputs are compared as the denoiser returns them, both guidance halves and any variance channels included. A step is a run of
consecutive calls with one timestep, so that guidance by two calls counts as one step; calls without a timestep are a step each.
Hooks live inside ``recorded``: nothing stays on the modules, whatever happens in between.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import denoisers, given_arguments, time_of

from .scores import pair_sums


class TrajectoryMismatch(ValueError):
    """The two pipelines' denoiser calls cannot be paired; own-trajectory errors are then reported as not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One denoiser call: which component, its inputs (empty unless asked for) as the caller gave them, and its output tensor."""

    component: str
    timestep: float | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSums:
    """Per step: its timestep and the ``PairSums`` over the images of a batch."""

    timesteps: tuple[float | None, ...]
    sums: tuple[Any, ...]

    def concatenated(self, other: "StepSums") -> "StepSums":
        """Both batches' images. Raises ``TrajectoryMismatch`` where the batches took different numbers of steps."""
        if len(self.sums) != len(other.sums):
            raise TrajectoryMismatch(f"one batch took {len(self.sums)} steps and another {len(other.sums)}")
        sums = tuple(a.concatenated(b) for a, b in zip(self.sums, other.sums, strict=True))
        return StepSums(timesteps=self.timesteps, sums=sums)


@contextmanager
def recorded(pipe: Any, *, inputs: bool) -> Iterator[list[Call]]:
    """Record every denoiser call made inside, in order; with ``inputs`` what it was given too (copies, shared while unchanged)."""
    calls: list[Call] = []
    handles = []
    snapshot = _Snapshots()
    pending: list[tuple[float | None, tuple, dict]] = []

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kept = (snapshot(args), snapshot(kwargs)) if inputs else ((), {})
        pending.append((_timestep(module, args, kwargs), *kept))

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            timestep, kept_args, kept_kwargs = pending.pop()
            tensor = first_tensor(output).detach().clone()
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"compare: outputs of {name} ({type(module).__name__}) must be finite, got NaN or infinity at timestep "
                    f"{timestep}. The model is damaged, or overflows in this dtype."
                )
            calls.append(Call(component=name, timestep=timestep, args=kept_args, kwargs=kept_kwargs, output=tensor))

        return hook

    try:
        for name, module in denoisers(pipe).items():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def own_trajectory(reference: Sequence[Call], candidate: Sequence[Call], num_images: int) -> StepSums:
    """Sums of the free-running outputs. Raises ``TrajectoryMismatch`` where calls differ in number, component or shape."""
    if [(c.component, c.output.shape) for c in reference] != [(c.component, c.output.shape) for c in candidate]:
        raise TrajectoryMismatch(
            f"the reference made {len(reference)} denoiser calls and the candidate {len(candidate)}, "
            "not all of the same component and shape"
        )
    return _sums(reference, [call.output for call in candidate], num_images)


@torch.no_grad()
def same_inputs(pipe: Any, reference: Sequence[Call], num_images: int) -> StepSums:
    """Sums of ``pipe``'s denoiser on the recorded inputs of ``reference``, each call by itself.

    Inputs move to the denoiser's device; tensors of the reference's compute dtype with at least two axes are cast to its own
    (the timestep is not: 999 is 1000 in bf16). Raises ``TrajectoryMismatch`` where ``pipe`` lacks a component.
    """
    modules = denoisers(pipe)
    outputs = []
    for call in reference:
        if call.component not in modules:
            raise TrajectoryMismatch(f"the candidate has no component {call.component!r}")
        module = modules[call.component]
        place = _Placed(source=call.output.dtype, target=compute_dtype(module), device=_device(pipe, module))
        kwargs = {k: v if k == "timestep" else place(v) for k, v in call.kwargs.items()}
        if isinstance(kwargs.get("timestep"), Tensor):
            kwargs["timestep"] = kwargs["timestep"].to(place.device)
        try:
            outputs.append(first_tensor(module(*place(call.args), **kwargs)).detach())
        except (RuntimeError, ValueError, TypeError) as error:
            said = " ".join(str(error).split())[:200]
            raise TrajectoryMismatch(f"the candidate's {call.component} does not take the original's inputs: {said}") from error
    return _sums(reference, outputs, num_images)


def first_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returns: a tensor, a tuple that begins with one, or an output with ``sample``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return first_tensor(output[0])
    return output.sample


def _sums(reference: Sequence[Call], outputs: Sequence[Tensor], num_images: int) -> StepSums:
    timesteps: list[float | None] = []
    sums: list[Any] = []
    for call, output in zip(reference, outputs, strict=True):
        rows = call.output.shape[0]
        if rows % num_images:
            raise TrajectoryMismatch(f"{rows} denoiser rows are not a multiple of the {num_images} images in the batch")
        new = pair_sums(output, call.output.to(output.device), num_images)
        if sums and call.timestep is not None and call.timestep == timesteps[-1]:
            sums[-1] = sums[-1] + new
        else:
            timesteps.append(call.timestep)
            sums.append(new)
    return StepSums(timesteps=tuple(timesteps), sums=tuple(sums))


class _Snapshots:
    """Copies nested inputs; a tensor object seen before and not written to since (text embeddings) is copied once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, int, Tensor]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy(value)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(self(part) for part in value)
        if isinstance(value, list):
            return [self(part) for part in value]
        if isinstance(value, dict):
            return {key: self(part) for key, part in value.items()}
        return value

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.is_inference():  # these keep no version to tell a write by
            return tensor.detach().clone()
        kept = self._seen.get(id(tensor))
        if kept is None or kept[1] != tensor._version:
            # The original is held too: its id must not be given to another tensor meanwhile.
            kept = (tensor, tensor._version, tensor.detach().clone())
            self._seen[id(tensor)] = kept
        return kept[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placed:
    """Moves nested inputs to a device, and those of dtype ``source`` with two or more axes to ``target``."""

    source: torch.dtype
    target: torch.dtype
    device: torch.device

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            cast = value.ndim >= 2 and value.dtype == self.source
            return value.to(device=self.device, dtype=self.target if cast else value.dtype)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(self(part) for part in value)
        if isinstance(value, list):
            return [self(part) for part in value]
        if isinstance(value, dict):
            return {key: self(part) for key, part in value.items()}
        return value


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a model says it computes in, else that of its first floating parameter."""
    dtype = getattr(module, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _device(pipe: Any, module: nn.Module) -> torch.device:
    device = getattr(pipe, "_execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _timestep(module: nn.Module, args: tuple, kwargs: dict) -> float | None:
    """The time of a call as one number; that of the first sample where they differ."""
    time = time_of(given_arguments(module, args, kwargs))
    return None if time is None else float(time.flatten()[0])
