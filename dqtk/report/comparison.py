"""What a comparison found, as data: rows per image, measures, curves per step, sizes, times; its table, records and files."""

import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .ledger import records_of
from .ranges import RangeCurve
from .records import Record, append_records
from .sizes import ComponentSize
from .table import as_text


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleScore:
    """What an oracle said of one picture: the mean over attributes in [0, 1]; whether all were right (``None``: unknown)."""

    mean: float
    all_correct: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image pair. ``scores`` and ``floor`` map score names to values (``inf`` allowed) of the candidate and of the noise
    floor
    against the reference; ``oracle`` and ``images`` (PNG bytes) are keyed "reference", "candidate" and, for images, "floor"."""

    id: str
    prompt_index: int
    repetition: int
    prompt: str
    seed: int
    scores: dict[str, float]
    floor: dict[str, float]
    oracle: dict[str, OracleScore]
    images: dict[str, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its 95 % bootstrap interval over prompts; no interval for a single prompt."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One line of the table. ``estimate`` is ``None`` exactly when ``not_measured`` says why; ``floor`` is the same score of
    the noise
    floor; ``detail`` holds further facts as plain JSON (exact matches, worst, pooled value, flips)."""

    name: str
    label: str
    unit: str
    higher_is_better: bool | None
    digits: int
    num_samples: int
    estimate: Estimate | None
    floor: Estimate | None = None
    not_measured: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def identical(self) -> bool:
        """Whether every picture is the original's."""
        return self.num_samples > 0 and self.detail.get("exact_matches") == self.num_samples

    @property
    def floor_identical(self) -> bool:
        """Whether every picture of the noise floor is the original's."""
        return self.num_samples > 0 and self.detail.get("floor_exact_matches") == self.num_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Error of the denoiser's output per step. ``kind`` is "own" (free running) or "same" (the reference's inputs),
    ``pipeline`` is
    "candidate" or "floor"; ``sqnr_db`` (``inf`` allowed) and ``cosine`` are pooled over images, one value per step."""

    kind: str
    pipeline: str
    label: str
    num_images: int
    timesteps: tuple[float | None, ...]
    sqnr_db: tuple[float, ...]
    cosine: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median wall seconds per image over ``num_batches`` interleaved batches of at most ``batch_size`` images."""

    reference: float
    candidate: float
    num_batches: int
    batch_size: int
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SizePair:
    """One component's size in both pipelines; ``None`` where a pipeline lacks it."""

    name: str
    reference: ComponentSize | None
    candidate: ComponentSize | None

    def places(self) -> list[tuple[str, int | None, int | None]]:
        """(where, bytes before, bytes after) for each place that either is known in."""
        before, after = (size.places() if size else {} for size in (self.reference, self.candidate))
        return [(place, before.get(place), after.get(place)) for place in {**before, **after}]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything that ``compare`` found. ``rows`` are in the order of the prompts; ``worst_first`` sorts them. ``dtype``: what the
    original computed in; ``floor_dtype``: what its noise floor did (``None``: the same); ``ranges``: of the original's layers."""

    reference_name: str
    candidate_name: str
    floor_name: str | None
    rows: tuple[Row, ...]
    measures: tuple[Measure, ...]
    curves: tuple[Curve, ...]
    timing: Timing
    sizes: tuple[SizePair, ...]
    dtype: str
    seed: int
    seeds_per_prompt: int
    call_kwargs: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, str]
    created: str
    plan_summary: dict[str, Any] | None = None
    floor_dtype: str | None = None
    ranges: tuple[RangeCurve, ...] = ()

    @property
    def num_prompts(self) -> int:
        return len({row.prompt_index for row in self.rows})

    def measure(self, name: str) -> Measure:
        """The measure called ``name``. Raises ``KeyError`` for another."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(name)

    def worst_first(self) -> tuple[Row, ...]:
        """Rows from the worst to the best by the first image score; oracle losses break ties."""
        first = next((m for m in self.measures if self.rows and m.name in self.rows[0].scores), None)
        if first is None:
            return self.rows
        sign = 1 if first.higher_is_better else -1

        def badness(row: Row) -> tuple[float, float]:
            change = row.oracle["candidate"].mean - row.oracle["reference"].mean if row.oracle else 0.0
            return (sign * row.scores[first.name], change)

        return tuple(sorted(self.rows, key=badness))

    def records(self) -> list[Record]:
        """One ``Record`` per measure, floor, time and size."""
        return records_of(self)

    def table(self) -> str:
        """The result as plain text for a terminal, at most 100 columns."""
        return as_text(self)

    def save(self, folder: str | Path) -> Path:
        """Write ``records.jsonl``, ``rows.jsonl`` and ``images/<id>-<side>.png``; returns the folder.

        Everything is written beside it and renamed at the end. Raises ``ValueError`` where ``folder`` exists and is not empty.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"Comparison.save: folder must be new or empty, got {str(folder)!r}. Choose another, or remove it.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (temporary / "images").mkdir()
            append_records(temporary / "records.jsonl", self.records())
            lines = []
            for row in self.rows:
                lines.append(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
                for side, png in row.images.items():
                    (temporary / "images" / f"{row.id}-{side}.png").write_bytes(png)
            (temporary / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
            temporary.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON: infinite scores as text, images as their file names."""

    def numbers(scores: dict[str, float]) -> dict[str, float | str]:
        return {name: value if math.isfinite(value) else str(value) for name, value in scores.items()}

    return {
        "id": row.id,
        "prompt_index": row.prompt_index,
        "repetition": row.repetition,
        "prompt": row.prompt,
        "seed": row.seed,
        "scores": numbers(row.scores),
        "floor": numbers(row.floor),
        "oracle": {side: {"mean": o.mean, "all_correct": o.all_correct} for side, o in row.oracle.items()},
        "images": {side: f"images/{row.id}-{side}.png" for side in row.images},
    }
