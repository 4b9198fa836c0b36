"""Step policies: precision by interval of the noise level, as intent (``StepPolicy``) and made part of a plan.

Plans of single recipes are laid over each other: a site whose specs differ between intervals gets a ``spec.ByLevel``. Users say
intervals as shares of a run, 0 at its beginning (most noise) and 1 at its end; they become times of the denoiser when the model is
quantized, and from then on neither steps nor calls are counted. (Precision per step: PTQD, He et al. 2023, arXiv 2305.10657,
section 3.4, there by a signal-to-noise ratio; W4A16 at the ends of a run: a convention of serving engines in 2026.)
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from .calibrate.schedule import run_times, time_at
from .calls import check_call_names
from .plan import Choice, Plan, Recipe
from .spec import ByLevel, ConstantToken, LayerSpec, SiteSpec, frozen, kinds_of, without


@frozen
class Interval:
    """A part of a run, as shares of it, with another recipe; None: the plan's own weights with inputs in 16 bits."""

    begin: float
    end: float
    recipe: str | Recipe | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(
                f"Interval: begin and end must be shares of a run, 0 <= begin < end <= 1, got {self.begin!r} and {self.end!r}. "
                "The first tenth is Interval(begin=0, end=0.1)."
            )


@frozen
class StepPolicy:
    """Intervals of a run with another precision than the plan's, in the order of the run and apart from each other."""

    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        if not self.intervals:
            raise ValueError("StepPolicy: intervals must be at least one, got none. Leave the policy out.")
        if any(a.end > b.begin for a, b in pairwise(self.intervals)):
            raise ValueError(
                "StepPolicy: intervals must follow each other, got "
                f"{', '.join(f'{part.begin:g}-{part.end:g}' for part in self.intervals)}. Sort and part them."
            )


def protecting(intervals: Sequence[tuple[float, float]], recipe: str | Recipe | None = None) -> StepPolicy:
    """The policy that gives these intervals (begin, end) one recipe, or inputs in 16 bits; neighbours are joined."""
    if any(not isinstance(interval, Sequence) or len(interval) != 2 for interval in intervals):
        raise ValueError(f"protecting: intervals must be pairs (begin, end), got {intervals!r}. One is [(0, 0.1)].")
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1] + 1e-9:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return StepPolicy(intervals=tuple(Interval(begin=begin, end=end, recipe=recipe) for begin, end in joined))


def combined(main: Plan, parts: Sequence[tuple[Interval, Plan | None]]) -> Plan:
    """A plan that follows ``main`` outside the intervals and their plans inside; None: ``main`` with inputs in 16 bits.

    A site that one of the plans keeps at 16 bits stays so throughout. Raises ``ValueError`` for plans of different sites.
    """
    if any(plan is not None and plan.attention for _, plan in parts):
        raise ValueError(
            "policy: recipes of intervals must leave attention alone, got one that does not. Attention is the same in the whole "
            "run; its masks follow the noise level by themselves."
        )
    intervals = []
    for interval, plan in parts:
        specs = None if plan is None else {choice.site.id: choice.spec for choice in plan.choices}
        if specs is not None and list(specs) != [choice.site.id for choice in main.choices]:
            raise ValueError("policy: plans of intervals must have the sites of the main plan, got others. Plan the same model.")
        intervals.append((interval, specs))
    recipe = ", ".join([main.recipe, *(f"{plan.recipe if plan else '16-bit inputs'} {span(i.begin, i.end)}" for i, plan in parts)])
    choices = []
    for choice in main.choices:
        try:
            choices.append(_combined(choice, intervals))
        except ValueError as error:
            raise ValueError(f"policy: {choice.site.id} of {recipe}: {error}") from error
    return replace(main, recipe=recipe, choices=tuple(choices))


def span(begin: float, end: float) -> str:
    """``in 0 to 10 % of a run``."""
    return f"in {100 * begin:g} to {100 * end:g} % of a run"


def _combined(choice: Choice, intervals: Sequence[tuple[Interval, Mapping[str, SiteSpec | None] | None]]) -> Choice:
    """One site of the main plan, with the specs by site of every interval; None: the main plan's with inputs in 16 bits."""
    inside = [choice.spec if specs is None else specs[choice.site.id] for _, specs in intervals]
    if choice.spec is None:
        return choice
    if None in inside:
        return replace(choice, spec=None, why="kept: 16 bits in a part of the run")
    main = _one(choice.spec)
    pieces: list[tuple[float, LayerSpec]] = []  # where each begins
    position = 0.0
    for (interval, specs), spec in zip(intervals, inside, strict=True):
        if interval.begin > position:
            pieces.append((position, main))
        pieces.append((interval.begin, replace(main, input=None) if specs is None else _one(spec)))
        position = interval.end
    if position < 1:
        pieces.append((position, main))
    bare = [(begin, without(spec, ConstantToken)) for begin, spec in pieces]  # layers of several specs do not look for it
    kept = [piece for i, piece in enumerate(bare) if not i or piece[1] != bare[i - 1][1]]
    if len(kept) == 1:
        return replace(choice, spec=main if main in [spec for _, spec in pieces] else pieces[0][1])
    spec = ByLevel(specs=tuple(spec for _, spec in kept), shares=tuple(begin for begin, _ in kept[1:]))
    note = "step policy" if bare == pieces else "step policy, so no constant token"
    return replace(choice, spec=spec, why=f"{choice.why}; {note}")


def _one(spec: SiteSpec | None) -> LayerSpec:
    if not isinstance(spec, LayerSpec):
        raise ValueError("specs must be one for each plan, got a policy already. Combine plain recipes.")
    return spec


def fixed(plan: Plan, pipe: Any, prompts: Sequence[str] | None = None, call_kwargs: Mapping[str, Any] | None = None) -> Plan:
    """The plan with the intervals of its policies in the denoiser's own time, found with ``run_times``, whose errors it raises.

    ``quantize`` does so by itself; a plan that is to be streamed, or carried out on a bare denoiser, needs it before.
    """
    return replace(plan, choices=tuple(fixed_choices(plan.choices, pipe, prompts, call_kwargs)))


def fixed_choices(
    choices: Sequence[Choice], pipe: Any, prompts: Sequence[str] | None = None, call_kwargs: Mapping[str, Any] | None = None
) -> list[Choice]:
    """The same for choices."""
    if not any(isinstance(choice.spec, ByLevel) and not choice.spec.edges for choice in choices):
        return list(choices)
    check_call_names(pipe, call_kwargs or {}, "step_policy: call_kwargs")
    times = run_times(pipe, prompts, call_kwargs)
    if len(times) < 2 or times[0] == times[-1]:
        raise ValueError(f"step_policy: a run must have at least two steps, got times {times}. Take more steps or no policy.")
    for shares in {choice.spec.shares for choice in choices if isinstance(choice.spec, ByLevel) and not choice.spec.edges}:
        _warn_of_empty(shares, len(times))

    def with_edges(spec: SiteSpec | None) -> SiteSpec | None:
        if not isinstance(spec, ByLevel) or spec.edges:
            return spec
        edges = tuple(time_at(times, share) for share in spec.shares)
        return replace(spec, edges=edges, rising=times[-1] > times[0], num_steps=len(times))

    return [replace(choice, spec=with_edges(choice.spec)) for choice in choices]


def _warn_of_empty(shares: Sequence[float], num_steps: int) -> None:
    """Warns (``UserWarning``) of intervals that hold the middle of no step."""
    middles = [(step + 0.5) / num_steps for step in range(num_steps)]
    for begin, end in pairwise((0.0, *shares, 1.0)):
        if not any(begin < middle <= end for middle in middles):
            warnings.warn(
                f"step_policy: no step of {num_steps} lies {span(begin, end)}: step i, from 0, lies at (i + 0.5) / {num_steps}. "
                "Widen it, or quantize with the number of steps of later use: call_kwargs={'num_inference_steps': ...}, --steps in "
                "the shell.",
                stacklevel=4,
            )


def has_policy(plan: Plan) -> bool:
    """Whether the noise level decides about some site."""
    return any(len(kinds_of(choice.spec)) > 1 for choice in plan.choices)
