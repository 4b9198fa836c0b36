"""Which of a layer's specs serves the denoiser call in progress (``spec.ByLevel``): chosen on the host, once per call.

The choice is a Python value and not a tensor, because other specs run other kernels. So the hook waits for the call's time where
that lies on a GPU (one wait per call, only for models with a step policy), and a compiled layer or block has one graph per kind
of interval. The time alone decides: separate calls for the halves of guidance, another number of steps or another scheduler of the
same kind change nothing.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dqtk.calls import given_arguments, time_of
from dqtk.spec import ByLevel, SiteSpec, ascends

from .eager import outside_graphs


class StepState:
    """One object per denoiser and policy, owned by a hook on it; layers hold references.

    edges: ascending, in the denoiser's time; a time at an edge lies above it. kinds: which spec serves each interval, by number.
    """

    def __init__(self, edges: Sequence[float], kinds: Sequence[int]):
        """Raises ``ValueError`` for edges that are not finite and ascending."""
        self.edges, self.kinds = tuple(float(edge) for edge in edges), tuple(kinds)
        assert len(self.kinds) == len(self.edges) + 1
        if not ascends(self.edges):
            raise ValueError(f"step_policy: edges must be finite and ascending, got {list(self.edges)}. Quantize again.")
        # A text: compilers make a number that changes into a variable, which could choose no kernel.
        self.kind = "0"
        outside_graphs(StepState, "see")

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The hook. Raises ``ValueError`` for times that differ within a call, and for a call without a time."""
        time = time_of(given_arguments(module, args, kwargs))
        if time is None:
            raise ValueError(
                f"step_policy: {type(module).__name__} must be called with a time, got none. Its layers depend on the noise level."
            )
        values = time.detach().reshape(-1).tolist()
        if any(value != values[0] for value in values):
            raise ValueError(
                f"step_policy: times must be equal within a call, got {values[:4]}. Per-token times are not supported."
            )
        self.kind = str(self.kinds[bisect_right(self.edges, values[0])])


def step_states(module: nn.Module) -> list[StepState]:
    """The states that choose by this denoiser's calls; one per policy."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, StepState)]


def choosing(module: nn.Module, spec: ByLevel) -> StepState:
    """The state that follows this denoiser's calls with these intervals: the one that is there, or a new one.

    Raises ``ValueError`` for intervals that are not known in the denoiser's own time.
    """
    if not spec.edges:
        raise ValueError(
            f"step_policy: edges must be known in the denoiser's own time, got shares {list(spec.shares)} only. "
            "Quantize the pipeline."
        )
    edges, kinds = spec.ascending
    found = next((state for state in step_states(module) if (state.edges, state.kinds) == (edges, kinds)), None)
    if found is None:
        found = StepState(edges, kinds)
        module.register_forward_pre_hook(found.see, with_kwargs=True)
    return found


def forget_steps(module: nn.Module) -> None:
    """Follow this denoiser's calls no more."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), StepState):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def first_last_policy(specs: Iterable[SiteSpec], scope: str) -> dict[str, Any] | None:
    """A model's policy under the ecosystem's key ``runtime.diffusion_step_policy`` (schema 1, ``first_last_n``), or None.

    That schema counts steps, and knows one alternative: the weights that are there anyway with 16-bit inputs, at the beginning and
    at the end of a run. So it is written where a policy is just that, with the counts of the run that its edges were found with; it
    is for engines that read it, dqtk goes by edges.

    Args:
        specs: of a denoiser's layers.
        scope: "transformer" or "unet".
    """
    policies = {(spec.shares, spec.num_steps, _modes(spec)) for spec in specs if isinstance(spec, ByLevel)}
    if len(policies) != 1:
        return None
    shares, num_steps, modes = policies.pop()
    if modes is None or num_steps is None or not shares or "a16" in modes[1:-1]:
        return None
    middles = [(i + 0.5) / num_steps for i in range(num_steps)]
    first = sum(middle <= shares[0] for middle in middles) if modes[0] == "a16" else 0
    last = sum(middle > shares[-1] for middle in middles) if modes[-1] == "a16" else 0
    return {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "scope": [scope],
        "default_mode": "native",
        "first_steps": {"count": first, "mode": "a16"},
        "last_steps": {"count": last, "mode": "a16"},
        "overlap": "a16",
    }


def _modes(spec: ByLevel) -> tuple[str, ...] | None:
    """ "a16" or "native" of every interval; None for other policies."""
    if len(spec.kinds) != 2 or len(spec.weights) != 1 or all(part.input is not None for part in spec.kinds):
        return None
    return tuple("a16" if part.input is None else "native" for part in spec.specs)
