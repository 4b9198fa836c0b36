"""Where a MODEL comes from: an embedded pipeline's name, a local diffusers folder, or a hub id."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .hosts import quiet_hosts
from .resolve import embedded_folder, embedded_names
from .sites import DENOISERS, TEXT_ENCODERS, meta
from .spec import did_you_mean

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(model: str) -> str:
    """A local folder's path, or a hub id unchanged.

    Raises:
        ValueError: neither an embedded name, nor a diffusers folder, nor the form of a hub id.
    """
    if model in embedded_names():
        return str(embedded_folder(model))
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"model: folder must hold model_index.json (a saved diffusers pipeline), got {model} with {_listing(path)}."
            )
        return str(path)
    if _HUB_ID.fullmatch(model) and not path.exists():
        return model
    names = embedded_names()
    raise ValueError(
        f"model: MODEL must be an embedded pipeline ({', '.join(names)}), a diffusers folder or a hub id (owner/name), got {model!r}."
        f"{did_you_mean(model, names)}"
    )


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"


def local_folder(where: str) -> Path:
    """The folder itself, or that of a hub id after downloading it to diffusers' cache."""
    if Path(where).is_dir():
        return Path(where)
    return Path(importlib.import_module("diffusers").DiffusionPipeline.download(where))


def stored_dtype(folder: Path) -> str:
    """The dtype in which the denoiser's weights are stored: that of its first matrix that is not a code."""
    for file in sorted(folder.glob("*/*.safetensors")):
        if DENOISERS.fullmatch(file.parent.name):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    kind = tensors.get_slice(name).get_dtype()
                    if kind in _DTYPES and not name.endswith(("scale", "input_scale")):
                        return _DTYPES[kind]
    return "float32"


def load_pipeline(model: str, dtype: str = "float32") -> Any:
    """The pipeline with its weights, progress bars off. ``dtype``: "float32", "bfloat16", "float16", or "stored": as on disk.

    Raises:
        ValueError: unknown model, damaged files, or a hub that cannot be reached.
    """
    where = locate(model)
    diffusers = importlib.import_module("diffusers")
    quiet_hosts()
    try:
        folder = local_folder(where)
        chosen = stored_dtype(folder) if dtype == "stored" else dtype
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, chosen))
    except (OSError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"model: {model} must be a complete diffusers pipeline that can be read, got: {first}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


class MetaPipeline:
    """Denoisers and text encoders without weights, enough for ``dqtk.plan``."""

    def __init__(self, components: dict[str, Any]):
        self.components = components


def meta_pipeline(model: str) -> MetaPipeline:
    """The pipeline's planned components on the meta device, from their configs alone: no weights are read or downloaded."""
    where = locate(model)
    diffusers = importlib.import_module("diffusers")
    index = diffusers.DiffusionPipeline.load_config(where)
    parts = {}
    for name, entry in index.items():
        if not (isinstance(entry, list) and entry[0] and (DENOISERS.fullmatch(name) or TEXT_ENCODERS.fullmatch(name))):
            continue
        library, class_name = entry
        kind = getattr(importlib.import_module(library), class_name)
        if library == "transformers":
            config = kind.config_class.from_pretrained(where, subfolder=name)
        else:
            config = kind.load_config(where, subfolder=name)
        quantized = config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", None)
        if quantized:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"model: {model} must be unquantized to be planned, got {name} with quantization_config ({method}). Plan the original."
            )
        parts[name] = meta(kind, config) if library == "transformers" else meta(kind.from_config, config)
    return MetaPipeline(parts)


def read_prompts(words: list[str], num: int | None = None) -> list[str]:
    """Prompts from the command line: a text file with one per line, or the prompts themselves.

    Raises:
        ValueError: a file that does not exist or holds nothing.
    """
    if len(words) == 1 and (words[0].endswith(".txt") or Path(words[0]).is_file()):
        path = Path(words[0])
        if not path.is_file():
            raise ValueError(
                f"prompts: file must exist, got {path}. Give a text file with one prompt per line, or the prompts themselves."
            )
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        prompts = [word for word in words if word.strip()]
    if not prompts:
        raise ValueError(f"prompts: there must be at least one prompt, got none in {words}.")
    return prompts if num is None else prompts[:num]


def saved_recipe(folder: str | Path) -> dict[str, Any]:
    """Component -> ``quantization_config`` of a saved dqtk folder; empty when nothing is quantized."""
    found = {}
    for config in sorted(Path(folder).glob("*/config.json")):
        stored = json.loads(config.read_text()).get("quantization_config")
        if stored and stored.get("quant_method") == "dqtk":
            found[config.parent.name] = stored
    return found
