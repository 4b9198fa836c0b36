"""A job as data, read strictly from a YAML file::

name: first look
models: [tiny-pixart]
recipes: [w8a8, w4a8]            # quantized by the job, saved in OUTPUT/models
candidates: {mine: out/mine}     # pipelines that exist already, compared with the first model
floor: bfloat16                  # the originals again: another dtype, other "kernels" or "threads"; or null
prompts: {file: prompts.txt, num: 24}   # or {suite: VBench_full_info.json, dimensions: [scene]}
seed: 0
seeds_per_prompt: 1
call: {num_inference_steps: 20}
dtype: float32
metrics: [psnr, ssim, oracle, clip_score, frechet]
extractors: [tiny-clip]
references: photos/              # pictures of the world for the vs_real scores; or null
batch_size: 8
threads: 2                       # per process; another number of threads rounds differently
fps: 8                           # frames per second that clips are meant for; null
output: out/job
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dqtk.report.generate import check_call_kwargs
from dqtk.report.rounding import ROUNDINGS
from dqtk.spec import did_you_mean

from .presets import filled, preset_named
from .worker import words_of

DTYPES = ("stored", "float32", "bfloat16", "float16")
FLOORS = (*DTYPES, *ROUNDINGS)
# Fields that came later: left out where they say nothing, so that older folders are known.
_LATER = ("suite", "dimensions", "fps", "workers", "preset")
DECIDING = ("prompts", "seed", "seeds_per_prompt", "call", "dtype", "batch_size", "threads")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """A file of prompts (see ``prompt_sets``), a suite in VBench's format (of it the prompts of some ``dimensions``; none named:
    all), or the prompts themselves; the first ``num`` of them."""

    file: str | None = None
    texts: tuple[str, ...] = ()
    num: int | None = None
    suite: str | None = None
    dimensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = sum((self.file is not None, bool(self.texts), self.suite is not None))
        if given != 1:
            raise ValueError(
                "job: prompts must have one of file, suite and texts, got several or none. For example {file: prompts.txt}."
            )
        if self.dimensions and self.suite is None:
            raise ValueError("job: prompts.dimensions must come with a suite, got none. Name the suite's file.")
        if self.num is not None and not (isinstance(self.num, int) and self.num > 0):
            raise ValueError(f"job: prompts.num must be a positive count, got {self.num!r}. Leave it out for all.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a job file says; see the module's docstring. Relative paths are relative to the working directory."""

    name: str
    models: tuple[str, ...]
    prompts: PromptSet
    metrics: tuple[str, ...]
    output: str
    recipes: tuple[str, ...] = ()
    candidates: dict[str, str] = field(default_factory=dict)
    floor: str | None = None
    seed: int = 0
    seeds_per_prompt: int = 1
    call: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    extractors: tuple[str, ...] = ()
    references: str | None = None
    batch_size: int = 8
    threads: int = 1
    fps: int | float | None = None
    workers: dict[str, str] = field(default_factory=dict)
    preset: str | None = None

    def __post_init__(self) -> None:
        for name in ("seeds_per_prompt", "batch_size", "threads"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"job: {name} must be a positive count, got {value!r}. Mend the job file.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"job: fps must be a positive frame rate, got {self.fps!r}. Mend the job file.")
        if self.seed < 0:
            raise ValueError(f"job: seed must be 0 or more, got {self.seed}. Mend the job file.")
        for name, allowed in (("dtype", DTYPES), ("floor", (None, *FLOORS))):
            value = getattr(self, name)
            if value not in allowed:
                words = [word for word in allowed if word]
                raise ValueError(f"job: {name} must be one of {', '.join(words)}, got {value!r}.{did_you_mean(value, words)}")
        for name in ("models", "metrics"):
            if not getattr(self, name):
                raise ValueError(f"job: {name} must hold at least one entry, got none. Mend the job file.")
        if self.floor == self.dtype:
            raise ValueError(f"job: floor must be another rounding than dtype, got {self.floor!r} for both. Take kernels.")
        check_call_kwargs(self.call, "job: call")
        for key, where in self.candidates.items():
            if not (isinstance(key, str) and isinstance(where, str)):
                raise ValueError(
                    f"job: candidates must map names to folders or hub ids, got {key!r}: {where!r}. Mend the job file."
                )
        check_workers(self.workers, "job: workers")
        if self.preset is not None:
            preset_named(self.preset)
        taken = sorted(set(self.candidates) & set(self.recipes))
        if taken:
            raise ValueError(f"job: names of candidates must differ from recipes, got {taken}. Rename them.")

    @property
    def hash(self) -> str:
        """16 hex digits over what moves every picture (``DECIDING``), which may not change while a job is resumed in one folder.

        Models, recipes, candidates and floors have pictures of their own each, that know by what they were painted.
        """
        known = to_json(self)
        text = json.dumps({name: known[name] for name in sorted(DECIDING)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_workers(workers: Any, where: str) -> None:
    """Raises ``ValueError`` for anything but names (letters, digits, _, -) and commands, and for quotes that do not close."""
    for name, command in workers.items():
        if not (isinstance(name, str) and isinstance(command, str) and command.strip() and re.fullmatch(r"[A-Za-z][\w-]*", name)):
            raise ValueError(
                f"{where} must map names of scores to commands, got {name!r}: {command!r}. For example mine: python worker.py."
            )
        words_of(command, f"{where}: the command of {name}")


class _Strict(yaml.SafeLoader):
    """YAML whose keys come once: PyYAML takes the last and forgets the rest."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_job(path: str | Path) -> Job:
    """The job of a YAML file. Raises ``ValueError`` that names the file and the field."""
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_Strict)  # a SafeLoader
    except FileNotFoundError:
        raise ValueError(f"job: file must exist, got {path}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"job: {path} must be YAML, got: {' '.join(str(error).split())}. Mend the file.") from error
    if not isinstance(data, dict):
        raise ValueError(f"job: {path} must be a mapping of fields, got {type(data).__name__}. See docs/jobs.md.")
    if isinstance(data.get("prompts"), (str, list)):
        given = data["prompts"]
        data["prompts"] = {"file": given} if isinstance(given, str) else {"texts": given}
    if "prompts" in data:
        data["prompts"] = _build(PromptSet, data["prompts"], f"{path}: prompts")
    return _build(Job, filled(data), str(path))


def _build(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"job: {where} must be a mapping of fields, got {data!r}. See docs/jobs.md.")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name in data:
        if name not in fields:
            raise ValueError(f"job: {where} must have fields among {', '.join(fields)}, got {name!r}.{did_you_mean(name, fields)}")
    required = dataclasses.MISSING
    missing = [n for n, f in fields.items() if f.default is required and f.default_factory is required and n not in data]
    if missing:
        raise ValueError(f"job: {where} must have {', '.join(missing)}, got only {', '.join(map(str, data))}. Add them.")
    return kind(**{name: _value(name, value, fields[name].type, where) for name, value in data.items()})


def _value(name: str, value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the field's type; lists become tuples. Anything else is an error."""
    if hint == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
            raise ValueError(f"job: {where}: {name} must be a list of texts, got {value!r}. Write [a, b].")
        return tuple(value)
    nothing = type(None)
    allowed = {
        str: str,
        int: int,
        dict[str, str]: dict,
        dict[str, Any]: dict,
        str | None: (str, nothing),
        int | None: (int, nothing),
        int | float | None: (int, float, nothing),
    }
    kinds: Any = allowed.get(hint)
    if kinds is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        raise ValueError(f"job: {where}: {name} must be {getattr(hint, '__name__', hint)}, got {value!r}. Mend the job file.")
    return value


def to_json(value: Any) -> Any:
    """A job or a part of it as JSON-clean data."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: part for name, part in named.items() if part or name not in _LATER}
    return list(value) if isinstance(value, tuple) else value
