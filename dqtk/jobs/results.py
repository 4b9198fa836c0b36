"""Stage 4: results for machines and for people: ``results.json``, values per picture as parquet, Markdown, LaTeX, a page."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dqtk.report.numbers import DASH, bytes_text, number_text, range_text
from dqtk.report.records import Record

from .asked import Shown
from .doubts import doubts_of, gaps_of
from .features import Picture
from .files import whole, write_bytes, write_json
from .page import page
from .reduce import Values

SCHEMA_VERSION = 1
NOT_COMPARABLE = "\N{DAGGER}"


def write_results(
    folder: Path,
    job: Mapping[str, Any],
    shown: Sequence[Shown],
    records: Sequence[Record],
    values: Mapping[str, Values],
    facts: Mapping[str, Mapping[str, Any]],
    warnings: Sequence[str],
) -> list[Path]:
    """Write every result file; returns their paths. ``facts``: variant -> bytes, recipe, kernels, or why there are no pictures.

    ``warnings``, what numbers say against themselves, and what was not measured stand under the table wherever there is one.
    """
    doubts, gaps = [*warnings, *doubts_of(records)], gaps_of(records)
    roles = {variant.name: {"role": variant.role, "original": variant.original} for variant in shown}
    data = {
        "schema_version": SCHEMA_VERSION,
        "job": dict(job),
        "variants": {name: {**roles.get(name, {}), **facts.get(name, {})} for name in {**roles, **facts}},
        "warnings": [*doubts, *gaps],
        "results": [json.loads(record.to_json()) for record in records],
    }
    write_json(folder / "results.json", data)
    _write_samples(folder / "samples.parquet", shown, values)
    cells = table_of(shown, records, facts)
    write_bytes(folder / "report.md", markdown(cells, [*doubts, *gaps]).encode())
    write_bytes(folder / "report.tex", latex(cells, [*doubts, *gaps]).encode())
    html = page(job, shown, records, values, facts, cells, doubts)  # which lists the gaps by itself
    write_bytes(folder / "report.html", html.encode())
    return [folder / name for name in ("results.json", "samples.parquet", "report.md", "report.tex", "report.html")]


def _write_samples(path: Path, shown: Sequence[Shown], values: Mapping[str, Values]) -> None:
    """One row per picture of each variant: ids, prompts, files, every score."""
    import pandas

    frames = []
    for variant in shown:
        found = values[variant.name]
        rows = [{"variant": variant.name, "role": variant.role, **_columns(p, path.parent)} for p in variant.pictures]
        scores = found.columns()
        frames.append(pandas.DataFrame(rows).astype({"seed": "Int64"}).assign(**scores))
    with whole(path) as partial:
        pandas.concat(frames, ignore_index=True).to_parquet(partial, index=False)


def _columns(picture: Picture, folder: Path) -> dict[str, Any]:
    """What is known of a picture or clip; its file (a clip's first frame) from the output where it lies in there, else as it is."""
    file = picture.file.relative_to(folder) if picture.file.is_relative_to(folder) else picture.file
    names = ("id", "prompt", "prompt_index", "seed", "sha256")
    frames = {"frames": len(picture.frames)} if picture.frames else {}
    return {name: getattr(picture, name) for name in names} | {"file": file.as_posix()} | frames


# --- tables ----------------------------------------------------------------------------------------------------------


def table_of(
    shown: Sequence[Shown], records: Sequence[Record], facts: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the main table: a column per measured score, a row per variant, values with their intervals.

    Names of scores that are not comparable with published numbers carry ``NOT_COMPARABLE``.
    """
    names = list(dict.fromkeys(record.name for record in records if record.model and record.value is not None))
    found = {(record.model, record.name): record for record in records}
    rows = []
    for variant in shown:
        weights = facts.get(variant.name, {}).get("bytes_at_16_bit")
        cells = [variant.name, bytes_text(weights)]
        for name in names:
            cells.append(_cell(found.get((variant.name, name))))
        rows.append(cells)
    marked = {record.name for record in records if record.extra.get("comparable") is False}
    return ["variant", "weights", *(f"{name} {NOT_COMPARABLE}" if name in marked else name for name in names)], rows


def _cell(record: Record | None) -> str:
    if record is None or record.value is None:
        return DASH
    if record.num_samples and record.extra.get("exact_matches") == record.num_samples:
        return "identical"
    digits = int(record.extra.get("digits", 3))
    text = number_text(record.value, digits)
    return text if record.low is None else f"{text} ({range_text(record.low, record.high, digits)})"


def markdown(cells: tuple[list[str], list[list[str]]], warnings: Sequence[str]) -> str:
    """A pipe table with a row per score, aligned to be read in a terminal, and the warnings under it."""
    head, *rows = by_score(cells)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    sides = ["<", *[">"] * len(widths[1:])]
    lines = []
    for line in (head, rule, *rows):
        each = (f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True))
        lines.append("| " + " | ".join(each) + " |")
    return "\n".join([*lines, "", *(f"- {warning}" for warning in warnings)]) + "\n"


def by_score(cells: tuple[list[str], list[list[str]]]) -> list[list[str]]:
    """Lines of the table with a row per score and a column per variant, the head first."""
    head, rows = cells
    (_, *variants), *scores = (list(column) for column in zip(head, *rows, strict=True))
    return [["score", *variants], *scores]


def latex(cells: tuple[list[str], list[list[str]]], warnings: Sequence[str] = ()) -> str:
    """A ``tabular`` with a row per score, as on the page, and the warnings under it in small print; special characters escaped."""
    head, *rows = by_score(cells)
    escaped = [" & ".join(_tex(cell) for cell in line) + r" \\" for line in [head, *rows]]
    begin = r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}"
    notes = [rf"\par{{\footnotesize {_tex(warning)}}}" for warning in warnings]
    return "\n".join([begin, r"\hline", escaped[0], r"\hline", *escaped[1:], r"\hline", r"\end{tabular}", *notes]) + "\n"


def _tex(text: str) -> str:
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    words |= {character: "\\" + character for character in "&%$#_{}"}
    words |= {"\N{MINUS SIGN}": "$-$", DASH: "--", NOT_COMPARABLE: r"\textdagger{}", "\N{LATIN SMALL LETTER E WITH ACUTE}": r"\'e"}
    return "".join(words.get(character, character) for character in text)
