"""What a quantized component is on disk: plain tensors in safetensors files, and a small configuration.

Configuration (``quantization_config`` in config.json)::

    {"quant_method": "dqtk", "format_version": 2, "recipe": "w4a8", "hash": "...",
     "specs": {"s0": {...}}, "modules": {"transformer_blocks.0.attn1.to_q": "s0", ...},
     "attention": {"transformer_blocks.0.attn1": {...}, ...}}

Layers whose precision depends on the noise level carry their intervals in their specs; ``runtime.diffusion_step_policy`` says
the same for other engines, where their schema can (``nn/steps.py``).

It is derived from the layers that are really in the model, so it is true whatever happened before. Every safetensors file carries a
digest of every tensor of the component in its metadata (``dqtk_digests``; a tensor that shares another's memory, as T5's embedding
does, carries ``=name`` of that other instead). Loading compares names and contents, so a missing, superfluous, truncated or edited
tensor is an error and never a model that runs with wrong numbers.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .nn import Quantized, runtime_class
from .nn.activated import fit
from .nn.attention import blocks_of, check_packages, install_blocks
from .nn.correction import NAME, OutputCorrection, correction_of
from .nn.shared_input import share_input
from .nn.steps import first_last_policy
from .sites import read_together
from .spec import AttentionSpec, ByLevel, LayerSpec, SiteSpec, canonical, from_json, to_json

FORMAT_VERSION = 2
METHOD = "dqtk"
DIGESTS = "dqtk_digests"
_MIXED = "Files of two models are mixed."


# --- configuration ---------------------------------------------------------------------------------------------------


def quantized_layers(module: nn.Module) -> dict[str, Quantized]:
    """Runtime layers by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Quantized)}


def config_of(module: nn.Module, recipe: str) -> dict[str, Any]:
    """Configuration of a quantized module, from its layers."""
    layers = {path: layer.spec for path, layer in quantized_layers(module).items()}
    texts = {canonical(spec): spec for spec in layers.values()}
    names = {text: f"s{i}" for i, text in enumerate(texts)}
    attention = {path: blocks.spec for path, blocks in blocks_of(module).items()}
    found = correction_of(module)
    policy = first_last_policy(layers.values(), "unet" if "UNet" in type(module).__name__ else "transformer")
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": recipe,
        "hash": _hash(layers, found and found.to_json(), attention),
        "specs": {names[text]: to_json(spec) for text, spec in texts.items()},
        "modules": {path: names[canonical(spec)] for path, spec in layers.items()},
        **({"attention": {path: to_json(spec) for path, spec in attention.items()}} if attention else {}),
        **({} if found is None else {NAME: found.to_json()}),
        **({} if policy is None else {"runtime": {"diffusion_step_policy": policy}}),
    }


def install_correction(module: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Give a denoiser the output correction that its configuration holds, if any."""
    fields = config.get(NAME)
    if fields is None:
        return
    try:
        found = OutputCorrection(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {NAME} must hold edges, dim, gain and shift, got {fields!r}. The file was edited.") from error
    found.attach(module)


def read_attention(config: Mapping[str, Any], where: str) -> dict[str, AttentionSpec]:
    """Path -> spec, of attentions in blocks."""
    found = {}
    for path, data in config.get("attention", {}).items():
        spec = from_json(data, f"{where}.attention.{path}")
        if not isinstance(spec, AttentionSpec):
            raise ValueError(f"{where}: attention of {path} must be an AttentionSpec, got {data!r}. The file was edited.")
        found[path] = spec
    return found


def install_attention(module: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Give a denoiser's attentions the blocks that its configuration holds, whose masks a checkpoint will fill."""
    for path, spec in read_attention(config, where).items():
        install_blocks(module, path, spec, where)


def _hash(layers: Mapping[str, SiteSpec], correction: Any = None, attention: Mapping[str, AttentionSpec] | None = None) -> str:
    text = json.dumps(sorted([path, canonical(spec)] for path, spec in layers.items()))
    if attention:
        text += json.dumps(sorted([path, canonical(spec)] for path, spec in attention.items()))
    if correction is not None:
        text += json.dumps(correction, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_config(config: Mapping[str, Any], where: str = "quantization_config") -> dict[str, SiteSpec]:
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
    for field in ("specs", "modules"):
        if not isinstance(config.get(field), Mapping):
            raise ValueError(f"{where}: {field} must be a JSON object, got {config.get(field)!r}. The file was edited.")
    specs = {name: from_json(data, f"{where}.specs.{name}") for name, data in config["specs"].items()}
    layers = {}
    for path, name in config["modules"].items():
        if not isinstance(specs.get(name), LayerSpec | ByLevel):
            raise ValueError(f"{where}: spec of {path} must be one of {sorted(specs)}, got {name!r}. The file was edited.")
        layers[path] = specs[name]
    hashed = _hash(layers, config.get(NAME), read_attention(config, where))
    if hashed != config.get("hash"):
        raise ValueError(f"{where}: hash must be {hashed} for these modules, got {config.get('hash')!r}. The file was edited.")
    return layers


def install(module: nn.Module, layers: Mapping[str, SiteSpec], where: str) -> None:
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
            raise ValueError(
                f"{where}: layer {path} must be a linear or convolution, got {type(layer).__name__}. Was the model class changed?"
            )
        replace_layer(module, path, kind.like(layer, spec))  # type: ignore[attr-defined]


def replace_layer(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` where ``path`` was in a component; a runtime layer knows all that it reads before it is there."""
    if isinstance(layer, Quantized):
        layer.follow(module)
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    setattr(holder, name, layer)
    fit(holder, layer)
    share_input(holder, [holder.get_submodule(beside) for beside in read_together(module, path)])


# --- digests ---------------------------------------------------------------------------------------------------------


def digest(tensor: Tensor) -> str:
    """First 16 hex digits of SHA-256 over dtype, shape and bytes."""
    sha = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def file_metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata for every safetensors file of a component. Raises ``ValueError`` for a model that wears adapters."""
    worn = next((name for name in state_dict if ".base_layer." in name), None)
    if worn is not None:
        raise ValueError(
            f"save: model must be saved without adapters (LoRA), got {worn}. Save them by themselves (save_lora_adapter, "
            "save_lora_weights) and unload them first; neither could be loaded from one folder."
        )
    owners: dict[Any, str] = {}
    digests = {}
    for name, tensor in state_dict.items():
        memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else name
        owner = owners.setdefault(memory, name)
        digests[name] = digest(tensor) if owner == name else f"={owner}"
    return {DIGESTS: json.dumps(digests, separators=(",", ":"))}


def verify_files(files: Iterable[str | os.PathLike], where: str) -> dict[str, str]:
    """Compare the tensors of a component's files with the digests written beside them, which are returned.

    Raises:
        ValueError: a file cannot be read, has no digests, misses a tensor, holds an unknown one, or one that was changed.
    """
    expected: dict[str, str] = {}
    found: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                digests = _digests_of(file.metadata(), f"{where}: {path}")
                expected = expected or digests
                if digests != expected:
                    raise ValueError(
                        f"{where}: {path} must belong to the same model as the files before it, got another's. {_MIXED}"
                    )
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    _verify_tensor(name, file.get_tensor(name), expected, f"{where}: {path}")
                    found.add(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{where}: {path} must be a complete safetensors file, got: {error}. Copy or download it again."
            ) from error
    # Of tensors that share memory one is written.
    written = {_owner(name, expected) for name in found}
    missing = sorted(name for name in expected if _owner(name, expected) not in written)
    if missing:
        raise ValueError(
            f"{where}: files must hold all {len(expected)} tensors, got {len(found)}: missing {missing[0]} and "
            f"{len(missing) - 1} more. Copy or download the folder again."
        )
    return expected


def _digests_of(metadata: Mapping[str, str] | None, where: str) -> dict[str, str]:
    text = (metadata or {}).get(DIGESTS)
    if text is None:
        raise ValueError(f"{where} must carry {DIGESTS} metadata, got none. Save the model again with dqtk.")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} must carry {DIGESTS} as JSON, got: {error}. The file was damaged or edited.") from error


def _owner(name: str, digests: Mapping[str, str]) -> str:
    return digests[name][1:] if digests[name].startswith("=") else name


def _verify_tensor(name: str, tensor: Tensor, expected: Mapping[str, str], where: str) -> None:
    if name not in expected:
        raise ValueError(f"{where} must hold only tensors of this checkpoint, got {name}. {_MIXED}")
    wanted = expected[_owner(name, expected)]
    if digest(tensor) != wanted:
        raise ValueError(f"{where} must hold {name} with digest {wanted}, got another. The file was damaged or edited.")


# --- folders ---------------------------------------------------------------------------------------------------------


def check_output(path: str | os.PathLike, where: str = "output") -> Path:
    """The path, which must not exist or be an empty folder."""
    folder = Path(path).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{where}: folder must be new or empty, got {path}. Nothing was changed; choose another name or remove it first."
        )
    return folder


@contextmanager
def written_whole(path: str | os.PathLike, where: str = "output") -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes it on success and vanishes on any failure, Ctrl-C included."""
    folder = check_output(path, where)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def save_module(module: nn.Module, path: str | os.PathLike, recipe: str = "") -> None:
    """Write a bare quantized module: ``model.safetensors`` and ``config.json`` with its ``quantization_config``."""
    state = module.state_dict()
    metadata = {"format": "pt", **file_metadata(state)}
    digests = json.loads(metadata[DIGESTS])
    once = {name: tensor.contiguous() for name, tensor in state.items() if _owner(name, digests) == name}
    with written_whole(path, "save") as folder:
        save_file(once, folder / "model.safetensors", metadata=metadata)
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
    config = _stored_config(folder / "config.json")
    layers = read_config(config, f"load: {folder}")
    digests = verify_files([folder / "model.safetensors"], "load")
    install(module, layers, f"load: {folder}")
    check_packages(read_attention(config, f"load: {folder}").values(), f"load: {folder}")
    install_attention(module, config, f"load: {folder}")
    install_correction(module, config, f"load: {folder}")
    once = load_file(folder / "model.safetensors")
    state = {name: once[_owner(name, digests)] for name in digests}
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"load: {folder} must fit {type(module).__name__}, got: {said} Build the module that was saved."
        ) from error
    empty = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if empty:
        raise ValueError(
            f"load: {type(module).__name__} must get every tensor from the file, got none for {empty[0]} (it is not saved). "
            "Build the module on a real device."
        )
    return module


def _stored_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"load: {path} must be JSON, got: {error}. Copy or download it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise ValueError(f"load: {path} must hold a quantization_config, got none. Was the module quantized before saving?")
    return config["quantization_config"]
