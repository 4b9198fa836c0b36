"""Model folders of the scores' networks: a path, ``$DQTK_WEIGHTS/OWNER/NAME``, or a hub id in Hugging Face's cache.

As for single files (``weights``), nothing is downloaded. A hub id is looked up in the cache and loaded from its snapshot folder,
so that a run does not change when somebody pushes to the repository, and does not need the network to find that nobody did.
"""

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from .weights import MissingWeights, sha256_of, weights_folder

_TEXTS = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, merges, sentencepiece
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_folder(where: str, source: str | Path, config: str) -> Path:
    """The folder that has the file ``config``: ``source`` itself, ``$DQTK_WEIGHTS/source``, or the cached snapshot of that hub id.

    Raises ``MissingWeights`` when there is none, ``ValueError`` for a folder without ``config``.
    """
    own = weights_folder()
    for folder in [Path(source)] + ([own / source] if own is not None else []):
        if folder.is_dir():
            if not (folder / config).is_file():
                raise ValueError(f"{where}: {folder} must be a model folder with {config}, got {_listing(folder)}. Check the path.")
            return folder
    if _HUB_ID.fullmatch(str(source)):
        cached = try_to_load_from_cache(str(source), config)
        if isinstance(cached, str):
            return Path(cached).parent
        remedy = f"Run `hf download {source}` (it takes --local-dir), or pass the path of a folder."
    else:
        remedy = "Pass the path of a folder or a hub id (owner/name)."
    raise MissingWeights(f"{where}: model must be a folder or a hub id in the cache, got {str(source)!r} (not there). {remedy}")


def find_weights_in(where: str, folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The first of ``names`` in ``folder``, as a list; for an index of shards the shards, sorted.

    Raises ``MissingWeights`` where there is none or a shard is missing: an interrupted download.
    """
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        shards = [folder / shard for shard in sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))]
        absent = [shard.name for shard in shards if not shard.is_file()]
        if absent:
            raise MissingWeights(f"{where}: {folder} must have all shards of {name}, got none of {absent}. Download it again.")
        return shards
    raise MissingWeights(
        f"{where}: {folder} must have one of {', '.join(names)}, got {_listing(folder)}. "
        "Finish the download, or pass another folder."
    )


def sha256_of_texts(folder: Path) -> str:
    """SHA-256 over what configures a model beside its weights: names and contents of the folder's JSON and tokenizer files.

    The same weights under another activation, image size or vocabulary are another network.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in _TEXTS and path.is_file())
    return hashlib.sha256("\n".join(f"{path.name} {sha256_of(path)}" for path in files).encode()).hexdigest()


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
