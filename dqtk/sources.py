"""Where a MODEL comes from: an embedded pipeline's name, a local diffusers folder, or a hub id."""

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import METHOD, install, install_attention, read_config
from .hosts import backend_of, quiet_hosts
from .resolve import embedded_folder, embedded_names
from .sites import DENOISERS, TEXT_ENCODERS, meta
from .spec import did_you_mean

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def locate(model: str) -> str:
    """A local folder's path, or a hub id unchanged.

    Raises:
        ValueError: neither an embedded name, nor a diffusers folder, nor the form of a hub id.
    """
    names = embedded_names()
    if model in names:
        return str(embedded_folder(model))
    path = Path(model)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"model: folder must hold model_index.json (a saved diffusers pipeline), got {model} with {_listing(path)}. "
                "Give the folder that pipe.save_pretrained wrote."
            )
        return str(path)
    if _HUB_ID.fullmatch(model) and not path.exists():
        return model
    raise ValueError(
        f"model: MODEL must be an embedded pipeline ({', '.join(names) or 'none is installed'}), a diffusers folder or a hub id "
        f"(owner/name), got {model!r}.{did_you_mean(model, names) or ' Check the spelling.'}"
    )


def _listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") if names else "nothing"


def local_folder(model: str, weights: bool = True) -> Path:
    """The folder of a MODEL; a hub id is downloaded to the hub's cache first, or found there when offline.

    ``weights=False`` fetches the configurations only.
    """
    where = locate(model)
    if Path(where).is_dir():
        return Path(where)
    with readable(f"model: {model} is not a local folder, so it", "on the hub or in its cache"):
        if weights:
            return Path(importlib.import_module("diffusers").DiffusionPipeline.download(where))
        hub = importlib.import_module("huggingface_hub")
        return Path(hub.snapshot_download(where, allow_patterns=["model_index.json", "*/config.json"]))


@contextmanager
def readable(where: str, what: str = "complete and readable") -> Iterator[None]:
    """Whatever the host libraries say about files that they cannot fetch or read, as one line.

    TypeError: a configuration value of a wrong type. RuntimeError: transformers on tensors of a wrong shape.
    """
    try:
        yield
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError) as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= 400 else f"{said[:400]}..."
        raise ValueError(f"{where} must be {what}, got: {said or type(error).__name__}") from error


def read_json(path: str | Path, where: str) -> Any:
    """A JSON file. Raises ``ValueError`` that names it when it is missing or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{where}: file must exist, got {path}. Check the path.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {path} must be JSON, got: {error}. Write or copy it again.") from error


def stored_dtype(folder: Path) -> str:
    """The dtype in which the weights of a pipeline's denoiser, or of one model, are stored: its first float that is no scale."""
    files = [file for file in sorted(folder.glob("*/*.safetensors")) if DENOISERS.fullmatch(file.parent.name)]
    for file in files or sorted(folder.glob("*.safetensors")):
        with readable(f"model: {file}"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                kind = tensors.get_slice(name).get_dtype()
                if kind in _DTYPES and not name.endswith(("scale", "input_scale")):
                    return _DTYPES[kind]
    return "float32"


def check_files(folder: Path) -> None:
    """Raises ``ValueError`` that names a safetensors file with a damaged header or a missing end; the hosts do not name it."""
    for file in sorted(folder.rglob("*.safetensors")):
        with readable(f"model: {file}"), safe_open(file, framework="pt"):
            pass


def find_device(wish: str | None = None) -> torch.device:
    """The wished device, or the CUDA device if there is one, else the CPU. Raises ``ValueError`` for one that is not there."""
    if wish is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"--device must be one of this machine, such as cpu or cuda:0, got {wish!r}: {said}") from error
    return device


def load_pipeline(model: str, dtype: str = "float32", device: torch.device | str = "cpu") -> Any:
    """The pipeline with its weights, progress bars off. ``dtype``: "float32", "bfloat16", "float16", or "stored": as on disk.

    Raises:
        ValueError: unknown model, damaged files, or a hub that cannot be reached.
    """
    folder = local_folder(model)
    diffusers = importlib.import_module("diffusers")
    quiet_hosts()
    check_files(folder)
    with readable(f"model: {model}"):
        chosen = stored_dtype(folder) if dtype == "stored" else dtype
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, chosen))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class MetaPipeline:
    """Denoisers and text encoders without weights, enough for ``dqtk.plan`` and ``installed_plan``."""

    def __init__(self, components: dict[str, Any]):
        self.components = components


def meta_pipeline(model: str) -> MetaPipeline:
    """The pipeline's planned components on the meta device, from their configs alone: no weights are read or downloaded.

    Layers that dqtk has quantized stand there as empty runtime layers. Raises ``ValueError`` for other quantized models.
    """
    folder = local_folder(model, weights=False)
    parts = {}
    for name, entry in read_json(folder / "model_index.json", f"model: {model}").items():
        if isinstance(entry, list) and entry[0] and (DENOISERS.fullmatch(name) or TEXT_ENCODERS.fullmatch(name)):
            with readable(f"model: {name} of {model}"):
                parts[name] = _meta_model(folder / name, _class_of(*entry))
    return MetaPipeline(parts)


def pipeline_class(model: str) -> type | None:
    """The class of diffusers that a pipeline is saved as; None for one of somebody's own."""
    index = read_json(local_folder(model, weights=False) / "model_index.json", f"model: {model}")
    return getattr(importlib.import_module("diffusers"), str(index.get("_class_name")), None)


def model_folder(model: str) -> Path:
    """The folder of a MODEL with its weights. MODEL may also be the folder of one component: ``config.json`` and weights."""
    folder = Path(model)
    return folder if _is_component(folder) else local_folder(model)


def _is_component(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def meta_target(model: str) -> MetaPipeline | torch.nn.Module:
    """``meta_pipeline``, or the module on the meta device of the folder of one component."""
    folder = Path(model)
    if not _is_component(folder):
        return meta_pipeline(model)
    with readable(f"model: {model}"):
        return _meta_model(folder, model_class(folder))


def _meta_model(folder: Path, kind: Any) -> torch.nn.Module:
    config = read_json(folder / "config.json", "config")
    stored = config.pop("quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if method not in (None, METHOD):
        raise ValueError(f"{folder.name}: quant_method must be {METHOD} or none, got {method!r}. Plan the original.")
    made = meta(kind.from_config, config) if hasattr(kind, "load_config") else meta(kind, kind.config_class.from_dict(config))
    if stored is not None:
        install(made, read_config(stored, folder.name), folder.name)
        install_attention(made, stored, folder.name)
        backend: Any = backend_of(made)
        backend.attach(made, stored.get("recipe", ""))
    return made


def model_class(folder: Path) -> Any:
    """The class that a saved model's ``config.json`` names: diffusers writes ``_class_name``, transformers ``architectures``."""
    config = read_json(folder / "config.json", "load")
    if "_class_name" in config:
        return _class_of("diffusers", config["_class_name"])
    if config.get("architectures"):
        return _class_of("transformers", config["architectures"][0])
    raise ValueError(
        f"{folder}/config.json must name a diffusers or transformers class, got {sorted(config)}. "
        "Fill a bare module with dqtk.checkpoint.load_module(module, folder)."
    )


def _class_of(library: str, class_name: str) -> Any:
    """A class by the two words of ``model_index.json``: from diffusers, transformers, or one of diffusers' pipeline modules."""
    diffusers = importlib.import_module("diffusers")
    known = {"diffusers": diffusers, "transformers": importlib.import_module("transformers")}
    place = known.get(library) or getattr(diffusers.pipelines, library, None)
    kind = getattr(place, class_name, None)
    if kind is None:
        raise ValueError(f"class must be one of diffusers or transformers, got {library}.{class_name}. Update the library.")
    return kind
