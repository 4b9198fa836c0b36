"""Honest sizes: what a pipeline's components weigh on disk and in memory, in bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentSize:
    """Bytes of one component: stored tensors in memory, weight files on disk (``None``: not there, or no folder)."""

    name: str
    in_memory: int | None
    on_disk: int | None


def bytes_in_memory(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as stored, each storage counted once (tied weights share one).

    What a quantized layer keeps (codes, scales, what stayed 16-bit) counts as it lies there; activations and scratch do not.
    """
    seen: dict[tuple, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        inner = [getattr(tensor, name) for name in _inner_names(tensor)] or [tensor]
        for part in inner:
            storage = part.untyped_storage()
            key = (str(part.device), storage.data_ptr()) if storage.data_ptr() else ("meta", id(part))
            seen[key] = storage.nbytes()
    return sum(seen.values())


def _inner_names(tensor: Any) -> list[str]:
    """Names of the tensors inside a wrapper subclass (torchao and others), which reports its logical size otherwise."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return list(flatten()[0]) if flatten is not None else []


def bytes_on_disk(folder: str | Path) -> dict[str, int]:
    """Component name -> bytes of its weight files in a saved diffusers folder, largest variant set counted as it lies there.

    Components are the subfolders; weight files at the top count as "". Raises ``ValueError`` where ``folder`` is not a folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"bytes_on_disk: folder must be a saved pipeline's folder, got {str(folder)!r}. Save the pipeline first.")
    sizes: dict[str, int] = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in WEIGHT_SUFFIXES:
            parts = file.relative_to(folder).parts
            component = parts[0] if len(parts) > 1 else ""
            sizes[component] = sizes.get(component, 0) + file.stat().st_size
    return sizes


def pipeline_sizes(pipe: Any, folder: str | Path | None = None) -> tuple[ComponentSize, ...]:
    """Sizes of every component of a diffusers pipeline that has weights, in its own order; on disk too when ``folder`` is given."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    memory = {name: bytes_in_memory(part) for name, part in modules.items()}
    disk = bytes_on_disk(folder) if folder is not None else {}
    names = list(memory) + [name for name in disk if name not in memory]
    return tuple(ComponentSize(name=name, in_memory=memory.get(name), on_disk=disk.get(name)) for name in names)
