"""What a job makes and where: variants, samples, batches, folders.

OUTPUT/job.json                     the job, its hash, versions
OUTPUT/models/VARIANT/              pipelines that the job quantized
OUTPUT/models/VARIANT.json          from what: the original's identity, plan, prompts of the calibration, versions
OUTPUT/images/VARIANT/0003-0.png    lossless pictures, named by sample id; of a clip its frames, 0003-0-00.png and so on
OUTPUT/images/VARIANT/batch-0000.json   what the batch holds: ids, prompts, seeds, SHA-256 of each file, seconds;
                                    by what and where it was painted; or why it cannot be
OUTPUT/images/VARIANT/variant.json  facts: identity, bytes, plan, kernels
OUTPUT/cache/                       features and pair scores, named by what they were made from
OUTPUT/vbench/VARIANT_eval_results.json     of clips, what was found of VBench's dimensions, in its format
OUTPUT/results.json, samples.parquet, report.md, report.tex, report.html
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtk.prompt_sets import first_prompts, read_prompt_file
from dqtk.report.generate import Task, make_tasks
from dqtk.report.rounding import ROUNDINGS
from dqtk.resolve import read_suite

from .spec import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One pipeline of a job.

    name: folder name, such as ``tiny-pixart`` or ``tiny-pixart-w4a8``. role: "original", "floor" or "candidate". model: what it is
    made from. original: name of the variant that it is compared with. recipe: what the job quantizes it with; dtype: compute dtype;
    rounding: "kernels", "threads" or None (``report/rounding.py``).
    """

    name: str
    role: str
    model: str
    original: str
    recipe: str | None
    dtype: str
    rounding: str | None = None


def variants(job: Job) -> list[Variant]:
    """Every pipeline of the job: for each model the original, its floor and its recipes; candidates belong to the first model.

    Raises ``ValueError`` where two would have one name.
    """
    found = []
    for index, model in enumerate(job.models):
        name = _slug(model)
        common: dict[str, Any] = {"original": name, "dtype": job.dtype, "recipe": None}
        found.append(Variant(name=name, role="original", model=model, **common))
        if job.floor is not None:
            change = {"rounding": job.floor} if job.floor in ROUNDINGS else {"dtype": job.floor}
            found.append(Variant(name=f"{name}-{job.floor}", role="floor", model=model, **(common | change)))
        found += [
            Variant(name=f"{name}-{recipe}", role="candidate", model=model, **(common | {"recipe": recipe}))
            for recipe in job.recipes
        ]
        if index == 0:
            found += [Variant(name=_slug(key), role="candidate", model=where, **common) for key, where in job.candidates.items()]
    names = [variant.name for variant in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"job: names of models and candidates must differ, got {', '.join(twice)} twice. Rename a candidate.")
    return found


def _slug(text: str) -> str:
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in text.rstrip("/").split("/")[-1])
    return kept.strip("-.") or "model"


def prompts_of(job: Job) -> list[str]:
    """The job's prompts. Raises ``ValueError`` for a bad file, none or too few."""
    if job.prompts.suite is not None:
        return first_prompts([entry.prompt for entry in suite_of(job)], job.prompts.num)
    texts = read_prompt_file(job.prompts.file) if job.prompts.file is not None else list(job.prompts.texts)
    return first_prompts(texts, job.prompts.num)


def suite_of(job: Job) -> list[Any]:
    """What a VBench suite says of the job's prompts (``metrics/vbench/suite.py``), in order; none without one."""
    if job.prompts.suite is None:
        return []
    return read_suite(job.prompts.suite, job.prompts.dimensions)


def batches(job: Job, prompts: Sequence[str]) -> list[list[Task]]:
    """The samples in batches, cut by the job alone: the number of processes changes nothing."""
    tasks = make_tasks(prompts, job.seed, job.seeds_per_prompt)
    return [tasks[start : start + job.batch_size] for start in range(0, len(tasks), job.batch_size)]


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of a job's output folder."""

    root: Path

    def model(self, variant: Variant) -> Path:
        return self.root / "models" / variant.name

    def made_from(self, variant: Variant) -> Path:
        return self.root / "models" / f"{variant.name}.json"

    def images(self, variant: Variant) -> Path:
        return self.root / "images" / variant.name

    def manifest(self, variant: Variant, batch: int) -> Path:
        return self.images(variant) / f"batch-{batch:04d}.json"

    def facts(self, variant: Variant) -> Path:
        return self.images(variant) / "variant.json"

    @property
    def cache(self) -> Path:
        return self.root / "cache"
