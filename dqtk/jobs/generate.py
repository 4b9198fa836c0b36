"""Stage 1: quantize what is missing, then paint every batch of every variant that is not there yet.

A batch is done when its manifest exists and every file it names has the SHA-256 it names; anything else is painted again. The
manifest is written last, so a process killed in between leaves pictures that the next run replaces.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dqtk.calibrate import calibrate
from dqtk.calls import call_arguments
from dqtk.installed import summary
from dqtk.quantize import plan as make_plan
from dqtk.quantize import quantize, save
from dqtk.report.generate import Task, generate
from dqtk.report.rounding import other_rounding
from dqtk.report.sizes import pipeline_sizes
from dqtk.sources import load_pipeline, local_folder

from .files import read_json, sha256, write_bytes, write_json
from .layout import Layout, Variant
from .processes import Processes
from .spec import Job


def quantize_missing(job: Job, variants: Sequence[Variant], layout: Layout, prompts: Sequence[str]) -> None:
    """Quantize and save the recipes that are not in OUTPUT/models. Static recipes are calibrated on the first 8 prompts."""
    for variant in variants:
        folder = layout.model(variant)
        if variant.recipe is None or (folder / "model_index.json").is_file():
            continue
        pipe = load_pipeline(variant.model, "stored")
        plan = make_plan(pipe, variant.recipe)
        stats = calibrate(pipe, prompts[:8], plan, seed=job.seed, call_kwargs=job.call) if plan.needs_stats else None
        quantize(pipe, plan, stats, progress=False)
        save(pipe, folder)


def paint(job: Job, variants: Sequence[Variant], batches: Sequence[list[Task]], layout: Layout, processes: Processes) -> None:
    """Paint this process's share of the batches, variant by variant; a pipeline is loaded only when something is missing."""
    for variant in variants:
        mine = processes.mine(batches)
        todo = [(index, batch) for index, batch in mine if not is_done(layout.manifest(variant, index), batch)]
        if not todo and (not processes.first or layout.facts(variant).is_file()):
            continue
        folder = layout.model(variant) if variant.recipe is not None else local_folder(variant.model)
        pipe = load_pipeline(str(folder), variant.dtype, processes.device)
        if processes.first:
            write_json(layout.facts(variant), facts(pipe, folder))
        arguments = call_arguments(pipe, job.call)
        with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=f"paint {variant.name}", unit="batch") as bar:
            for index, batch in todo:
                with other_rounding(variant.rounding):
                    _paint_batch(pipe, batch, arguments, layout.images(variant), layout.manifest(variant, index))
                bar.update()


def _paint_batch(pipe: Any, batch: list[Task], arguments: dict[str, Any], folder: Path, manifest: Path) -> None:
    manifest.unlink(missing_ok=True)
    made = generate(pipe, batch, arguments)
    rows = []
    for task, image in zip(batch, made.images, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        file = folder / f"{task.id}.png"
        write_bytes(file, buffer.getvalue())
        rows.append(_row(task) | {"file": file.name, "sha256": sha256(buffer.getvalue())})
    write_json(manifest, {"samples": rows, "seconds": made.seconds})


def _row(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": task.prompt,
        "prompt_index": task.prompt_index,
        "repetition": task.repetition,
        "seed": task.seed,
    }


def is_done(manifest: Path, batch: Sequence[Task]) -> bool:
    """Whether the manifest is there, is of these samples, and every picture is what it says."""
    if not manifest.is_file():
        return False
    try:
        samples = read_json(manifest)["samples"]
    except (ValueError, KeyError, TypeError):
        return False
    if [{k: v for k, v in row.items() if k not in ("file", "sha256")} for row in samples] != [_row(task) for task in batch]:
        return False
    files = [(manifest.with_name(row["file"]), row["sha256"]) for row in samples]
    return all(file.is_file() and sha256(file) == wanted for file, wanted in files)


def facts(pipe: Any, folder: Path) -> dict[str, Any]:
    """What results say of a variant beside its scores: bytes of its weights, recipe, plan hash, kernels."""
    sizes = pipeline_sizes(pipe, folder)
    plan = summary(pipe)
    return {
        "bytes_at_16_bit": sum(size.at_16_bit or 0 for size in sizes),
        "bytes_on_disk": sum(size.on_disk or 0 for size in sizes),
        "components": {size.name: {"at_16_bit": size.at_16_bit, "on_disk": size.on_disk} for size in sizes},
        "recipe": (plan or {}).get("recipe"),
        "plan_hash": (plan or {}).get("hash"),
        "kernels": (plan or {}).get("kernels", {}),
    }
