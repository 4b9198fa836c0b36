"""The noise level of the denoiser call in progress, for everything that depends on it.

Levels are cut into intervals. The edges between them are kept in the unit of the denoiser's own time argument (a training
timestep, sigma, or 1 - sigma), which is all that a call shows: no scheduler is needed, another number of steps or another scheduler
of the same kind changes nothing, and calls are never counted.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.calls import given_arguments, time_of
from dqtk.spec import ascends


class NoiseState:
    """Which interval the call in progress lies in. One object per denoiser, owned by a hook on it; layers hold references.

    edges: ascending, in the denoiser's time; n edges make n + 1 intervals, and a time at an edge lies above it.
    """

    def __init__(self, edges: Sequence[float]):
        """Raises ``ValueError`` for edges that are not finite and ascending."""
        self.edges = tuple(float(edge) for edge in edges)
        if not ascends(self.edges):
            raise ValueError(f"noise_levels: edges must be finite and ascending, got {list(self.edges)}. Calibrate again.")
        self._index: dict[torch.device, Tensor] = {}
        self._edges: dict[torch.device, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of intervals."""
        return len(self.edges) + 1

    def index(self, device: torch.device) -> Tensor:
        """int64 [1]: interval of the last call, 0 before the first. One tensor per device, whose content changes."""
        if device not in self._index:
            known = next(
                (kept for kept in self._index.values() if not kept.is_meta), None
            )  # a device that is asked about for the first time within a call
            with torch.inference_mode(False):
                self._index[device] = (
                    torch.zeros(1, dtype=torch.int64, device=device) if known is None else known.to(device, copy=True)
                )
        return self._index[device]

    def attach(self, module: nn.Module) -> Any:
        """Follow the calls of this denoiser from now on. Returns the hook's handle."""
        return module.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The hook. Raises ``ValueError`` for times that differ within a call, and for a call without a time."""
        time = time_of(given_arguments(module, args, kwargs))
        if time is None:
            raise ValueError(
                f"noise_levels: {type(module).__name__} must be called with a time, got none. Its layers depend on the noise level."
            )
        values = time.reshape(-1)
        if values.numel() > 1 and torch.compiler.is_compiling():
            torch._assert_async((values == values[0]).all(), "noise_levels: times must be equal within a call")
        elif values.numel() > 1 and not bool((values == values[0]).all()):
            raise ValueError(
                f"noise_levels: times must be equal within a call, got {values[:4].tolist()}. Per-token times are not supported."
            )
        for device in {*self._index, values.device}:
            if device not in self._edges:
                with torch.inference_mode(False):
                    self._edges[device] = torch.tensor(self.edges, dtype=torch.float32, device=device)
            found = torch.searchsorted(self._edges[device], values[:1].to(device, torch.float32), right=True)
            self.index(device).copy_(found)


def noise_states(module: nn.Module) -> list[NoiseState]:
    """The states that follow this denoiser's calls; one per set of edges."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, NoiseState)]


def following(module: nn.Module, edges: Sequence[float]) -> NoiseState:
    """The state with these edges that follows this denoiser's calls: the one that is there, or a new one."""
    found = next((state for state in noise_states(module) if state.edges == tuple(edges)), None)
    if found is None:
        found = NoiseState(edges)
        found.attach(module)
    return found


def forget(module: nn.Module) -> None:
    """Follow this denoiser's calls no more."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), NoiseState):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
