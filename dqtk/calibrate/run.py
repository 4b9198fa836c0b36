"""The verb ``calibrate``: run the pipeline on prompts and keep what its layers saw."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dqtk.calls import call_arguments, check_call_names, prompt_argument
from dqtk.checkpoint import digest
from dqtk.fit import check_fit
from dqtk.plan import Plan
from dqtk.sites import DENOISERS, components_of, find_sites
from dqtk.spec import SiteSpec

from .guidance import branched
from .levels import at_level
from .placement import Evenly, Placement
from .record import level_of, recording
from .replay import Call, capturing, kept
from .stats import Stats


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    plan: Plan,
    *,
    seed: int = 0,
    batch_size: int = 4,
    call_kwargs: Mapping[str, Any] | None = None,
    steps_per_run: int = 10,
    placement: Placement = Evenly(),  # noqa: B008, frozen
    keep_calls: bool = False,
    output: str | Path | None = None,
    progress: bool = True,
) -> Stats:
    """Input statistics of the sites whose specs need them.

    Args:
        pipe: diffusers pipeline, not yet quantized.
        prompts: at least one; used in order.
        plan: decides which sites are watched. A plan that needs no statistics returns empty ones at once.
        seed: prompt i starts from generator seed + i.
        batch_size: prompts per call.
        call_kwargs: passed to the pipeline, for example ``{"num_inference_steps": 20}``, over what its family needs.
        steps_per_run: steps of every pipeline run whose calls are kept for solvers that learn from inputs (GPTQ, smoothing, ...).
        placement: which steps these are; see ``calibrate.placement``.
        keep_calls: keep calls of all denoisers too, whether or not a layer learns from them: output correction does.
        output: file that is written after every batch and continued from if it exists. It knows its prompts, seed, arguments and
            sites; prompts may be added at the end.
        progress: show a bar.
    Returns:
        Statistics over all steps of all prompts, both guidance branches.
    Raises:
        ValueError: no prompts, a target that is not a pipeline, or an ``output`` that belongs to another run.
    """
    for name, value in (("batch_size", batch_size), ("steps_per_run", steps_per_run)):
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"calibrate: {name} must be a positive integer, got {value!r}. The defaults are 4 and 10.")
    if isinstance(placement, type) or not hasattr(placement, "choose"):
        raise ValueError(f"calibrate: placement must be one of calibrate.placement, such as Evenly(), got {placement!r}.")
    if not isinstance(plan, Plan):
        raise ValueError(f"calibrate: plan must be a Plan, got {plan!r}. Make one: dqtk.plan(pipe, 'w4a8').")
    check_fit(plan, components_of(pipe), "calibrate")
    if not (plan.needs_stats or keep_calls):
        return Stats()
    _check_call(pipe, prompts)
    sites = [c.site for c in plan.choices if c.spec is not None and c.spec.needs_ranges]
    learning = {c.site.component for c in plan.choices if c.spec is not None and c.spec.needs_inputs}
    learning |= {c.site.component for c in plan.attention if c.spec is not None and c.spec.needs_stats}
    if keep_calls:
        learning |= {c.name for c in plan.components if DENOISERS.fullmatch(c.name)}
    replayed = {name: part for name, part in components_of(pipe).items() if name in learning}
    stats = Stats.load(output) if output is not None and Path(output).exists() else Stats()
    kwargs = call_arguments(pipe, call_kwargs)
    check_call_names(pipe, kwargs, "calibrate: call_kwargs")
    steps = _steps(steps_per_run, placement)
    facts = {"seed": str(seed), "batch_size": str(batch_size)} | ({"keep_calls": steps} if keep_calls else {})
    run = _identity(pipe, plan, prompts, facts, kwargs, steps)
    if stats.num_prompts:
        _check_same_run(stats, run, output)
    starts = range(stats.num_prompts, len(prompts), batch_size)
    for start in tqdm(starts, desc="calibrate", disable=not progress):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        level = partial(_level, pipe)
        with recording(pipe, sites, stats, len(batch)), capturing(replayed, level) as calls, torch.no_grad():
            pipe(**prompt_argument(pipe, batch, "prompts"), generator=generators, **(kwargs | {"output_type": "latent"}))
        _check_calls(calls)
        calls = branched(calls, replayed, len(batch))
        stats.calls += kept(calls, steps_per_run, 1 + max((call.run for call in stats.calls), default=-1), placement)
        stats.num_prompts += len(batch)
        stats.run = run(stats.num_prompts)
        if output is not None:
            stats.save(output)
    return stats


def _check_calls(calls: Sequence[Call]) -> None:
    """Raises ``ValueError`` that names the argument and the noise level of a call with NaN (masks may hold infinities)."""
    for call in calls:
        for name, value in call.kwargs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                raise ValueError(
                    f"calibrate: {name} of {call.component} must be numbers, got NaN{at_level(call.level)}. "
                    "The weights of what computes it may be damaged, or overflow in this dtype."
                )


def _level(pipe: Any, name: str, module: nn.Module, given: Mapping[str, Any]) -> float | None:
    """Noise level of a denoiser's call; a denoiser without a time counts as level 0. None for text encoders."""
    return (level_of(pipe, module, given) or 0.0) if DENOISERS.fullmatch(name) else None


def _check_call(pipe: Any, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise ValueError(f"calibrate: prompts must be a list of texts, got one text {prompts!r}. Put it in a list.")
    if not prompts:
        raise ValueError(
            "calibrate: prompts must hold at least one prompt, got none. Pass a list or a file with one prompt per line."
        )
    if isinstance(pipe, nn.Module):
        raise ValueError(
            f"calibrate: pipe must be a pipeline that can be called with prompts, got {type(pipe).__name__}. "
            "Pass the pipeline that the model is part of."
        )


def fingerprint(target: Any, plan: Plan) -> dict[str, str]:
    """Component -> digest of some numbers of all its weights: tells models apart, whatever float dtype they are loaded in.

    Of the components of which the plan needs statistics.
    """
    parts, found = components_of(target), {}
    for name in sorted({c.site.component for c in plan.decisions if c.spec is not None and c.spec.needs_stats}):
        weights: list[Any] = [parts[name].get_submodule(site.path).weight for site in find_sites(parts[name], name)]
        some = [weight.detach().flatten()[:: max(1, weight.numel() // 61)].bfloat16().cpu() for weight in weights]
        found[name] = digest(torch.cat(some))
    return found


def check_model(stats: Stats, target: Any, plan: Plan) -> None:
    """Raises ``ValueError`` where statistics come from another model than the plan's."""
    known = json.loads(stats.run.get("model", "{}"))
    for name, mine in fingerprint(target, plan).items():
        if known.get(name, mine) != mine:
            raise ValueError(
                f"quantize: stats of {name} must come from this model, got those of other weights. Calibrate this one."
            )


def _identity(
    pipe: Any, plan: Plan, prompts: Sequence[str], facts: Mapping[str, str], kwargs: Mapping[str, Any], steps: str
) -> Callable[[int], dict[str, str]]:
    """Number of prompts seen -> what statistics of them depend on, in words."""
    sites = sorted(c.site.id + _kept(c.spec, steps) for c in plan.choices if c.spec is not None and c.spec.needs_stats)
    sites += sorted(f"{c.site.id}, calls of {steps}" for c in plan.attention if c.spec is not None and c.spec.needs_stats)
    fixed = {
        "sites": f"{len(sites)} sites, {_short(sites)}",
        "model": json.dumps(fingerprint(pipe, plan)),
        **facts,
        "call_kwargs": json.dumps({name: repr(value) for name, value in sorted(kwargs.items())}),
    }
    return lambda num: fixed | {"prompts": f"{num} prompts, {_short(prompts[:num])}"}


def _steps(num: int, placement: Placement) -> str:
    """Which steps are kept, in words; those of old files are even."""
    return f"{num} steps" if placement == Evenly() else f"{num} steps, {placement}"


def _kept(spec: SiteSpec, steps: str) -> str:
    """What is kept for a site beside, or in place of, its range."""
    if not spec.needs_inputs:
        return ""
    return f", inputs of {steps}" + (" and range" if spec.needs_ranges else "")


def _short(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:12]


def _check_same_run(stats: Stats, run: Callable[[int], dict[str, str]], output: Any) -> None:
    for name, here in run(stats.num_prompts).items():
        stored = stats.run.get(name)
        if stored != here:
            raise ValueError(
                f"calibrate: {name} of {output} must be those of this run ({here}), got {stored}. "
                "It was written by another run; remove it or choose another name."
            )
