"""What a quantized component is on disk: plain tensors in safetensors files, and a small configuration.

Configuration (``quantization_config`` in config.json)::

    {"quant_method": "dqtk", "format_version": 1, "recipe": "w4a8", "hash": "...",
     "specs": {"s0": {...}}, "modules": {"transformer_blocks.0.attn1.to_q": "s0", ...}}

It is derived from the layers that are really in the model, so it is true whatever happened before. Every safetensors file carries a
digest of every tensor of the component in its metadata (``dqtk_digests``); loading compares names and contents, so a missing,
superfluous, truncated or edited tensor is an error and never a model that runs with wrong numbers.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .nn import Quantized, runtime_class
from .spec import LayerSpec, canonical, from_json, to_json

FORMAT_VERSION = 1
METHOD = "dqtk"
DIGESTS = "dqtk_digests"


# --- configuration ---------------------------------------------------------------------------------------------------


def quantized_layers(module: nn.Module) -> dict[str, Quantized]:
    """Runtime layers by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Quantized)}


def config_of(module: nn.Module, recipe: str) -> dict[str, Any]:
    """Configuration of a quantized module, from its layers."""
    layers = {path: layer.spec for path, layer in quantized_layers(module).items()}
    texts = {canonical(spec): spec for spec in layers.values()}
    names = {text: f"s{i}" for i, text in enumerate(texts)}
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "hash": _hash(layers),
        "specs": {names[text]: to_json(spec) for text, spec in texts.items()},
        "modules": {path: names[canonical(spec)] for path, spec in layers.items()},
    }


def _hash(layers: Mapping[str, LayerSpec]) -> str:
    text = json.dumps(sorted([path, canonical(spec)] for path, spec in layers.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_config(config: Mapping[str, Any], where: str = "quantization_config") -> dict[str, LayerSpec]:
    """Path -> spec.

    Raises:
        ValueError: newer format version, unknown spec, or a hash that does not fit.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{where}: format_version must be {FORMAT_VERSION}, got {version!r}. "
            "The checkpoint was written by another version of dqtk: pip install -U dqtk."
        )
    specs = {name: from_json(data, f"{where}.specs.{name}") for name, data in config["specs"].items()}
    layers = {}
    for path, name in config["modules"].items():
        if name not in specs:
            raise ValueError(f"{where}: spec of {path} must be one of {sorted(specs)}, got {name!r}. The file was edited.")
        layers[path] = specs[name]
    if _hash(layers) != config.get("hash"):
        raise ValueError(
            f"{where}: hash must be {_hash(layers)} for these modules, got {config.get('hash')!r}. The file was edited."
        )
    return layers


def install(module: nn.Module, layers: Mapping[str, LayerSpec], where: str) -> None:
    """Replace layers by empty runtime layers that a checkpoint will fill. The meta device is the usual place.

    Raises:
        ValueError: the model has no such layer, or one of another kind.
    """
    for path, spec in layers.items():
        try:
            layer = module.get_submodule(path)
        except AttributeError:
            raise ValueError(
                f"{where}: layer {path} must exist in {type(module).__name__}, got none. Was the model class changed?"
            ) from None
        kind = runtime_class(layer)
        if kind is None or isinstance(layer, Quantized):
            raise ValueError(f"{where}: layer {path} must be a linear or convolution, got {type(layer).__name__}.")
        replace_layer(module, path, kind.like(layer, spec))  # type: ignore[attr-defined]


def replace_layer(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` where ``path`` was."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent) if parent else module, name, layer)


# --- digests ---------------------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """First 16 hex digits of SHA-256 over dtype, shape and bytes."""
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def file_metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata for every safetensors file of a component."""
    return {DIGESTS: json.dumps({name: digest(tensor) for name, tensor in state_dict.items()}, separators=(",", ":"))}


def verify_files(files: Iterable[str | os.PathLike], where: str) -> None:
    """Compare the tensors of a component's files with the digests written beside them.

    Raises:
        ValueError: a file cannot be read, has no digests, misses a tensor, holds an unknown one, or one that was changed.
    """
    expected: dict[str, str] = {}
    found: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(DIGESTS)
                if text is None:
                    raise ValueError(f"{where}: {path} must carry {DIGESTS} metadata, got none. Save the model again with dqtk.")
                expected |= json.loads(text)
                for name in file.keys():
                    if name not in expected:
                        raise ValueError(
                            f"{where}: {path} must hold only tensors of this checkpoint, got {name}. Files of two models are mixed."
                        )
                    if digest(file.get_tensor(name)) != expected[name]:
                        raise ValueError(
                            f"{where}: {name} in {path} must have digest {expected[name]}, got another. The file was damaged or edited."
                        )
                    found.add(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{where}: {path} must be a complete safetensors file, got: {error}. Copy or download it again."
            ) from error
    # Tied tensors (T5's two names for its embedding) are written once.
    contents = {expected[name] for name in found}
    missing = sorted(name for name in set(expected) - found if expected[name] not in contents)
    if missing:
        raise ValueError(
            f"{where}: files must hold all {len(expected)} tensors, got {len(found)}; missing {missing[0]} and {len(missing) - 1} more."
        )


# --- folders ---------------------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike, where: str = "output") -> Path:
    """The path, which must not exist or be an empty folder."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{where}: folder must be new or empty, got {folder}. Nothing was changed; choose another name or remove it first."
        )
    return folder


@contextmanager
def written_whole(path: str | os.PathLike, where: str = "output") -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it on success and vanishes on any failure, Ctrl-C included."""
    folder = check_output(path, where)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def save_module(module: nn.Module, path: str | os.PathLike, recipe: str = "") -> None:
    """Write a bare quantized module: ``model.safetensors`` and ``config.json`` with its ``quantization_config``."""
    state = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    with written_whole(path, "save") as folder:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt", **file_metadata(state)})
        config = {"class": type(module).__name__, "quantization_config": config_of(module, recipe)}
        (folder / "config.json").write_text(json.dumps(config, indent=2))


def load_module(module: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Fill a freshly built, unquantized module (meta device is fine) from ``save_module``'s folder; returns it.

    Raises:
        ValueError: files that are missing, damaged, newer, or of another architecture.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"load: folder must hold config.json and model.safetensors, got {folder}. Use dqtk.load for pipelines.")
    config = json.loads((folder / "config.json").read_text())
    verify_files([folder / "model.safetensors"], "load")
    install(module, read_config(config["quantization_config"], f"load: {folder}"), f"load: {folder}")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"load: {folder} must fit {type(module).__name__}, got: {error}") from error
    return module
