"""One measurement with everything needed to believe it, and JSON-lines files of them.

A file is append-only: one JSON object per line, UTF-8, keys in the order of the fields. Reading is strict, because a silently
dropped field is a number nobody can trace: unknown or missing keys, wrong types, NaN and cut-off lines are errors that name
file and line. JSON has no infinity; ``inf`` is written as the string "inf".
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NUMBERS = ("value", "low", "high")
_TEXTS = ("name", "unit", "model", "created")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One number about one model. ``value`` is ``None`` exactly when ``not_measured`` says why.

    ``low`` and ``high`` bound a 95 % bootstrap interval over prompts, in ``unit``; ``higher_is_better`` is ``None`` for facts
    without a better direction; ``versions`` and ``hardware`` map names to text; ``created`` is ISO 8601 in UTC; ``extra`` is
    any JSON object. Raises ``ValueError`` for NaN, wrong types, half an interval, or a missing value without a reason.
    """

    name: str
    value: float | None
    unit: str
    higher_is_better: bool | None
    num_samples: int
    seed: int | None
    model: str
    created: str
    low: float | None = None
    high: float | None = None
    plan_hash: str | None = None
    not_measured: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where = f"Record {self.name!r}"
        for name in _NUMBERS:
            number = getattr(self, name)
            _need(number is None or _is_number(number), where, name, "a number or None, not NaN", number)
        for name in _TEXTS:
            _need(isinstance(getattr(self, name), str), where, name, "text", getattr(self, name))
        for name in ("plan_hash", "not_measured"):
            _need(
                getattr(self, name) is None or isinstance(getattr(self, name), str),
                where,
                name,
                "text or None",
                getattr(self, name),
            )
        _need(self.higher_is_better in (True, False, None), where, "higher_is_better", "True, False or None", self.higher_is_better)
        _need(_is_count(self.num_samples), where, "num_samples", "a count", self.num_samples)
        _need(self.seed is None or _is_count(self.seed), where, "seed", "a count or None", self.seed)
        for name in ("versions", "hardware"):
            _need(_is_text_map(getattr(self, name)), where, name, "a mapping of text to text", getattr(self, name))
        _need(isinstance(self.extra, dict), where, "extra", "a mapping", self.extra)
        _need((self.low is None) == (self.high is None), where, "low and high", "given together", (self.low, self.high))
        _need(
            (self.value is None) == (self.not_measured is not None),
            where,
            "not_measured",
            "the reason when value is None, and None otherwise",
            self.not_measured,
        )

    def to_json(self) -> str:
        """One line of JSON, without the line break. Raises ``ValueError`` where ``extra`` holds what JSON cannot."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in _NUMBERS:
            if data[name] is not None and math.isinf(data[name]):
                data[name] = "inf" if data[name] > 0 else "-inf"
        try:
            return json.dumps(data, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Record {self.name!r}: extra must be plain JSON without NaN or infinity, got {self.extra!r} ({error}). Convert it."
            ) from None

    @classmethod
    def from_json(cls, line: str, where: str = "Record.from_json") -> "Record":
        """The record of one line. Raises ``ValueError`` for anything but an object with exactly these fields."""
        try:
            data = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(
                f"{where}: the line must be one JSON object, got {line[:60]!r} ({error}). Remove or mend it."
            ) from None
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            keys = set(data) if isinstance(data, dict) else set()
            unknown, missing = sorted(keys - names), sorted(names - keys)
            raise ValueError(
                f"{where}: a record must be an object with exactly the fields of Record, got unknown {unknown} and missing "
                f"{missing}. It may come from another version of dqtk."
            )
        for name in _NUMBERS:
            if data[name] in ("inf", "-inf"):
                data[name] = float(data[name])
        try:
            return cls(**data)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def append_records(path: str | Path, records: Iterable[Record]) -> int:
    """Append to a JSON-lines file (made with its folder where missing); returns how many. All are checked first."""
    lines = [record.to_json() + "\n" for record in records]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
    return len(lines)


def read_records(path: str | Path) -> list[Record]:
    """Every record of a JSON-lines file. Raises ``ValueError`` naming file and line for anything else than a record."""
    text = Path(path).read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError(f"{path}: the last line must end with a line break, got a cut-off line. Remove it or write it again.")
    return [Record.from_json(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), start=1)]


def _need(holds: bool, where: str, what: str, allowed: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{where}: {what} must be {allowed}, got {value!r}. Give it when the record is made.")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text_map(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
