"""How much the denoiser's noise counts in each part of a run: by what it does to the final latents.

Noise of equal power is not of equal harm at all noise levels: what an early step does wrong later ones may mend, and of the last
one nothing is mended. So one plan serves one part of a run at a time, the rest is the original, and a part's weight is the error of
the final latents over the noise that its calls were scored with. (``correct.sensitive_steps`` asks the same of two pipelines.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from dqtk.calibrate import Stats
from dqtk.calibrate.replay import Call
from dqtk.correct.sensitive_steps import sensitive_steps
from dqtk.journal import Journal, done
from dqtk.plan import Plan
from dqtk.quantize import MAX_MEMORY
from dqtk.spec import canonical

from .parts import RunParts
from .probes import limited
from .sensitivity import Sensitivity, twins

ROW = "weights of parts "


def weights_of_parts(
    pipe: Any,
    parts: Mapping[str, nn.Module],
    plans: Sequence[Plan],
    found: Sensitivity,
    stats: Stats,
    num: int,
    prompts: Sequence[str],
    call_kwargs: Mapping[str, Any] | None,
    folder: Path,
) -> tuple[float, ...]:
    """Of ``num`` equal parts of a run, in order; with them the noise powers of the plan that was asked add up to the same sum.

    The plan is the one with the most noise: what harm it does stands out. Kept in the journal of the folder. One run per part and
    prompt, and one more per prompt. All 1 where it does no harm at all.
    """
    plan = max(plans, key=lambda plan: sum(_noises(plan, found, num)))
    noises, key = _noises(plan, found, num), f"{ROW}{plan.hash}"
    row = done(folder, "allocate").get(key)
    if row is None:
        others = twins(parts, plan, stats, {"sequential": False, "max_memory": MAX_MEMORY})
        quantized = SimpleNamespace(components={**pipe.components, **others})
        seen = sensitive_steps(pipe, quantized, prompts, num_intervals=num, call_kwargs=call_kwargs)
        row = {"errors": [part.error for part in sorted(seen, key=lambda part: part.begin)]}
        with Journal(folder, 0) as journal:
            journal.record(key, row)
    weights = [error / noise if noise > 0 else 1.0 for error, noise in zip(row["errors"], noises, strict=True)]
    total = math.fsum(weight * noise for weight, noise in zip(weights, noises, strict=True))
    if not 0 < total < math.inf:
        return (1.0,) * num
    return tuple(weight * math.fsum(noises) / total for weight in weights)


@dataclass(frozen=True, slots=True)
class Counts:
    """How much the noise of a denoiser's call counts; that of text encoders' calls as it is."""

    run: RunParts
    weights: tuple[float, ...]

    def __call__(self, call: Call) -> float:
        return 1.0 if call.level is None else self.weights[self.run.of(call.time or 0.0)]


def weighed(found: Sensitivity, weights: Sequence[float]) -> Sensitivity:
    """Scores and noise powers with each part of a run counted by its weight."""
    parts = {
        key: tuple(weight * noise for weight, noise in zip(weights, noises, strict=True)) for key, noises in found.parts.items()
    }
    scores = {key: limited(math.fsum(parts[key])) if key in parts else score for key, score in found.scores.items()}
    return replace(found, scores=scores, parts=parts)


def _noises(plan: Plan, found: Sensitivity, num: int) -> list[float]:
    """What the layers of a plan add to the noise in each part, finite ones only, of layers scored by noise."""
    scored = [c for c in plan.choices if c.spec is not None and (c.site.id, canonical(c.spec)) in found.parts]
    rows = [found.parts[choice.site.id, canonical(choice.spec)] for choice in scored]
    return [math.fsum(row[part] for row in rows if math.isfinite(row[part])) for part in range(num)]
