"""What a comparison found, as data: rows per image, measures, curves per step, sizes, times; its table, records and files."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .film import frames_of_png, noun_of, png_of
from .generate import frame_names
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
    """One pair of images or clips. ``scores`` and ``floor`` map score names to values (``inf`` allowed) of the candidate and of the
    noise floor against the reference; ``oracle`` and ``images`` (PNG bytes; of a clip the sheet of its frames: ``film.py``) are by
    "reference", "candidate" and, for images, "floor". ``frame_scores`` and ``frame_floor``: of a clip, the values of each frame."""

    id: str
    prompt_index: int
    repetition: int
    prompt: str
    seed: int
    scores: dict[str, float]
    floor: dict[str, float]
    oracle: dict[str, OracleScore]
    images: dict[str, bytes]
    num_frames: int = 1
    frame_scores: dict[str, tuple[float, ...]] = field(default_factory=dict)
    frame_floor: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def files(self) -> Iterator[tuple[str, str, bytes]]:
        """(side, name, PNG) of every picture: one, or one per frame of a clip."""
        for side, png in self.images.items():
            if self.num_frames == 1:
                yield side, f"{self.id}-{side}.png", png
                continue
            for name, frame in zip(frame_names(self.id, self.num_frames), frames_of_png(png, self.num_frames), strict=True):
                yield side, f"{name}-{side}.png", png_of(frame)


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
    """Median wall seconds per image or clip over ``num_batches`` interleaved batches of at most ``batch_size`` images."""

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

    @property
    def num_frames(self) -> int:
        """1 for pictures."""
        return self.rows[0].num_frames if self.rows else 1

    def noun(self, still: str = "image") -> str:
        """What was compared: "clip", or the word for pictures."""
        return noun_of(self.num_frames, still)

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
        """Write ``records.jsonl``, ``rows.jsonl``, ``images/<id>-<side>.png`` (of clips ``<id>-<frame>-<side>.png``).

        Returns the folder.

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
                files = list(row.files())
                plain = _plain(row, [(side, name) for side, name, _ in files])
                lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
                for _, name, png in files:
                    (temporary / "images" / name).write_bytes(png)
            (temporary / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
            temporary.chmod(0o755)
            if folder.exists():
                folder.rmdir()
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder


def _plain(row: Row, files: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A row as JSON: infinite scores as text, images as their file names (of a clip, one per frame)."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    images: dict[str, Any] = {}
    for side, name in files:
        images.setdefault(side, []).append(f"images/{name}")
    plain = {
        "id": row.id,
        "prompt_index": row.prompt_index,
        "repetition": row.repetition,
        "prompt": row.prompt,
        "seed": row.seed,
        "scores": {name: number(value) for name, value in row.scores.items()},
        "floor": {name: number(value) for name, value in row.floor.items()},
        "oracle": {side: {"mean": o.mean, "all_correct": o.all_correct} for side, o in row.oracle.items()},
        "images": images if row.num_frames > 1 else {side: names[0] for side, names in images.items()},
    }
    if row.num_frames > 1:
        for key, scores in (("frame_scores", row.frame_scores), ("frame_floor", row.frame_floor)):
            plain[key] = {name: [number(value) for value in values] for name, values in scores.items()}
    return plain
