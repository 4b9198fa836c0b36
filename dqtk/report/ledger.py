"""From a comparison to its records: one per measure, noise floor, time and size."""

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .records import Record

if TYPE_CHECKING:
    from .comparison import Comparison, Estimate


def records_of(comparison: "Comparison") -> list[Record]:
    """Every number of the table as a ``Record``; what was not measured too, with its reason."""
    return [*_scores(comparison), *_times(comparison), *_sizes(comparison)]


def _record(comparison: "Comparison", **fields: Any) -> Record:
    plan = comparison.plan_summary or {}
    return Record(
        seed=comparison.seed,
        model=comparison.candidate_name,
        created=comparison.created,
        plan_hash=plan.get("hash"),
        versions=comparison.versions,
        hardware=comparison.hardware,
        **(fields | {"extra": _conditions(comparison) | fields["extra"]}),
    )


def _conditions(comparison: "Comparison") -> dict[str, Any]:
    """What else a number depends on: the dtype, the pipelines' arguments, the prompts."""
    prompts = json.dumps([row.prompt for row in comparison.rows])
    frames = {"num_frames": comparison.num_frames} if comparison.num_frames > 1 else {}
    return {
        **frames,
        "dtype": comparison.dtype,
        "call_kwargs": comparison.call_kwargs,
        "num_prompts": comparison.num_prompts,
        "prompts_sha256": hashlib.sha256(prompts.encode()).hexdigest()[:16],
    }


def _numbers(estimate: "Estimate | None") -> dict[str, float | None]:
    if estimate is None:
        return {"value": None}
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


def _scores(comparison: "Comparison") -> Iterator[Record]:
    for m in comparison.measures:
        facts = {"unit": m.unit, "higher_is_better": m.higher_is_better, "num_samples": m.num_samples}
        extra = {"reference": comparison.reference_name, **m.detail}
        yield _record(comparison, name=m.name, not_measured=m.not_measured, extra=extra, **_numbers(m.estimate), **facts)
        if m.floor is not None:
            extra = {"reference": comparison.reference_name, "floor": comparison.floor_name}
            extra["dtype"] = comparison.floor_dtype or comparison.dtype
            yield _record(comparison, name=f"{m.name}_floor", extra=extra, **_numbers(m.floor), **facts)


def _times(comparison: "Comparison") -> Iterator[Record]:
    t = comparison.timing
    facts = {"unit": "s", "higher_is_better": False, "num_samples": t.num_batches}
    extra = {"batch_size": t.batch_size, "note": t.note}
    noun = comparison.noun()
    yield _record(comparison, name=f"seconds_per_{noun}_reference", value=t.reference, extra=extra, **facts)
    yield _record(comparison, name=f"seconds_per_{noun}_candidate", value=t.candidate, extra=extra, **facts)


def _sizes(comparison: "Comparison") -> Iterator[Record]:
    facts = {"unit": "B", "higher_is_better": False, "num_samples": 1}
    for pair in comparison.sizes:
        for side, size in (("reference", pair.reference), ("candidate", pair.candidate)):
            for place in ("in_memory", "at_16_bit", "on_disk"):
                num_bytes = getattr(size, place) if size is not None else None
                if num_bytes is not None:
                    name, extra = f"bytes_{place}_{side}", {"component": pair.name}
                    yield _record(comparison, name=name, value=float(num_bytes), extra=extra, **facts)
            if size is not None and size.zeros is not None:
                facts_of_share = {"unit": "", "higher_is_better": None, "num_samples": 1}
                yield _record(
                    comparison, name=f"zero_share_{side}", value=size.zeros, extra={"component": pair.name}, **facts_of_share
                )
