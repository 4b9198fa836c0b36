"""Which library a model comes from, and registering with it without importing it.

``import dqtk`` must not import diffusers (7 s). If the library is already there, its backend registers at once; otherwise a
one-shot import hook runs it right after the library's registry module has been executed. Both orders are tested.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from torch import nn

REGISTRIES = {"diffusers.quantizers.auto": "dqtk.diffusers_backend", "transformers.quantizers.auto": "dqtk.transformers_backend"}


def register_with_hosts() -> None:
    """Register now where the library is imported, later where it is not."""
    waiting = {}
    for registry, backend in REGISTRIES.items():
        if registry in sys.modules:
            importlib.import_module(backend)
        else:
            waiting[registry] = backend
    if waiting:
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself; wraps the loader of the registry modules."""

    def __init__(self, waiting: dict[str, str]):
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        backend = self.waiting.pop(fullname, None)
        if backend is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, backend)
        return spec


class _ThenRegister(importlib.abc.Loader):
    """Executes a registry module and then imports the backend, which registers itself."""

    def __init__(self, loader: Any, backend: str):
        self.loader, self.backend = loader, backend

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(self.backend)  # registers, unless it is what imports the registry: then it does so at its end


def backend_of(module: nn.Module) -> ModuleType | None:
    """The backend of the library that a module's class comes from, or None for a bare module."""
    for host, base, backend in (
        ("diffusers.models.modeling_utils", "ModelMixin", "dqtk.diffusers_backend"),
        ("transformers.modeling_utils", "PreTrainedModel", "dqtk.transformers_backend"),
    ):
        loaded = sys.modules.get(host)
        if loaded is not None and isinstance(module, getattr(loaded, base)):
            return importlib.import_module(backend)
    return None


def quiet_hosts() -> None:
    """Only errors from diffusers' and transformers' loggers, and no loading bars: for the shell, where dqtk shows its own."""
    for name in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{name}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
