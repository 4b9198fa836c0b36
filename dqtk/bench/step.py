"""One step of a denoiser, recorded from a real pipeline call and made again by itself."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dqtk.calibrate.replay import capturing
from dqtk.calls import call_arguments, denoisers, prompt_argument, time_of
from dqtk.costs import LayerShape, shape_of

from .timing import stopwatch, waiter

PROMPT = "a lighthouse on a cliff at dusk, oil painting"
LABEL = "0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a pipeline asks of its denoiser at one noise level.

    component: its name. module: the denoiser. calls: arguments by name, of one call, or of two where the halves of guidance are
    separate. batch: pictures or clips. asked: height, width and num_frames as given.
    """

    component: str
    module: nn.Module
    calls: tuple[Mapping[str, Any], ...]
    batch: int
    asked: dict[str, int]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of most weights (Wan keeps a few in float32): floating arguments of it follow a variant that is made in another."""
        numbers = Counter[torch.dtype]()
        for p in self.module.parameters():
            numbers[p.dtype] += p.numel() if p.is_floating_point() else 0
        return numbers.most_common(1)[0][0]

    def runner(self, module: Callable[..., Any], dtype: torch.dtype | None = None) -> Callable[[], list[Any]]:
        """The step of a variant of the module, which computes in ``dtype``; it returns what the calls return."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to(self.device)
            return value.to(dtype) if dtype is not None and value.dtype == self.dtype else value

        calls = [tree_map(moved, dict(call)) for call in self.calls]

        def run() -> list[Any]:
            with torch.no_grad():
                return [module(**call) for call in calls]

        return run


class _NextStep(Exception):
    """The pipeline has come to its second noise level."""


def record_step(
    pipe: Any, *, height: int | None = None, width: int | None = None, num_frames: int | None = None, batch: int = 1
) -> Step:
    """Call a pipeline as a user would, and keep the denoiser calls of its first step; nothing is painted.

    Args:
        pipe: diffusers pipeline.
        height, width: pixels; None: the pipeline's own.
        num_frames: of a video pipeline.
        batch: pictures or clips at once; guidance doubles what the denoiser sees.
    Raises:
        ValueError: a size that the pipeline does not take, or a pipeline whose denoiser is not called.
    """
    asked = {name: value for name, value in (("height", height), ("width", width), ("num_frames", num_frames)) if value is not None}
    parameters = inspect.signature(pipe.__call__).parameters
    for name in asked:
        if name not in parameters:
            raise ValueError(f"bench: {name} must be left out for {type(pipe).__name__}, got {asked[name]}. Its size is its own.")
    times: list[float | None] = []

    def watch(name: str, module: nn.Module, given: Mapping[str, Any]) -> None:
        time = time_of(given)
        here = None if time is None else float(time.detach().float().reshape(-1)[0])
        if times and (here is None or here != times[0]):
            raise _NextStep
        times.append(here)

    prompts = [PROMPT if "prompt" in parameters else LABEL] * batch
    generators = [torch.Generator().manual_seed(i) for i in range(batch)]
    kwargs = call_arguments(pipe, asked) | {"output_type": "latent"}
    parts = denoisers(pipe)
    with capturing(parts, watch) as calls, torch.no_grad(), suppress(_NextStep):
        pipe(**prompt_argument(pipe, prompts, "bench"), generator=generators, **kwargs)
    if not calls:
        raise ValueError(f"bench: {type(pipe).__name__} must call one of {sorted(parts)}, got no call. Is it a diffusers pipeline?")
    component = calls[0].component
    mine = tuple(call.kwargs for call in calls if call.component == component)
    return Step(component=component, module=parts[component], calls=mine, batch=batch, asked=asked)


# --- where the time goes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Seconds of one step, and of every call of the watched layers in it, with the shapes of their inputs."""

    seconds: float
    layers: dict[str, list[tuple[float, LayerShape]]] = field(default_factory=dict)

    @property
    def inside(self) -> float:
        """Seconds in the watched layers."""
        return math.fsum(seconds for calls in self.layers.values() for seconds, _ in calls)

    @property
    def outside(self) -> float:
        """Share of the step that is not in the watched layers, 0 to 1."""
        return max(0.0, 1 - self.inside / self.seconds)


def profile(module: nn.Module, run: Callable[[], object], paths: Iterable[str], device: torch.device) -> Profile:
    """One step with a mark before and behind every call of the layers at ``paths``. Marks cost microseconds, so a step that is
    profiled is not one that is timed."""
    mark, seconds = stopwatch(device)
    wait, started = waiter(device), {}  # type: ignore[var-annotated]
    seen: list[tuple[str, Any, Any, LayerShape]] = []

    def before(path: str) -> Callable:
        def hook(layer: nn.Module, args: tuple) -> None:
            started[path] = mark()

        return hook

    def behind(path: str) -> Callable:
        def hook(layer: nn.Module, args: tuple, output: Any) -> None:
            seen.append((path, started[path], mark(), shape_of(layer, args[0])))

        return hook

    with ExitStack() as hooks:
        for path in paths:
            layer = module.get_submodule(path)
            hooks.callback(layer.register_forward_pre_hook(before(path)).remove)
            hooks.callback(layer.register_forward_hook(behind(path)).remove)
        wait()
        start = mark()
        run()
        end = mark()
        wait()
    layers: dict[str, list[tuple[float, LayerShape]]] = {}
    for path, first, last, shape in seen:
        layers.setdefault(path, []).append((seconds(first, last), shape))
    return Profile(seconds=seconds(start, end), layers=layers)
