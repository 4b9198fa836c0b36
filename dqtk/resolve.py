"""The one place that finds things outside the engine, lazily and by name: family files in ``dqtk.pipelines``.

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


def oracle_for(pipe: Any, prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """An exact reader of what this pipeline paints for these prompts, if there is one."""
    return importlib.import_module("dqtk.pipelines.tiny").oracle_for(pipe, prompts)
