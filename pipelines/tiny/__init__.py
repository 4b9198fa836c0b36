"""The embedded pipelines: small, really trained, saved as ordinary diffusers folders in ``weights/``.

They paint the captioned world of ``scenes``; ``oracle`` reads pictures back; ``stress`` makes their difficult twins. The training
scripts, seeds and log summaries are here too. Nothing in the engine knows them: whatever works here works with a hub id.
"""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """Embedded pipelines that are present, sorted."""
    return tuple(sorted(path.parent.name for path in _WEIGHTS.glob("*/model_index.json")))


def folder(name: str) -> Path:
    """Saved diffusers folder of an embedded pipeline. Raises ``ValueError`` for an unknown name."""
    if name not in names():
        raise ValueError(f"tiny.folder: name must be one of {', '.join(names())}, got {name!r}.")
    return _WEIGHTS / name
