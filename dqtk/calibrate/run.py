"""The verb ``calibrate``: run the pipeline on prompts and keep what its layers saw."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from dqtk.plan import Plan

from .record import recording
from .stats import Stats


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    plan: Plan,
    *,
    seed: int = 0,
    batch_size: int = 4,
    call_kwargs: Mapping[str, Any] | None = None,
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
        call_kwargs: passed to the pipeline, for example ``{"num_inference_steps": 20}``.
        output: file that is written after every batch and continued from if it exists: with the same prompts, seed and plan.
        progress: show a bar.
    Returns:
        Statistics over all steps of all prompts, both guidance branches.
    Raises:
        ValueError: no prompts, a target that is not a pipeline, or an ``output`` that belongs to other sites.
    """
    if not plan.needs_stats:
        return Stats()
    _check_call(pipe, prompts)
    sites = [c.site for c in plan.choices if c.spec is not None and c.spec.needs_stats]
    stats = Stats.load(output) if output is not None and Path(output).exists() else Stats()
    if stats.num_prompts:
        _check_sites(stats, [site.id for site in sites], output)
    starts = range(stats.num_prompts, len(prompts), batch_size)
    for start in tqdm(starts, desc="calibrate", disable=not progress):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        with recording(pipe, sites, stats, len(batch)), torch.no_grad():
            pipe(batch, generator=generators, output_type="latent", **(call_kwargs or {}))
        stats.num_prompts += len(batch)
        if output is not None:
            stats.save(output)
    return stats


def _check_call(pipe: Any, prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError(
            "calibrate: prompts must hold at least one prompt, got none. Pass a list or a file with one prompt per line."
        )
    if isinstance(pipe, nn.Module):
        raise ValueError(
            f"calibrate: pipe must be a pipeline that can be called with prompts, got {type(pipe).__name__}. "
            "Pass the pipeline that the model is part of."
        )


def _check_sites(stats: Stats, planned: Sequence[str], output: Any) -> None:
    unseen = set(planned) - {key.site for key in stats.inputs}
    if unseen:
        raise ValueError(
            f"calibrate: output {output} must hold statistics of all {len(planned)} planned sites, got none for {min(unseen)}. "
            "It was written for another plan or model; remove it or choose another name."
        )
