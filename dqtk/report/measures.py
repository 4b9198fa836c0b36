"""From values per image to the lines of the table: capped means with intervals, oracle changes and flips, error over all steps."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .comparison import Curve, Estimate, Measure, Row
from .scores import ImageScore, bootstrap, capped, change_interval, flip_counts, pool_db
from .trajectory import StepSums

STEP_CAP_DB = 100.0  # what an exact denoiser output counts for in a mean over images
_STEP_LABELS = {"own": "own trajectory", "same": "same inputs"}


def score_measures(rows: Sequence[Row], scores: Sequence[ImageScore], missing: Mapping[str, str], seed: int) -> list[Measure]:
    """One measure per image score, one per score that could not be measured, and the oracle's where rows have its verdicts."""
    prompts = [row.prompt_index for row in rows]
    found = []
    for score in scores:
        values = [row.scores[score.name] for row in rows]
        floor = [row.floor[score.name] for row in rows if score.name in row.floor]
        frames = [value for row in rows for value in row.frame_scores.get(score.name, ())]
        found.append(
            Measure(
                name=score.name,
                label=score.label,
                unit=score.unit,
                higher_is_better=score.higher_is_better,
                digits=score.digits,
                num_samples=len(rows),
                estimate=_estimate(capped(values, score.cap), prompts, seed),
                floor=_estimate(capped(floor, score.cap), prompts, seed) if floor else None,
                detail=_detail(score, values, frames)
                | _exact_floor(score, floor)
                | _beyond_floor(score, values, floor, prompts, seed),
            )
        )
    for name, why in missing.items():
        found.append(_unmeasured(name, name.upper().replace("_", "-"), why))
    if rows and rows[0].oracle:
        found += _oracle_measures(rows, prompts, seed)
    return found


def step_measures(steps: Mapping[str, Mapping[str, Any]], prompts: Sequence[int], seed: int) -> list[Measure]:
    """SQNR of the denoiser's output over all steps, per kind: mean over images with its interval; or why there is none.

    ``steps`` maps pipeline -> kind -> ``StepSums``, a reason, or ``None`` where nothing was recorded.
    """
    found = []
    for kind, label in _STEP_LABELS.items():
        name, title = f"sqnr_{kind}", f"SQNR, {label}"
        sums = steps["candidate"][kind]
        if not isinstance(sums, StepSums):
            found.append(
                _unmeasured(name, title, sums or "no denoiser calls were recorded (num_trajectory=0, or no unet or transformer)")
            )
            continue
        floor = steps.get("floor", {}).get(kind)
        found.append(
            Measure(
                name=name,
                label=title,
                unit="dB",
                higher_is_better=True,
                digits=2,
                num_samples=len(prompts),
                estimate=_estimate(_over_steps(sums), prompts, seed),
                floor=_estimate(_over_steps(floor), prompts, seed) if isinstance(floor, StepSums) else None,
                detail={"num_steps": len(sums.sums), "cap_db": STEP_CAP_DB, "num_capped": _num_capped(sums)}
                | ({"floor_num_capped": _num_capped(floor)} if isinstance(floor, StepSums) else {}),
            )
        )
    return found


def curve_of(pipeline: str, kind: str, steps: StepSums) -> Curve:
    """The per-step curve, pooled over images."""
    pooled = [sums.pooled() for sums in steps.sums]
    label = _STEP_LABELS[kind] if pipeline == "candidate" else f"noise floor, {_STEP_LABELS[kind]}"
    return Curve(
        kind=kind,
        pipeline=pipeline,
        label=label,
        num_images=len(steps.sums[0].product) if steps.sums else 0,
        timesteps=steps.timesteps,
        sqnr_db=tuple(float(sums.sqnr_db()) for sums in pooled),
        cosine=tuple(float(sums.cosine()) for sums in pooled),
    )


def _over_steps(steps: StepSums) -> list[float]:
    """SQNR in dB per image over all steps, capped."""
    return capped(_uncapped(steps), STEP_CAP_DB)


def _uncapped(steps: StepSums) -> list[float]:
    total = steps.sums[0]
    for sums in steps.sums[1:]:
        total = total + sums
    values: list[float] = total.sqnr_db().tolist()
    return values


def _num_capped(steps: StepSums) -> int:
    return sum(value > STEP_CAP_DB for value in _uncapped(steps))


def _estimate(values: Sequence[float], prompts: Sequence[int], seed: int) -> Estimate:
    interval = bootstrap(values, prompts, seed)
    return Estimate(value=interval.estimate, low=interval.low, high=interval.high)


def _detail(score: ImageScore, values: Sequence[float], frames: Sequence[float]) -> dict[str, Any]:
    """Further facts of a score's values; ``frames``: those of single frames, of clips."""
    pick = min if score.higher_is_better else max
    worst = pick(values)
    detail: dict[str, Any] = {"worst": _finite(worst, score), "median": _finite(statistics.median(values), score)}
    if score.cap is not None:
        detail |= {"cap": score.cap, "exact_matches": sum(math.isinf(value) for value in values)}
    if frames:
        detail["worst_frame"] = _finite(pick(frames), score)
    if score.name == "psnr":
        detail["pooled"] = _finite(pool_db(frames or values), score)
    return detail


def _exact_floor(score: ImageScore, floor: Sequence[float]) -> dict[str, int]:
    return {} if score.cap is None or not floor else {"floor_exact_matches": sum(math.isinf(value) for value in floor)}


def _beyond_floor(
    score: ImageScore, values: Sequence[float], floor: Sequence[float], prompts: Sequence[int], seed: int
) -> dict[str, Any]:
    """How much worse a pair is than the noise floor of the same prompt and seed: mean of the paired difference, with interval."""
    if not floor:
        return {}
    sign = 1 if score.higher_is_better else -1
    pairs = zip(capped(values, score.cap), capped(floor, score.cap), strict=True)
    found = _estimate([sign * (other - value) for value, other in pairs], prompts, seed)
    return {"beyond_floor": {"value": found.value, "low": found.low, "high": found.high}}


def _finite(value: float, score: ImageScore) -> float:
    return value if score.cap is None else min(value, score.cap)


def _unmeasured(name: str, label: str, why: str) -> Measure:
    return Measure(name=name, label=label, unit="", higher_is_better=None, digits=2, num_samples=0, estimate=None, not_measured=why)


def _oracle_measures(rows: Sequence[Row], prompts: Sequence[int], seed: int) -> list[Measure]:
    means = {side: [row.oracle[side].mean for row in rows] for side in rows[0].oracle}
    found = [_paired("oracle", "Oracle", means, prompts, seed, {})]
    if all(score.all_correct is not None for row in rows for score in row.oracle.values()):
        right = {side: [float(bool(row.oracle[side].all_correct)) for row in rows] for side in rows[0].oracle}
        flips = flip_counts(right["reference"], right["candidate"])
        before, after, change = _paired("all_correct", "All correct", right, prompts, seed, flips)
        interval = change_interval(right["reference"], right["candidate"], prompts, seed)
        estimate = Estimate(value=interval.estimate, low=interval.low, high=interval.high)
        found.append([before, after, replace(change, estimate=estimate)])
    return [measure for group in found for measure in group]


def _paired(
    name: str, label: str, values: Mapping[str, Sequence[float]], prompts: Sequence[int], seed: int, detail: dict[str, Any]
) -> list[Measure]:
    """The reference's mean, the candidate's, and the mean of the paired change; the floor's change beside the last."""

    def measure(suffix: str, words: str, of: Sequence[float], floor: Sequence[float] | None, more: dict[str, Any]) -> Measure:
        return Measure(
            name=f"{name}_{suffix}",
            label=f"{label}, {words}",
            unit="",
            higher_is_better=True,
            digits=3,
            num_samples=len(of),
            estimate=_estimate(of, prompts, seed),
            floor=_estimate(floor, prompts, seed) if floor is not None else None,
            detail=more,
        )

    before, after, floor = values["reference"], values["candidate"], values.get("floor")
    change = [b - a for a, b in zip(before, after, strict=True)]
    floor_change = [b - a for a, b in zip(before, floor, strict=True)] if floor is not None else None
    return [
        measure("reference", "original", before, None, {}),
        measure("candidate", "candidate", after, floor, {}),
        measure("change", "change", change, floor_change, detail),
    ]
