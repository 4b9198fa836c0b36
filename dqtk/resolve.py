"""The one place that finds things outside the engine, lazily and by name: families in ``dqtk.pipelines``, scores in
``dqtk.metrics``.

A family file may define ``ADAPTER`` (a ``sites.Adapter``) and ``call_kwargs(pipe) -> dict`` (arguments that the pipeline needs
at this size). Importing one imports no model library.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from .sites import DENOISERS, Adapter
from .spec import did_you_mean


@cache
def families() -> tuple[ModuleType, ...]:
    """The modules of ``dqtk.pipelines``, one per family."""
    package = importlib.import_module("dqtk.pipelines")
    return tuple(
        importlib.import_module(f"dqtk.pipelines.{info.name}") for info in pkgutil.iter_modules(package.__path__) if not info.ispkg
    )


@cache
def adapters() -> dict[str, Adapter]:
    """Denoiser class name -> adapter."""
    found: dict[str, Adapter] = {}
    for family in families():
        adapter = getattr(family, "ADAPTER", None)
        if adapter is not None:
            found |= dict.fromkeys(adapter.classes, adapter)
    return found


def call_kwargs_for(pipe: Any) -> dict[str, Any]:
    """Arguments that this pipeline needs in every call, from its family file; empty for unknown families."""
    needed: dict[str, Any] = {}
    classes = {type(part).__name__ for name, part in getattr(pipe, "components", {}).items() if DENOISERS.fullmatch(name)}
    for family in families():
        if hasattr(family, "call_kwargs") and classes & set(family.ADAPTER.classes):
            needed |= family.call_kwargs(pipe)
    return needed


def embedded_names() -> tuple[str, ...]:
    """Names of the pipelines that come with dqtk."""
    return importlib.import_module("dqtk.pipelines.tiny").names()


def embedded_folder(name: str) -> Path:
    """Folder of an embedded pipeline."""
    return importlib.import_module("dqtk.pipelines.tiny").folder(name)


def embedded_prompts(name: str) -> Path:
    """The file of prompts to calibrate an embedded pipeline with, one per line."""
    return importlib.import_module("dqtk.pipelines.tiny").calibration_prompts(name)


@cache
def scores() -> dict[str, Any]:
    """Every score that a file of ``dqtk.metrics`` offers (``SCORES``), by name; see ``metrics/score.py`` for their kinds."""
    package = importlib.import_module("dqtk.metrics")
    files = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg]
    modules = [importlib.import_module(f"dqtk.metrics.{name}") for name in files]
    return {score.name: score for module in modules for score in getattr(module, "SCORES", ())}


def extractor_for(name: str, device: Any = "cpu") -> Any:
    """A feature extractor, loaded: an embedded one by its name, else as ``metrics/extractors/find.py`` says.

    Raises ``ValueError`` for an unknown name and ``MissingWeights`` where the weights are not on this machine.
    """
    where = importlib.import_module("dqtk.pipelines.tiny").extractor_words(name)
    find = importlib.import_module("dqtk.metrics.extractors.find").extractor_named
    return find(where, device, inner=lambda part: extractor_for(part, device))


def vbench(part: str) -> ModuleType:
    """A module of ``metrics/vbench``: "suite", "results", "totals"."""
    return importlib.import_module(f"dqtk.metrics.vbench.{part}")


def read_suite(path: str | Path, dimensions: Sequence[str] = ()) -> list[Any]:
    """A suite of prompts in VBench's format: ``metrics/vbench/suite.py``."""
    return list(vbench("suite").read_suite(path, dimensions))


def stand_in(name: str) -> Any:
    """What scores need to know of an extractor whose weights are missing: ``metrics/extractors/find.py``."""
    return importlib.import_module("dqtk.metrics.extractors.find").stand_in(name)


def pair_score(name: str, also: Sequence[str] = ()) -> Any:
    """A paired score of pictures or clips by its name: one of ``scores``, or ``features:EXTRACTOR``, the cosine of that
    network's features. also: other names that the caller takes, for the error.

    Raises ``ValueError`` with a suggestion for an unknown name, and what ``extractor_for`` raises.
    """
    kind, colon, extractor = name.partition(":")
    if kind == "features" and colon:
        return importlib.import_module("dqtk.metrics.feature_similarity").feature_score(extractor_for(extractor))
    known = {name: score for name, score in scores().items() if hasattr(score, "load") and hasattr(score, "clips")}
    if name not in known:
        raise ValueError(
            f"score: name must be one of {', '.join([*known, *also])}, features:EXTRACTOR, got {name!r}."
            f"{did_you_mean(name, [*known, *also])}"
        )
    return known[name]


def oracle_for(pipe: Any, prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """An exact reader of what this pipeline paints for these prompts, if there is one."""
    return importlib.import_module("dqtk.pipelines.tiny").oracle_for(pipe, prompts)


def oracle_of_pictures(size: tuple[int, int], prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """The same for pictures of a size [width, height] that exist already."""
    return importlib.import_module("dqtk.pipelines.tiny").oracle_of_pictures(size, prompts)


def oracle_of_clips(size: tuple[int, int], prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """The same for clips: it is asked about uint8 frames [F, H, W, 3] and their prompt."""
    return importlib.import_module("dqtk.pipelines.tiny").oracle_of_clips(size, prompts)
