"""``dqtk run job.yaml``: the four stages in order, by one process or by many (``accelerate launch -m dqtk run job.yaml``)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dqtk.report.records import Record

from .features import Picture
from .files import read_json, read_json_lines, remove_partials, sha256, write_json
from .generate import is_done, paint, quantize_missing
from .layout import Layout, Variant, batches, prompts_of, variants
from .measure import Measures, Shown, measures, observe, reduce, warnings_of, with_oracle
from .processes import Processes, processes
from .results import write_results
from .spec import Job, to_json

IMAGE_SUFFIXES = (".png", ".webp", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
CHUNK = 32  # pictures per feature file of folders, whose batches no job has cut


def run(job: Job) -> list[Record]:
    """Do what is missing of the job, and write its results; returns the records (in every process).

    Raises:
        ValueError: a bad job, a folder of another job, or a damaged picture.
    """
    me = processes()
    torch.set_num_threads(job.threads)
    layout = Layout(Path(job.output))
    everyone, prompts = variants(job), prompts_of(job)
    work = batches(job, prompts)
    asked = measures(job.metrics, job.extractors, me.device)  # wrong names fail before any picture is painted
    references = folder_batches(job.references) if job.references is not None else []
    if me.first:
        _claim(job, layout)
        quantize_missing(job, everyone, layout, prompts)
    me.wait()
    paint(job, everyone, work, layout, me)
    me.wait()
    _check_painted(everyone, work, layout)
    shown = [_shown(variant, work, layout) for variant in everyone]
    asked = with_oracle(asked, job.metrics, shown)
    observe(asked, shown, references, layout.cache, me)
    me.wait()
    extra = {"job": job.hash, "dtype": job.dtype, "call": job.call, "num_prompts": len(prompts)}
    records, values = reduce(asked, shown, references, layout.cache, job.seed, extra)
    if me.first:
        facts = {variant.name: _facts(variant, work, layout) for variant in everyone}
        said = warnings_of(asked, shown, references)
        write_results(layout.root, to_json(job), shown, records, values, facts, said)
    me.wait()
    return records


def _claim(job: Job, layout: Layout) -> None:
    """Make the folder this job's. Raises ``ValueError`` where it is another's: its pictures would be taken for this one's."""
    file = layout.root / "job.json"
    if file.is_file():
        before = read_json(file)
        if before["hash"] != job.hash:
            changed = sorted(k for k, v in to_json(job).items() if k in before["job"] and before["job"][k] != v)
            raise ValueError(
                f"job: output {layout.root} must belong to this job, got another's (different: {', '.join(changed)}). "
                "Choose another output, or remove it."
            )
        remove_partials(layout.root)
    elif layout.root.exists() and any(layout.root.iterdir()):
        raise ValueError(f"job: output must be a new or empty folder, or this job's own, got {layout.root}. Choose another.")
    write_json(file, {"hash": job.hash, "job": to_json(job)})


def _check_painted(everyone: Sequence[Variant], work: Sequence[Sequence[Any]], layout: Layout) -> None:
    for variant in everyone:
        missing = [index for index, batch in enumerate(work) if not is_done(layout.manifest(variant, index), batch)]
        if missing:
            raise ValueError(
                f"job: every batch of {variant.name} must be painted, got {len(missing)} missing, first {missing[0]}. "
                "A process stopped early; run the job again."
            )


def _shown(variant: Variant, work: Sequence[Sequence[Any]], layout: Layout) -> Shown:
    found = []
    for index in range(len(work)):
        rows = read_json(layout.manifest(variant, index))["samples"]
        folder = layout.images(variant)
        found.append(
            [
                Picture(
                    id=row["id"],
                    prompt=row["prompt"],
                    prompt_index=row["prompt_index"],
                    file=folder / row["file"],
                    sha256=row["sha256"],
                )
                for row in rows
            ]
        )
    return Shown(name=variant.name, role=variant.role, original=variant.original, batches=found)


def _facts(variant: Variant, work: Sequence[Sequence[Any]], layout: Layout) -> dict[str, Any]:
    manifests = [read_json(layout.manifest(variant, index)) for index in range(len(work))]
    seconds = sum(manifest["seconds"] for manifest in manifests) / sum(len(manifest["samples"]) for manifest in manifests)
    # Not interleaved with the original: a hint, not a measurement. dqtk compare measures.
    return read_json(layout.facts(variant)) | {"seconds_per_image_hint": seconds}


# --- folders of pictures ---------------------------------------------------------------------------------------------


def folder_pictures(folder: str | Path) -> list[Picture]:
    """Pictures of a folder by name. Prompts come from ``prompts.jsonl`` beside them (``dqtk generate`` writes it), if there.

    Raises:
        ValueError: no folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"pictures: folder must exist, got {folder}. Check the path.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"pictures: {folder} must hold pictures ({', '.join(IMAGE_SUFFIXES)}), got none. Check the path.")
    known = _prompts_beside(folder)
    order = {prompt: index for index, prompt in enumerate(dict.fromkeys(known.values()))}
    return [
        Picture(
            id=file.stem,
            prompt=known.get(file.stem),
            prompt_index=order.get(known.get(file.stem, ""), index),
            file=file,
            sha256=sha256(file),
        )
        for index, file in enumerate(files)
    ]


def _prompts_beside(folder: Path) -> dict[str, str]:
    file = folder / "prompts.jsonl"
    if not file.is_file():
        return {}
    return {row["id"]: row["prompt"] for row in read_json_lines(file)}


def folder_batches(folder: str | Path) -> list[list[Picture]]:
    """The pictures of a folder in chunks."""
    pictures = folder_pictures(folder)
    return [pictures[start : start + CHUNK] for start in range(0, len(pictures), CHUNK)]


def evaluate(
    reference: str | Path,
    candidate: str | Path,
    output: str | Path,
    *,
    metrics: Sequence[str],
    extractors: Sequence[str] = (),
    unpaired: bool = False,
    seed: int = 0,
) -> list[Record]:
    """``dqtk evaluate A/ B/``: two folders of pictures, without any model. Pictures of one name are a pair.

    Args:
        reference, candidate: folders.
        output: folder for results and features; new, empty, or that of an earlier evaluation.
        metrics, extractors: as in a job.
        unpaired: the folders are of one world but not picture by picture the same; only distances of sets are taken.
        seed: of the bootstrap.
    Returns:
        Records, which are also in ``output``.
    Raises:
        ValueError: names that do not match, unknown metrics, unreadable pictures.
    """
    first, second = folder_pictures(reference), folder_pictures(candidate)
    if not unpaired and [p.id for p in first] != [p.id for p in second]:
        alone = sorted({p.id for p in first} ^ {p.id for p in second})
        raise ValueError(
            f"evaluate: both folders must hold pictures of the same names, got {len(alone)} without a partner, such as {alone[0]}. "
            "Pass --unpaired to compare the sets only."
        )
    names = list(metrics)
    asked = measures(names, extractors)
    folder = Path(output)
    chunks = [[side[i : i + CHUNK] for i in range(0, len(side), CHUNK)] for side in (first, second)]
    a, b = Path(reference).name or "reference", Path(candidate).name or "candidate"
    a, b = (a, b) if a != b else (f"{a} (reference)", f"{b} (candidate)")
    me = Processes(0, 1, torch.device("cpu"), lambda: None)
    if unpaired:
        asked = _only_sets(asked)
        shown = [Shown(name=b, role="original", original=b, batches=chunks[1])]
        references = chunks[0]
    else:
        shown = [
            Shown(name=a, role="original", original=a, batches=chunks[0]),
            Shown(name=b, role="candidate", original=a, batches=chunks[1]),
        ]
        references = []
    asked = with_oracle(asked, names, shown)
    observe(asked, shown, references, folder / "cache", me)
    extra = {"reference": str(reference), "candidate": str(candidate)}
    records, values = reduce(asked, shown, references, folder / "cache", seed, extra)
    job = {"name": f"{b} against {a}", "metrics": names, "extractors": list(extractors), "paired": not unpaired}
    write_results(folder, job, shown, records, values, {}, warnings_of(asked, shown, references))
    return records


def _only_sets(asked: Measures) -> Measures:
    kept = {name: score for name, score in asked.scores.items() if type(score).__name__ in ("SetScore", "ClassScore", "TextScore")}
    return replace(asked, scores=kept, pairs={})
