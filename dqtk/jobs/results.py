"""Stage 4: results for machines and for people: ``results.json``, values per picture as parquet, Markdown, LaTeX, a page."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dqtk.report.markup import number, row, section, table
from dqtk.report.numbers import DASH, bytes_text, number_text, range_text
from dqtk.report.page import blank_page
from dqtk.report.plane import Dot, plane
from dqtk.report.records import Record

from .files import whole, write_bytes, write_json
from .measure import Shown
from .reduce import Values

SCHEMA_VERSION = 1


def write_results(
    folder: Path,
    job: Mapping[str, Any],
    shown: Sequence[Shown],
    records: Sequence[Record],
    values: Mapping[str, Values],
    facts: Mapping[str, Mapping[str, Any]],
    warnings: Sequence[str],
) -> list[Path]:
    """Write every result file; returns their paths. ``facts``: variant -> bytes, recipe, kernels."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "job": dict(job),
        "variants": {
            variant.name: {"role": variant.role, "original": variant.original, **facts.get(variant.name, {})} for variant in shown
        },
        "warnings": list(warnings),
        "results": [json.loads(record.to_json()) for record in records],
    }
    write_json(folder / "results.json", data)
    _write_samples(folder / "samples.parquet", shown, values)
    cells = table_of(shown, records, facts)
    write_bytes(folder / "report.md", markdown(cells, warnings).encode())
    write_bytes(folder / "report.tex", latex(cells).encode())
    write_bytes(folder / "report.html", page(str(job.get("name", "job")), shown, records, facts, cells, warnings).encode())
    return [folder / name for name in ("results.json", "samples.parquet", "report.md", "report.tex", "report.html")]


def _write_samples(path: Path, shown: Sequence[Shown], values: Mapping[str, Values]) -> None:
    """One row per picture of each variant: ids, prompts, files, every score."""
    import pandas

    frames = []
    for variant in shown:
        found = values[variant.name]
        rows = [
            {"variant": variant.name, "role": variant.role, **dataclasses.asdict(p), "file": p.file.name} for p in variant.pictures
        ]
        scores = {**found.pairs, **found.texts, **found.oracle}
        frames.append(pandas.DataFrame(rows).assign(**scores))
    with whole(path) as partial:
        pandas.concat(frames, ignore_index=True).to_parquet(partial, index=False)


# --- tables ----------------------------------------------------------------------------------------------------------


def table_of(
    shown: Sequence[Shown], records: Sequence[Record], facts: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table: a column per measured score, a row per variant, values with their intervals."""
    names = list(dict.fromkeys(record.name for record in records if record.model and record.value is not None))
    found = {(record.model, record.name): record for record in records}
    rows = []
    for variant in shown:
        weights = facts.get(variant.name, {}).get("bytes_at_16_bit")
        cells = [variant.name, bytes_text(weights)]
        for name in names:
            cells.append(_cell(found.get((variant.name, name))))
        rows.append(cells)
    return ["variant", "weights", *names], rows


def _cell(record: Record | None) -> str:
    if record is None or record.value is None:
        return DASH
    digits = int(record.extra.get("digits", 3))
    text = number_text(record.value, digits)
    return text if record.low is None else f"{text} ({range_text(record.low, record.high, digits)})"


def markdown(cells: tuple[list[str], list[list[str]]], warnings: Sequence[str]) -> str:
    """A pipe table, and the warnings under it."""
    head, rows = cells
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows]]
    return "\n".join([*lines, "", *(f"- {warning}" for warning in warnings)]) + "\n"


def latex(cells: tuple[list[str], list[list[str]]]) -> str:
    """Rows for a ``tabular``; special characters escaped."""
    head, rows = cells
    escaped = [" & ".join(_tex(cell) for cell in line) + r" \\" for line in [head, *rows]]
    begin = r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}"
    return "\n".join([begin, r"\hline", escaped[0], r"\hline", *escaped[1:], r"\hline", r"\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text.replace("\N{MINUS SIGN}", "$-$").replace(DASH, "--")


# --- page ------------------------------------------------------------------------------------------------------------


def page(
    name: str,
    shown: Sequence[Shown],
    records: Sequence[Record],
    facts: Mapping[str, Mapping[str, Any]],
    cells: tuple[list[str], list[list[str]]],
    warnings: Sequence[str],
) -> str:
    """One self-contained page: quality against bytes, every score, what was not measured."""
    head, rows = cells
    body = [f"<header><p class='kicker'>A job of {len(shown)} variants</p><h1>{escape(name)}</h1></header>"]
    for score in dict.fromkeys(r.name for r in records if r.name.endswith("@vs_original") and r.value is not None):
        dots = [
            Dot(label=r.model, x=facts[r.model]["bytes_at_16_bit"] / 1e6, y=r.value, low=r.low, high=r.high)
            for r in records
            if r.name == score and r.value is not None and facts.get(r.model, {}).get("bytes_at_16_bit")
        ]
        if dots:
            note = "Weights as they are in memory at 16 bits; vertical bars are 95 % intervals over prompts."
            body.append(section("plane", "Quality against size", note, plane(score, "weights, MB", score, dots)))
            break
    lines = [row(line[0], [number(cell) for cell in line[1:]]) for line in rows]
    body.append(section("scores", "Scores", "95 % bootstrap intervals over prompts in brackets.", table("Scores", head, lines)))
    unmeasured = [row(r.name, [f"<td>{escape(r.not_measured or '')}</td>"]) for r in records if r.not_measured is not None]
    if unmeasured:
        body.append(section("missing", "Not measured", "", table("Not measured", (), unmeasured)))
    if warnings:
        body.append(section("warnings", "Beware", "", "<ul>" + "".join(f"<li>{escape(w)}</li>" for w in warnings) + "</ul>"))
    return blank_page(name, "\n".join(body))
