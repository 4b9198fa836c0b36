"""What a job of clips found of VBench's dimensions, in VBench's own files: OUTPUT/vbench/VARIANT_eval_results.json and beside it.

Videos have the names that its program wants (``PROMPT-0.mp4``), so that results of dimensions which need that program can be laid
beside these, and models be compared by name. The job keeps frames, not videos: these paths are names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dqtk.report import environment
from dqtk.report.scores import as_published
from dqtk.resolve import vbench

from .asked import Measures, Shown
from .features import Picture
from .reduce import Values

LONG_SECONDS = 5


def write_vbench(
    folder: Path, asked: Measures, shown: Sequence[Shown], values: Mapping[str, Values], extra: Mapping[str, Any]
) -> list[str]:
    """Write the files of every variant that has one of the dimensions; returns what has to be said of them.

    Of a dimension that several extractors measured, the one that it is published with counts; where that does not decide, it is
    left out, and the provenance says so. Of still clips the first five of a prompt count, as VBench's filter keeps them.
    """
    files, said = vbench("results"), _doubts(shown, extra.get("fps"))
    for variant in shown:
        columns, unclear = _columns(asked, values[variant.name])
        if not (columns and variant.of_clips):
            continue
        try:
            videos = [vbench("suite").video_name(clip.prompt or clip.id, _repetition(clip)) for clip in variant.pictures]
        except ValueError as error:
            said.append(f"no VBench files of {variant.name}: {error}")
            continue
        results = {}
        for name, (_, column) in columns.items():
            counting = first_still(variant.prompts, column) if name == "temporal_flickering" else column
            kept = [value for value in counting if value is not None]
            if kept:
                results[name] = files.Scored(score=sum(kept) / len(kept), videos=dict(zip(videos, counting, strict=True)))
        provenance = {
            "variant": variant.name,
            "original": variant.original,
            "tools": {name: _tool(asked, tool) for name, (tool, _) in columns.items()},
            "left_out": unclear,
            "static_filter": "temporal_flickering" in columns,
            "made": dict(variant.made or {}),
            "created": environment.now(),
            **extra,
        }
        num = 1 + max(map(_repetition, variant.pictures))
        entries = _entries(variant, list(columns))
        files.write_results(folder, variant.name, results, entries, folder / variant.name, num, provenance)
    return said


def first_still(prompts: Sequence[str | None], column: Sequence[float | None], num: int = 5) -> list[float | None]:
    """The values of the first ``num`` clips of each prompt that have one; None for the others."""
    counts: dict[str | None, int] = {}
    found = []
    for prompt, value in zip(prompts, column, strict=True):
        counts[prompt] = counts.get(prompt, 0) + (value is not None)
        found.append(value if counts[prompt] <= num else None)
    return found


def _doubts(shown: Sequence[Shown], fps: float | None) -> list[str]:
    """What VBench itself would trip over: names that collide, clips that it measures in parts."""
    clips = [clip for variant in shown if variant.of_clips for clip in variant.pictures]
    said = []
    for group in vbench("suite").collisions([clip.prompt for clip in clips if clip.prompt]):
        said.append(f"videos of {' and '.join(map(repr, group))} have one name where capitals do not count")
    longest = max((len(clip.frames) for clip in clips), default=0)
    if fps is not None and longest >= LONG_SECONDS * fps:
        said.append(f"clips of {longest / fps:g} s: VBench measures those of {LONG_SECONDS} s and more in parts (VBench-Long)")
    return said


def _columns(
    asked: Measures, found: Values
) -> tuple[dict[str, tuple[str | None, list[float | None]]], dict[str, list[str | None]]]:
    """Per dimension the extractor that counts and its values; and dimensions of several extractors of which none is the
    published."""
    by_dimension: dict[str, dict[str | None, list[float | None]]] = {}
    for (score, tool), column in (found.texts | found.clips).items():
        if score in vbench("suite").DIMENSIONS:
            by_dimension.setdefault(score, {})[tool] = column
    clear, unclear = {}, {}
    for name, columns in by_dimension.items():
        proper = [tool for tool in columns if tool is not None and as_published(asked.scores[name], asked.extractors[tool])]
        counting = list(columns) if len(columns) == 1 else proper
        if len(counting) == 1:
            clear[name] = (counting[0], columns[counting[0]])
        else:
            unclear[name] = list(columns)
    return clear, unclear


def _repetition(clip: Picture) -> int:
    return int(clip.id.rpartition("-")[2])


def _tool(asked: Measures, name: str | None) -> dict[str, Any] | None:
    """What a dimension was measured with, so that nobody takes it for the published network."""
    if name is None:
        return None
    tool = asked.extractors[name]
    facts = ("name", "version", "source", "sha256", "config_sha256", "preprocess", "comparable")
    return {"asked": name, **{fact: getattr(tool, fact) for fact in facts}}


def _entries(variant: Shown, measured: Sequence[str]) -> list[Any]:
    """The prompts as entries of a suite, each with those measured dimensions that it is of."""
    entries = {}
    for clip in variant.pictures:
        prompt = clip.prompt or clip.id
        own = tuple(name for name in measured if name not in clip.left_out)
        told = {"appearance_style": {"appearance_style": clip.style}} if clip.style else {}
        entries[prompt] = vbench("suite").Entry(prompt=prompt, dimensions=own, auxiliary=told)
    return list(entries.values())
