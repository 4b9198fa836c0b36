"""Stage 1: quantize what is missing, then paint every batch of every variant that is not there yet.

A batch is done when its manifest exists, says that it was made by the same model, versions and arithmetic (``identity.py``) from
the same prompts, and every file it names has the SHA-256 it names; anything else is painted again. The manifest is written last, so
a process killed in between leaves pictures that the next run replaces. It also says where and in which dtype the batch was painted:
records take their provenance from there, not from the process that computes them.

A variant that paints NaN is not painted further: its manifest says why, and its results are "not measured".
"""

import inspect
import io
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dqtk.calibrate import calibrate
from dqtk.calls import FRAME_NAMES, call_arguments, check_call_names, denoisers, makes_clips
from dqtk.installed import summary
from dqtk.plan import Plan
from dqtk.processes import Processes
from dqtk.quantize import plan as make_plan
from dqtk.quantize import quantize, save
from dqtk.report import environment
from dqtk.report.generate import NotFinite, Task, check_call_kwargs, frame_names, generate
from dqtk.report.rounding import check_rounding, other_rounding
from dqtk.report.sizes import pipeline_sizes
from dqtk.report.trajectory import compute_dtype
from dqtk.sources import load_pipeline, local_folder, meta_pipeline, pipeline_class, stored_dtype

from .files import read_json, sha256, write_bytes, write_json
from .identity import deciding_versions, model_identity, painted_by, texts_identity
from .layout import Layout, Variant
from .spec import Job

_located = cache(local_folder)  # asking the hub where a model lies is a request
NUM_CALIBRATED = 8  # prompts that static recipes are calibrated on


def plans_of(variants: Sequence[Variant]) -> dict[str, Plan]:
    """The plan of every variant that the job quantizes, by name; reads no weights. Raises ``ValueError`` for an unknown recipe."""
    return {v.name: make_plan(meta_pipeline(v.model), v.recipe) for v in variants if v.recipe is not None}


def check_models(job: Job, variants: Sequence[Variant]) -> None:
    """Raises ``ValueError`` for a model that is nowhere, for ``call`` arguments that its pipeline does not name, and for models of
    pictures beside models of clips."""
    kinds = {}
    for model in dict.fromkeys(variant.model for variant in variants):
        kind = pipeline_class(model)
        if kind is not None:
            check_call_names(kind, check_call_kwargs(job.call, "job: call"), "job: call")
            kinds[model] = makes_clips(kind) and _num_frames(kind, job.call) != 1
    check_kinds(kinds)


def _num_frames(kind: Any, call: Mapping[str, Any]) -> Any:
    """How many frames a video pipeline is asked for, by the call or else by its default; None where nobody says."""
    parameters = inspect.signature(kind.__call__).parameters
    defaults = [parameters[name].default for name in FRAME_NAMES if name in parameters]
    return next(iter([*(call[name] for name in FRAME_NAMES if name in call), *defaults]), None)


def check_kinds(of_clips: Mapping[str, bool]) -> None:
    """Raises ``ValueError`` for models (or variants) of pictures beside those of clips: no score could look at both, so nothing
    would be comparable. ``of_clips``: name -> whether it makes clips."""
    if len(set(of_clips.values())) > 1:
        clips, pictures = (next(name for name, kind in of_clips.items() if kind is wanted) for wanted in (True, False))
        raise ValueError(
            f"job: models must all make clips, or all pictures, got clips from {clips} and pictures from {pictures}. "
            "Write a job for each."
        )


def check_floors(variants: Sequence[Variant], device: Any) -> None:
    """Raises ``ValueError`` for a floor that changes nothing: the stored dtype by another name, threads of a GPU."""
    for variant in variants:
        if variant.role != "floor":
            continue
        check_rounding("job", variant.rounding, device)
        if variant.rounding is None:
            folder = _located(variant.model)
            original = next(other for other in variants if other.name == variant.original)
            chosen = [stored_dtype(folder) if v.dtype == "stored" else v.dtype for v in (variant, original)]
            if chosen[0] == chosen[1]:
                raise ValueError(
                    f"job: floor must be another dtype than that of {variant.original}, got {chosen[0]} for both. Take kernels."
                )


def quantize_missing(
    job: Job, variants: Sequence[Variant], layout: Layout, prompts: Sequence[str], plans: Mapping[str, Plan]
) -> None:
    """Quantize and save the recipes that are not in OUTPUT/models, or are of another model, plan, calibration or version.

    Static recipes are calibrated on the first 8 prompts.
    """
    for variant in variants:
        if variant.recipe is None:
            continue
        folder, note = layout.model(variant), layout.made_from(variant)
        plan = plans[variant.name]
        wanted = {
            "original": model_identity(_located(variant.model)),
            "plan": plan.hash,
            "prompts": texts_identity(prompts[:NUM_CALIBRATED]) if plan.needs_stats else None,
            "versions": deciding_versions(),
        }
        if (folder / "model_index.json").is_file() and _noted(note) == wanted:
            continue
        note.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        pipe = load_pipeline(variant.model, "stored")
        plan = make_plan(pipe, variant.recipe)
        arguments = check_call_kwargs(job.call)
        stats = calibrate(pipe, prompts[:NUM_CALIBRATED], plan, seed=job.seed, call_kwargs=arguments) if plan.needs_stats else None
        quantize(pipe, plan, stats, progress=False)
        save(pipe, folder)
        write_json(note, wanted)


def _noted(file: Path) -> Any:
    try:
        return read_json(file) if file.is_file() else None
    except ValueError:
        return None


def source_of(variant: Variant, layout: Layout) -> Path:
    """The folder that a variant's pipeline is loaded from."""
    return layout.model(variant) if variant.recipe is not None else _located(variant.model)


def maker_of(variant: Variant, layout: Layout) -> dict[str, Any]:
    """What a variant's pictures have to be painted by: see ``identity.painted_by``."""
    return painted_by(source_of(variant, layout), variant.dtype, variant.rounding)


def paint(job: Job, variants: Sequence[Variant], batches: Sequence[list[Task]], layout: Layout, processes: Processes) -> None:
    """Paint this process's share of the batches, variant by variant; a pipeline is loaded only when something is missing."""
    for variant in variants:
        mine, maker = processes.mine(batches), maker_of(variant, layout)
        todo = [(index, batch) for index, batch in mine if not is_done(layout.manifest(variant, index), batch, maker)]
        if failure_of(variant, len(batches), layout, maker) is not None:
            todo = []
        known = _noted(layout.facts(variant)) or {}
        if not todo and (not processes.first or known.get("maker") == maker):
            continue
        folder = source_of(variant, layout)
        pipe = load_pipeline(str(folder), variant.dtype, processes.device)
        if processes.first:
            write_json(layout.facts(variant), {"maker": maker} | facts(pipe, folder))
        arguments = check_call_kwargs(call_arguments(pipe, job.call), "job: call")
        check_call_names(pipe, arguments, "job: call")
        where = {"maker": maker, **provenance(pipe, processes.device)}
        with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=f"paint {variant.name}", unit="batch") as bar:
            for index, batch in todo:
                with other_rounding(variant.rounding):
                    fine = _paint_batch(pipe, batch, arguments, layout.images(variant), layout.manifest(variant, index), where)
                bar.update()
                if not fine:
                    break


def _paint_batch(
    pipe: Any, batch: list[Task], arguments: dict[str, Any], folder: Path, manifest: Path, where: dict[str, Any]
) -> bool:
    """Paint a batch and write its manifest; False where the pipeline computed NaN, which the manifest then says."""
    manifest.unlink(missing_ok=True)
    try:
        made = generate(pipe, batch, arguments)
    except NotFinite as error:
        write_json(manifest, {"samples": [_row(task) for task in batch], "failed": str(error), **where})
        return False
    rows = []
    for task, frames in zip(batch, made.clips, strict=True):
        names = frame_names(task.id, len(frames))
        files = [_write_png(folder / f"{name}.png", image) for name, image in zip(names, frames, strict=True)]
        rows.append(_row(task) | (files[0] if len(files) == 1 else {"frames": files}))
    write_json(manifest, {"samples": rows, "seconds": made.seconds, **where})
    return True


def _write_png(file: Path, image: Any) -> dict[str, str]:
    """Write a picture losslessly; its name and SHA-256."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(file, buffer.getvalue())
    return {"file": file.name, "sha256": sha256(buffer.getvalue())}


def _row(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "prompt": task.prompt,
        "prompt_index": task.prompt_index,
        "repetition": task.repetition,
        "seed": task.seed,
    }


def provenance(pipe: Any, device: Any) -> dict[str, Any]:
    """Where and in what a pipeline paints: versions, machine, compute dtype of its denoisers, hash of its plan."""
    dtypes = sorted({str(compute_dtype(module)).removeprefix("torch.") for module in denoisers(pipe).values()})
    return {
        "versions": environment.versions(),
        "hardware": environment.hardware(device),
        "dtype": ", ".join(dtypes) or "unknown",
        "plan_hash": (summary(pipe) or {}).get("hash"),
    }


def is_done(manifest: Path, batch: Sequence[Task], maker: dict[str, Any]) -> bool:
    """Whether the manifest is there, is of these samples by this maker, and every picture is what it says; or none can be."""
    if not manifest.is_file():
        return False
    try:
        found = read_json(manifest)
        samples = [{k: v for k, v in row.items() if k not in ("file", "sha256", "frames")} for row in found["samples"]]
        if found["maker"] != maker or samples != [_row(task) for task in batch]:
            return False
        if "failed" in found:
            return True
        files = [(manifest.with_name(f["file"]), f["sha256"]) for row in found["samples"] for f in row.get("frames", [row])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(file.is_file() and sha256(file) == wanted for file, wanted in files)


def failure_of(variant: Variant, num_batches: int, layout: Layout, maker: dict[str, Any]) -> str | None:
    """Why this variant cannot be painted, if some process found out."""
    for index in range(num_batches):
        found = _noted(layout.manifest(variant, index))
        if isinstance(found, dict) and "failed" in found and found.get("maker") == maker:
            return str(found["failed"])
    return None


def facts(pipe: Any, folder: Path) -> dict[str, Any]:
    """What results say of a variant beside its scores: bytes of its weights, recipe, plan hash, kernels."""
    sizes = pipeline_sizes(pipe, folder)
    plan = summary(pipe)
    return {
        "bytes_at_16_bit": sum(size.at_16_bit or 0 for size in sizes),
        "bytes_on_disk": sum(size.on_disk or 0 for size in sizes),
        "components": {size.name: {"at_16_bit": size.at_16_bit, "on_disk": size.on_disk, "zeros": size.zeros} for size in sizes},
        "recipe": (plan or {}).get("recipe"),
        "plan_hash": (plan or {}).get("hash"),
        "kernels": (plan or {}).get("kernels", {}),
    }
