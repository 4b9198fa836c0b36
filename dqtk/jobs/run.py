"""``dqtk run job.yaml``: the four stages in order, by one process or by many (``torchrun -m dqtk run job.yaml``)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dqtk.processes import processes
from dqtk.report.records import Record

from .asked import Shown, fitting, measures, with_oracle
from .doubts import learned_here, result_names, warnings_of
from .features import Picture, clip_of
from .files import read_json, remove_partials, write_json
from .folders import folder_batches
from .gates import Gate, check_gates
from .generate import check_floors, check_kinds, check_models, failure_of, is_done, maker_of, paint, plans_of, quantize_missing
from .layout import Layout, Variant, batches, prompts_of, suite_of, variants
from .measure import observe, reduce
from .presets import deviations
from .results import write_results
from .spec import DECIDING, Job, to_json
from .vbench_files import write_vbench


def run(job: Job, gates: Sequence[Gate] = ()) -> list[Record]:
    """Do what is missing of the job, and write its results; returns the records (in every process; the first computes them).

    Args:
        gates: conditions whose names are checked before anything is painted; ``tripped`` judges them afterwards.
    Raises:
        ValueError: a bad job, an unknown model, recipe, metric or name of a gate, or models of clips beside models of pictures (no
            folder is claimed then); a folder of another job, a damaged picture, or originals that paint NaN.
    """
    me = processes()
    torch.set_num_threads(job.threads)
    layout = Layout(Path(job.output))
    everyone, prompts = variants(job), prompts_of(job)
    work = batches(job, prompts)
    asked = measures(job.metrics, job.extractors, me.device, job.workers)  # wrong names fail before any picture is painted
    references = folder_batches(job.references) if job.references is not None else []
    paired = any(variant.role != "original" for variant in everyone)
    check_gates(gates, result_names(asked, job.metrics, paired=paired, real=bool(references)))
    if me.first:
        check_models(job, everyone)
        plans = plans_of(everyone)
        check_floors(everyone, me.device)
        claim(layout.root, "job.json", {"hash": job.hash, "job": to_json(job)}, "job", DECIDING)
        quantize_missing(job, everyone, layout, prompts, plans)
    me.wait()
    paint(job, everyone, work, layout, me)
    me.wait()
    makers = {variant.name: maker_of(variant, layout) for variant in everyone}
    failed = _failed(everyone, len(work), layout, makers)
    painted = [variant for variant in everyone if variant.name not in failed]
    if not painted:
        raise ValueError(f"job: at least one original must paint pictures, got none: {next(iter(failed.values()))}")
    _check_painted(painted, work, layout, makers)
    suite = {entry.prompt: entry for entry in suite_of(job)}
    shown = [_shown(variant, work, layout, suite) for variant in painted]
    check_kinds({variant.name: variant.of_clips for variant in shown})  # of pipelines of somebody's own nobody knew beforehand
    asked = fitting(with_oracle(asked, job.metrics, shown), shown)
    observe(asked, shown, references, layout.cache, me, job.fps)
    me.wait()
    if me.first:
        extra = {"job": job.hash, "dtype": job.dtype, "call": job.call, "num_prompts": len(prompts)}
        extra |= {"fps": job.fps} if job.fps is not None else {}
        records, values = reduce(
            asked, shown, references, layout.cache, job.seed, extra, device=me.device, failed=failed, fps=job.fps
        )
        facts = {variant.name: _facts(variant, work, layout) for variant in painted}
        facts |= {v.name: {"role": v.role, "original": v.original, "failed": failed[v.name]} for v in everyone if v.name in failed}
        said = [*warnings_of(asked, shown, references), *learned_here(job.recipes), *deviations(to_json(job), len(prompts))]
        said += write_vbench(layout.root / "vbench", asked, shown, values, extra)
        write_results(layout.root, to_json(job), shown, records, values, facts, said)
    me.wait()
    return records if me.first else read_results(layout.root / "results.json")


def read_results(file: Path) -> list[Record]:
    """The records of a ``results.json``."""
    return [Record.from_json(json.dumps(row), str(file)) for row in read_json(file)["results"]]


def _failed(everyone: Sequence[Variant], num_batches: int, layout: Layout, makers: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Variants that paint NaN, and those whose original does: name -> why."""
    found = {}
    for variant in everyone:
        why = failure_of(variant, num_batches, layout, makers[variant.name])
        if why is not None:
            found[variant.name] = why
    for variant in everyone:
        if variant.original in found and variant.name not in found:
            found[variant.name] = f"its original {variant.original} has no pictures: {found[variant.original]}"
    return found


def claim(folder: Path, name: str, data: dict[str, Any], verb: str, deciding: Sequence[str]) -> None:
    """Make the folder this one's. Raises ``ValueError`` where it is another's (its files would be taken for this one's), and where
    nothing can be written.

    ``data``: under ``verb`` what it is of; what of that is ``deciding`` must be the same.
    """
    try:
        _claim(folder, name, json.loads(json.dumps(data)), verb, deciding)
    except OSError as error:
        raise ValueError(f"{verb}: output {folder} must be a folder to write in, got: {error.strerror}. Choose another.") from error


def _claim(folder: Path, name: str, data: dict[str, Any], verb: str, deciding: Sequence[str]) -> None:
    file = folder / name
    if file.is_file():
        try:
            told = read_json(file)[verb]
            changed = sorted(key for key in deciding if told[key] != data[verb][key])
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{verb}: {file} must be readable, got a damaged one. Choose another output, or remove the folder."
            ) from None
        if changed:
            raise ValueError(
                f"{verb}: output {folder} must belong to this {verb}, got another's (different: {', '.join(changed)}). "
                "Choose another output, or remove it."
            )
        remove_partials(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{verb}: output must be a new or empty folder, or this {verb}'s own, got {folder}. Choose another.")
    write_json(file, data)


def _check_painted(
    everyone: Sequence[Variant], work: Sequence[Sequence[Any]], layout: Layout, makers: Mapping[str, dict[str, Any]]
) -> None:
    for variant in everyone:
        maker = makers[variant.name]
        missing = [index for index, batch in enumerate(work) if not is_done(layout.manifest(variant, index), batch, maker)]
        if missing:
            raise ValueError(
                f"job: every batch of {variant.name} must be painted, got {len(missing)} missing, first {missing[0]}. "
                "A process stopped early; run the job again."
            )


def _shown(variant: Variant, work: Sequence[Sequence[Any]], layout: Layout, suite: Mapping[str, Any]) -> Shown:
    folder = layout.images(variant)
    manifests = [read_json(layout.manifest(variant, index)) for index in range(len(work))]
    found = [[_sample(folder, row, suite.get(row["prompt"])) for row in manifest["samples"]] for manifest in manifests]
    made = {
        "versions": _joined([manifest["versions"] for manifest in manifests]),
        "hardware": _joined([manifest["hardware"] for manifest in manifests]),
        "dtype": manifests[0]["dtype"],  # the same maker, so the same in all
        "plan_hash": manifests[0]["plan_hash"],
    }
    return Shown(name=variant.name, role=variant.role, original=variant.original, batches=found, made=made)


def _sample(folder: Path, row: Mapping[str, Any], entry: Any) -> Picture:
    """A picture or clip of a manifest; ``entry``: what the job's suite says of its prompt."""
    told = {"style": entry.style, "left_out": entry.left_out} if entry is not None else {}
    frames = [
        Picture(
            id=row["id"],
            prompt=row["prompt"],
            prompt_index=row["prompt_index"],
            file=folder / frame["file"],
            sha256=frame["sha256"],
            painted=True,
            seed=row["seed"],
            **told,
        )
        for frame in row.get("frames", [row])
    ]
    return clip_of(frames, row["id"]) if "frames" in row else frames[0]


def _joined(maps: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What every batch says, or all that they say where they differ (a job that two machines painted)."""
    names = dict.fromkeys(name for known in maps for name in known)
    return {name: " and ".join(dict.fromkeys(known[name] for known in maps if name in known)) for name in names}


def _facts(variant: Variant, work: Sequence[Sequence[Any]], layout: Layout) -> dict[str, Any]:
    manifests = [read_json(layout.manifest(variant, index)) for index in range(len(work))]
    seconds = sum(manifest["seconds"] for manifest in manifests) / sum(len(manifest["samples"]) for manifest in manifests)
    # Not interleaved with the original: a hint, not a measurement. dqtk compare measures.
    return read_json(layout.facts(variant)) | {"seconds_per_image_hint": seconds}
