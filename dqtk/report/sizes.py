"""Honest sizes: what a pipeline's components weigh on disk and in memory, in bytes; and how many of their weights became zeros."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dqtk.nn import Quantized, kept_weights
from dqtk.numerics.storage import is_stored

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComponentSize:
    """Bytes of one component: tensors in memory, the same once it computes at 16 bits, weight files on disk; ``None``: none.

    zeros: share of exact zeros among its quantized weights; ``None`` where there are none.
    """

    name: str
    in_memory: int | None
    at_16_bit: int | None
    on_disk: int | None
    zeros: float | None = None

    def places(self) -> dict[str, int | None]:
        """Words -> bytes, without the 16-bit figure where it says nothing new."""
        found = {"on disk": self.on_disk, "in memory": self.in_memory}
        return found if self.at_16_bit == self.in_memory else found | {"in memory at 16 bit": self.at_16_bit}


def bytes_in_memory(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as stored, each storage counted once (tied weights share one).

    What a quantized layer keeps (codes, scales, what stayed 16-bit, decoded weights) counts as it lies there; activations and
    scratch do not.
    """
    seen: dict[tuple, int] = {}
    for tensor in (*module.parameters(), *module.buffers(), *kept_weights(module)):
        for part in _plain(tensor):
            storage = part.untyped_storage()
            key = (str(part.device), storage.data_ptr()) if storage.data_ptr() else ("meta", id(part))
            seen[key] = storage.nbytes()
    return sum(seen.values())


def bytes_at_16_bit(module: nn.Module) -> int:
    """Bytes in memory once the module computes at 16 bits: wider floats count two bytes; codes and scales keep theirs."""
    stored = bytes_in_memory(module)
    seen: dict[int, int] = {}
    for part in module.modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            kept = isinstance(part, Quantized) and is_stored(name)
            if tensor.is_floating_point() and tensor.element_size() > 2 and not kept and not _inner_names(tensor):
                seen[id(tensor)] = tensor.numel() * (tensor.element_size() - 2)
    seen |= {id(weight): weight.nbytes - 2 * weight.numel() for weight in kept_weights(module)}
    return stored - sum(seen.values())


def zero_share(module: nn.Module) -> float | None:
    """Share of exact zeros among the weights of quantized layers, in [0, 1]; ``None`` where there are none.

    As stored, in the basis of the layer's transforms and without its low-rank branch: what a sparse kernel could skip (the sparsity
    of arXiv 2408.06995).
    """
    layers = [layer for layer in module.modules() if isinstance(layer, Quantized)]
    zeros = total = 0
    for layer in layers:
        stored = layer.stored_matrix()
        zeros, total = zeros + stored.numel() - int(stored.count_nonzero()), total + stored.numel()
    return zeros / total if total else None


def _plain(tensor: Any) -> list[Any]:
    """The tensors with memory of their own behind one, which wrappers of wrappers (optimum-quanto's packed weights) hide."""
    names = _inner_names(tensor)
    return [part for name in names for part in _plain(getattr(tensor, name))] if names else [tensor]


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
    narrow = {name: bytes_at_16_bit(part) for name, part in modules.items()}
    disk = bytes_on_disk(folder) if folder is not None else {}
    names = list(memory) + [name for name in disk if name not in memory]
    zeros = {name: zero_share(part) for name, part in modules.items()}
    return tuple(
        ComponentSize(
            name=name, in_memory=memory.get(name), at_16_bit=narrow.get(name), on_disk=disk.get(name), zeros=zeros.get(name)
        )
        for name in names
    )
