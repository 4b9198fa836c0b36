"""Prompts from files: text, CSV and TSV, JSON lines, COCO captions.

.txt            one prompt per line; empty lines are skipped
.csv, .tsv      the column called prompt, Prompt, caption or text (PartiPrompts is a .tsv with Prompt)
.jsonl          an object per line with one of those keys, or a JSON string per line
.json           COCO captions: {"annotations": [{"image_id": .., "id": .., "caption": ..}, ..]}, the first caption of each image
                in the order of image ids; or a list of strings or of such objects
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "Prompt", "caption", "text")
SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".json")


def read_prompts(words: Sequence[str], num: int | None = None) -> list[str]:
    """Prompts from the command line: a file, or the prompts themselves; the first ``num`` of them.

    Raises:
        ValueError: a file that does not exist, cannot be understood or holds nothing; fewer prompts than ``num``.
    """
    if len(words) == 1 and (words[0].endswith(SUFFIXES) or os.path.isfile(words[0])):
        words = read_prompt_file(words[0])
    return first_prompts(words, num)


def first_prompts(texts: Sequence[str], num: int | None = None) -> list[str]:
    """The first ``num`` texts that are not empty. Raises ``ValueError`` for none, or for fewer than ``num``."""
    prompts = [text.strip() for text in texts if text.strip()]
    if not prompts:
        raise ValueError("prompts: list must hold at least one prompt, got none. Give a file with one per line, or the prompts.")
    if num is not None and num > len(prompts):
        raise ValueError(f"prompts: number must be at most the {len(prompts)} there are, got {num}. Ask for fewer.")
    return prompts if num is None else prompts[:num]


def read_prompt_file(path: str | Path) -> list[str]:
    """Every prompt of a file, in order. Raises ``ValueError`` that names the file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Excel writes a byte order mark
    except FileNotFoundError:
        raise ValueError(
            f"prompts: file must exist, got {path}. Give a text file with one prompt per line, or the prompts themselves."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} must be UTF-8 text, got: {error}. Save it as UTF-8.") from error
    suffix = Path(path).suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return _from_table(text, path, "," if suffix == ".csv" else "\t")
        if suffix == ".jsonl":
            return _from_lines(text, path)
        if suffix == ".json":
            return _from_json(json.loads(text), path)
    except json.JSONDecodeError as error:
        raise ValueError(f"prompts: {path} must be JSON, got: {error}. Write or copy it again.") from error
    return text.splitlines()


def _from_table(text: str, path: str | Path, delimiter: str) -> list[str]:
    reader, found = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter), []
    for row in reader:
        where = f"{path}:{reader.line_num}"
        if None in row:
            wanted = len(reader.fieldnames or ())
            raise ValueError(
                f"prompts: {where} must have as many cells as the first line ({wanted}), got {wanted + len(row[None])}. "
                f"Put quotes about a prompt that holds a {'comma' if delimiter == ',' else 'tab'}."
            )
        found.append(_prompt_of(row, where))
    return found


def _from_lines(text: str, path: str | Path) -> list[str]:
    found = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028, which JSON allows in a text
        try:
            found += [_prompt_of(json.loads(line), f"{path}:{number}")] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"prompts: {path}:{number} must be JSON, got: {error}. Mend the line.") from error
    return found


def _prompt_of(row: Any, path: str | Path) -> str:
    if isinstance(row, str):
        return row
    found = next((row[name] for name in COLUMNS if isinstance(row, dict) and isinstance(row.get(name), str)), None)
    if found is None:
        got = sorted(map(str, row)) if isinstance(row, dict) else repr(row)
        raise ValueError(f"prompts: {path} must have a column {', '.join(COLUMNS)}, got {got}. Rename yours.")
    return found


def _from_json(data: Any, path: str | Path) -> list[str]:
    if isinstance(data, list):
        return [_prompt_of(row, path) for row in data]
    annotations = data.get("annotations") if isinstance(data, dict) else None
    if not isinstance(annotations, list):
        raise ValueError(f"prompts: {path} must be a list or COCO captions (with annotations), got other JSON. See docs/jobs.md.")
    first: dict[Any, tuple[Any, str]] = {}
    for row in annotations:
        image, entry = row["image_id"], (row.get("id", 0), row["caption"])
        if image not in first or entry[0] < first[image][0]:
            first[image] = entry
    return [first[image][1] for image in sorted(first)]
