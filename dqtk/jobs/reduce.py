"""Stage 3: from values per picture and features to records. One process, no model; memory is that of the feature rows.

A paired score is named ``psnr@vs_original`` and always carries an interval over prompts. A distance of sets is named with its
extractor and its reference: ``frechet[tiny-clip]@vs_original(paired)`` against the original's pictures of the same prompts and
seeds, which is 0 for the original itself; ``frechet[tiny-clip]@vs_real`` against other pictures, whose floor is not 0. The two
answer different questions and never share a name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dqtk.report.records import Record
from dqtk.report.scores import (
    bootstrap,
    capped,
    change_interval,
    comparable,
    distance_quantiles,
    flip_counts,
    one_number,
    rank_warning,
    serves,
)

from .asked import needs_clips
from .worker_scores import Answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """Everything known of one variant. ``prompts``: whose pictures are of one prompt. ``pairs``: score name -> values;
    ``texts``: (score name, extractor name) -> values; ``clips``: (score name, name of its tool or None) -> values, None of clips
    that the score is not of.

    ``features``: (extractor name, head) -> rows; head None is the extractor's own feature.
    ``oracle``: "oracle_mean" and "oracle_all_correct" -> values; empty without an oracle. ``workers``: name -> what the worker
    answered, or why it did not.
    """

    name: str
    role: str
    prompts: list[int]
    pairs: dict[str, list[float]] = field(default_factory=dict)
    texts: dict[tuple[str, str], list[float | None]] = field(default_factory=dict)
    clips: dict[tuple[str, str | None], list[float | None]] = field(default_factory=dict)
    oracle: dict[str, list[float]] = field(default_factory=dict)
    workers: dict[str, Answers | str] = field(default_factory=dict)
    features: dict[tuple[str, str | None], Tensor] = field(default_factory=dict)

    def columns(self) -> dict[str, list[float]]:
        """Every value per picture under the name of its score; NaN where a score is not of a clip."""
        by_tool = {tool_name(score, tool): v for (score, tool), v in (self.texts | self.clips).items()}
        numbers = {name: [math.nan if value is None else value for value in found] for name, found in by_tool.items()}
        workers = {name: said.values for name, said in self.workers.items() if not isinstance(said, str)}
        return {**self.pairs, **numbers, **self.oracle, **workers}


def tool_name(score: str, tool: str | None) -> str:
    """A score's name with what it was computed by."""
    return score if tool is None else f"{score}[{tool}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What records of a job share. ``here``: versions and hardware of this process; ``made``: where each variant was painted, which
    is what its records say, where it is known."""

    seed: int
    created: str
    here: dict[str, dict[str, str]]
    made: Mapping[str, Mapping[str, Any]]
    extra: dict[str, Any]
    extractors: Mapping[str, Any]

    def record(self, variant: str, score: Any, name: str, num: int, **fields: Any) -> Record:
        """One record of a variant; ``fields`` are the numbers, or why there are none."""
        made = {**self.here, **self.made.get(variant, {})}
        dtype = {"dtype": made["dtype"]} if "dtype" in made else {}
        extra = {"label": score.label, "digits": score.digits} | fields.pop("extra", {}) | self.extra | dtype
        return Record(
            name=name,
            model=variant,
            unit=score.unit,
            higher_is_better=score.higher_is_better,
            num_samples=num,
            seed=self.seed,
            created=self.created,
            versions=made["versions"],
            hardware=made["hardware"],
            plan_hash=made.get("plan_hash"),
            extra=extra,
            **fields,
        )

    def comparable(self, score: Any, extractor: str, *, to_original: bool) -> dict[str, bool]:
        """Whether a number may stand beside published ones, for a record's ``extra``."""
        return {"comparable": comparable(score, self.extractors[extractor], to_original)}

    def clip_extra(self, score: Any, tool: str | None, *, to_original: bool) -> dict[str, Any]:
        """The same of a score of clips, which may need no tool."""
        if tool is None:
            return {"comparable": bool(score.published) and not to_original}
        return self.comparable(score, tool, to_original=to_original)


def pair_records(values: Values, scores: Mapping[str, Any], context: Context) -> list[Record]:
    """Paired scores against the original: mean with interval, quantiles, worst, exact matches."""
    found = []
    for name, raw in values.pairs.items():
        score = scores[name]
        finite = capped(raw, score.cap)
        interval = bootstrap(finite, values.prompts, context.seed)
        extra: dict[str, Any] = distance_quantiles(finite, higher_is_better=score.higher_is_better)
        if score.cap is not None:
            extra |= {"cap": score.cap, "exact_matches": sum(value == float("inf") for value in raw)}
        numbers = {"value": interval.estimate, "low": interval.low, "high": interval.high}
        found.append(context.record(values.name, score, f"{name}@vs_original", len(raw), extra=extra, **numbers))
    return found


def change_records(values: Values, original: Values, kind: str, scores: Mapping[str, Any], context: Context) -> list[Record]:
    """Scores of single pictures (``kind``: "texts" or "oracle"): the variant's mean, and the mean of the paired change."""
    found = []
    for key, mine in getattr(values, kind).items():
        score_name, extractor = key if isinstance(key, tuple) else (key, None)
        score, name = scores[score_name], score_name if extractor is None else f"{score_name}[{extractor}]"
        extra = context.comparable(score, extractor, to_original=False) if extractor is not None else {}
        found.append(_mean_record(values, score, name, mine, None, context, extra))
        theirs = getattr(original, kind).get(key)
        if values.role == "original" or theirs is None:
            continue
        extra = context.comparable(score, extractor, to_original=True) if extractor is not None else {}
        found.append(_mean_record(values, score, f"{name}@change", mine, theirs, context, extra))
    return found


def clip_records(values: Values, original: Values, scores: Mapping[str, Any], context: Context) -> list[Record]:
    """Scores of single clips: the mean over those that the score is of, and the mean of the paired change."""
    found = []
    for (score_name, tool), mine in values.clips.items():
        score, name = scores[score_name], tool_name(score_name, tool)
        theirs = original.clips.get((score_name, tool))
        found.append(_mean_record(values, score, name, mine, None, context, context.clip_extra(score, tool, to_original=False)))
        if values.role != "original" and theirs is not None:
            extra = context.clip_extra(score, tool, to_original=True)
            found.append(_mean_record(values, score, f"{name}@change", mine, theirs, context, extra))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unknown:
    """The score of a worker that said nothing of itself."""

    label: str
    unit: str = ""
    higher_is_better: bool | None = None
    digits: int = 4


def worker_records(values: Values, original: Values, context: Context) -> list[Record]:
    """Scores of workers: the mean, and the mean of the paired change; or why there is none."""
    found = []
    for name, mine in values.workers.items():
        if isinstance(mine, str):
            score = _Unknown(label=name)
            found.append(context.record(values.name, score, name, len(values.prompts), value=None, not_measured=mine))
            continue
        extra = {"worker": f"{mine.by.name} {mine.by.version}"}
        found.append(_mean_record(values, mine.by, name, mine.values, None, context, extra))
        theirs = original.workers[name]
        if values.role != "original" and not isinstance(theirs, str):
            found.append(_mean_record(values, mine.by, f"{name}@change", mine.values, theirs.values, context, extra))
    return found


def _mean_record(
    values: Values,
    score: Any,
    name: str,
    mine: Sequence[float | None],
    theirs: Sequence[float | None] | None,
    context: Context,
    extra: dict[str, Any],
) -> Record:
    """The mean of what has a number on every side, with its interval; or why there is none."""
    both = zip(mine, mine if theirs is None else theirs, values.prompts, strict=True)
    kept = [(a, b, prompt) for a, b, prompt in both if a is not None and b is not None]
    if len(kept) < len(mine):
        extra = extra | {"left_out": len(mine) - len(kept)}
    if not kept:
        why = f"{score.label} is of none of the {len(mine)} clips"
        return context.record(values.name, score, name, len(mine), value=None, not_measured=why, extra=extra)
    after, before, prompts = (list(column) for column in zip(*kept, strict=True))
    if theirs is None:
        interval = bootstrap(after, prompts, context.seed)
    elif getattr(score, "boolean", False):
        interval = change_interval(before, after, prompts, context.seed)
        extra = extra | flip_counts(before, after)
    else:
        interval = bootstrap([a - b for a, b in zip(after, before, strict=True)], prompts, context.seed)
    numbers = {"value": interval.estimate, "low": interval.low, "high": interval.high}
    return context.record(values.name, score, name, len(kept), extra=extra, **numbers)


def set_records(
    values: Values, reference: Mapping[tuple[str, str | None], Tensor], scores: Sequence[Any], context: Context, *, paired: bool
) -> list[Record]:
    """Distances of the variant's features to a reference's, per extractor; with a warning where there are too few rows, or why
    there is none."""
    found = []
    where = "vs_original(paired)" if paired else "vs_real"
    for (extractor, head), rows in values.features.items():
        others = reference.get((extractor, head))
        num = len(rows)
        for score in (score for score in scores if score.head == head and serves(score, context.extractors[extractor])):
            name = f"{score.name}[{extractor}]@{where}"
            if others is None:  # an extractor of clips has rows of the one and none of the other
                why = needs_clips(score, extractor, "references that are pictures")
                found.append(context.record(values.name, score, name, num, value=None, not_measured=why))
                continue
            extra: dict[str, Any] = {
                **context.comparable(score, extractor, to_original=paired),
                "dim": rows.shape[1],
                "num_reference": len(others),
            }
            if min(num, len(others)) < score.least:
                got = str(num) if num == len(others) else f"{num} and {len(others)} references"
                why = f"{score.label} needs at least {score.least} pictures, got {got}"
                found.append(context.record(values.name, score, name, num, value=None, not_measured=why, extra=extra))
                continue
            value = one_number(score.name, score.function, score.function(rows, others, paired))
            if score.full_rank and (warning := rank_warning(num, rows.shape[1], len(others))) is not None:
                extra["warning"] = warning
            found.append(context.record(values.name, score, name, num, value=value, extra=extra))
    return found


def class_records(values: Values, scores: Sequence[Any], context: Context) -> list[Record]:
    """Scores of a set alone, from logits."""
    found = []
    for (extractor, head), logits in values.features.items():
        for score in (score for score in scores if score.head == head):
            name = f"{score.name}[{extractor}]"
            extra: dict[str, Any] = context.comparable(score, extractor, to_original=False)
            if len(logits) < score.least:
                why = f"{score.label} needs at least {score.least} pictures, got {len(logits)}"
                found.append(context.record(values.name, score, name, len(logits), value=None, not_measured=why, extra=extra))
                continue
            value, spread = score.function(logits)
            extra |= {"standard_deviation": spread}
            found.append(context.record(values.name, score, name, len(logits), value=value, extra=extra))
    return found
