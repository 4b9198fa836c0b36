"""A suite of prompts in VBench's format (``VBench_full_info.json``), and the names of its videos.

A list of objects: ``prompt_en``; ``dimension``, the names of those it is measured in; in some ``auxiliary_info``, per dimension
what its score has to know (an object's name, a style). The published suite is 946 entries of 944 different prompts, two of which
differ in capitals only. Videos are called ``PROMPT-INDEX.mp4``, so that equal prompts share their videos, and those two overwrite
each other on a disk that does not tell capitals apart.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUALITY = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "aesthetic_quality",
    "imaging_quality",
    "dynamic_degree",
)
SEMANTIC = (
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
    "temporal_style",
    "overall_consistency",
)
DIMENSIONS = (*QUALITY, *SEMANTIC)
LONGEST_NAME = 255  # bytes, of most file systems


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One prompt, what it is measured in, and what scores have to know; of equal prompts all of it together.

    ``left_out``: dimensions that its suite has, but not for this prompt.
    """

    prompt: str
    dimensions: tuple[str, ...]
    auxiliary: Mapping[str, Any] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()

    @property
    def style(self) -> str | None:
        """The text that appearance_style compares frames with."""
        told = self.auxiliary.get("appearance_style")
        return told.get("appearance_style") if isinstance(told, Mapping) else told


def read_suite(path: str | Path, dimensions: Sequence[str] = ()) -> list[Entry]:
    """The different prompts of a suite in order: those that have one of ``dimensions``, or (none named) all.

    Raises ``ValueError`` that names the file: not a suite, a dimension that it lacks, equal prompts that contradict each other.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"suite: file must exist, got {path}. VBench's is VBench_full_info.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"suite: {path} must be JSON, got: {error}. Download it again.") from error
    if not isinstance(data, list) or not data:
        raise ValueError(f"suite: {path} must be a list of prompts, got {type(data).__name__}. See docs/video.md.")
    return merged([_entry(row, f"{path}: entry {number}") for number, row in enumerate(data)], dimensions, str(path))


def _entry(row: Any, where: str) -> Entry:
    fine = isinstance(row, dict) and isinstance(row.get("prompt_en"), str) and row["prompt_en"].strip()
    named = row.get("dimension") if fine else None
    if not isinstance(named, list) or not named or not all(isinstance(name, str) for name in named):
        raise ValueError(f"suite: {where} must have prompt_en and dimension (a list of names), got {row!r:.80}. Mend it.")
    told = row.get("auxiliary_info") or {}
    if not isinstance(told, dict):
        raise ValueError(f"suite: {where} must have an object as auxiliary_info, got {told!r:.60}. Mend it.")
    return Entry(prompt=row["prompt_en"], dimensions=tuple(named), auxiliary=told)


def merged(entries: Sequence[Entry], dimensions: Sequence[str] = (), where: str = "suite") -> list[Entry]:
    """Equal prompts as one with the dimensions of all; those that have one of ``dimensions``, or (none named) all.

    Raises ``ValueError`` for a dimension that no entry has, and for equal prompts of which one dimension is told different things.
    """
    every = list(dict.fromkeys(name for entry in entries for name in entry.dimensions))
    unknown = [name for name in dimensions if name not in every]
    if unknown:
        raise ValueError(
            f"suite: dimensions of {where} must be among {', '.join(every)}, got {', '.join(unknown)}. Check the names."
        )
    names: dict[str, dict[str, None]] = {}
    told: dict[str, dict[str, Any]] = {}
    for entry in entries:
        names.setdefault(entry.prompt, {}).update(dict.fromkeys(entry.dimensions))
        known = told.setdefault(entry.prompt, {})
        for name, value in entry.auxiliary.items():
            if known.setdefault(name, value) != value:
                raise ValueError(
                    f"suite: {where} must tell one thing of {name} for {entry.prompt!r:.60}, got {known[name]!r} and {value!r}. "
                    "Mend it."
                )
    found = [
        Entry(prompt=prompt, dimensions=tuple(own), auxiliary=told[prompt], left_out=frozenset(every) - set(own))
        for prompt, own in names.items()
    ]
    return [entry for entry in found if not dimensions or set(dimensions) & set(entry.dimensions)]


def collisions(prompts: Sequence[str]) -> list[list[str]]:
    """Groups of different prompts whose videos would overwrite each other where capitals do not count."""
    groups: dict[str, list[str]] = {}
    for prompt in dict.fromkeys(prompts):
        groups.setdefault(prompt.casefold(), []).append(prompt)
    return [group for group in groups.values() if len(group) > 1]


def video_name(prompt: str, index: int, suffix: str = ".mp4") -> str:
    """``PROMPT-INDEX.mp4``. Raises ``ValueError`` for what cannot be a file's name."""
    name = f"{prompt}-{index}{suffix}"
    if "/" in name or "\0" in name or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"suite: a prompt must be usable as a file's name (no slash, at most {LONGEST_NAME} bytes with -{index}{suffix}), "
            f"got {prompt!r:.80}. Shorten it."
        )
    return name


def prompt_of_name(name: str) -> tuple[str, int]:
    """The prompt and index of a video's base name. Raises ``ValueError`` for another name."""
    stem, _, index = name.rpartition(".")[0].rpartition("-")
    if not stem or not index.isdigit():
        raise ValueError(f"suite: a video must be called PROMPT-INDEX.mp4, got {name!r}. Rename it.")
    return stem, int(index)
