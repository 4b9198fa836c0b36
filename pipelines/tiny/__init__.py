"""The embedded pipelines: small, really trained, saved as ordinary diffusers folders in ``weights/``.

They paint the captioned world of ``scenes``, or that of ``motion``; ``oracle`` reads pictures back, ``motion.judge`` clips;
``stress`` makes the difficult twins of those that paint pictures. The training scripts, seeds and log summaries are here too.
Nothing in the engine knows them: whatever works here works with a hub id.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_WEIGHTS = Path(__file__).parent / "weights"


def names() -> tuple[str, ...]:
    """Embedded pipelines that are present, sorted."""
    return tuple(sorted(path.parent.name for path in _WEIGHTS.glob("*/model_index.json")))


def folder(name: str) -> Path:
    """Saved diffusers folder of an embedded pipeline. Raises ``ValueError`` for an unknown name."""
    if name not in names():
        raise ValueError(f"tiny.folder: name must be one of {', '.join(names())}, got {name!r}.")
    return _WEIGHTS / name


def calibration_prompts(name: str) -> Path:
    """The file of training captions to calibrate an embedded pipeline with, one per line; of things in motion for clips."""
    return folder(name).parent.parent / ("motion_calibration.txt" if name == "tiny-wan" else "calibration.txt")


def extractor_folder(name: str) -> Path | None:
    """Saved open_clip folder of an embedded feature extractor ("tiny-clip"), or None for another name."""
    place = _WEIGHTS / name
    return place if (place / "open_clip_config.json").is_file() else None


def extractor_words(name: str) -> str:
    """What an embedded extractor is, in the words of ``metrics/extractors/find.py``; any other name as it is.

    "tiny-clip"; "tiny-aesthetic": a linear head on it that tells clean pictures of the world from disturbed ones.
    """
    if name == "tiny-aesthetic":
        return f"aesthetic:{_WEIGHTS / name / 'head.safetensors'}=tiny-clip"
    folder = extractor_folder(name)
    return name if folder is None else f"open_clip:{folder}"


def oracle_for(pipe: Any, prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """``oracle.judge`` for a pipeline that paints pictures of the captioned world's size for captions of its grammar, or
    ``motion.judge`` for one that makes clips of it; else None."""
    if hasattr(pipe, "vae_scale_factor_temporal"):
        from dqtk.calls import call_arguments

        asked = call_arguments(pipe, None)
        return oracle_of_clips((asked.get("width", 0), asked.get("height", 0)), prompts)
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    side = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if not isinstance(side, int):
        return None
    side *= getattr(pipe, "vae_scale_factor", 0)
    return oracle_of_pictures((side, side), prompts)


def oracle_of_pictures(size: tuple[int, int], prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """``oracle.judge`` for pictures of the world's size whose prompts are captions of its grammar; else None."""
    from . import oracle, scenes  # scipy, and a table of all captions

    if size != (scenes.SIZE, scenes.SIZE):
        return None
    try:
        for prompt in prompts:
            scenes.parse_caption(prompt)
    except ValueError:
        return None
    return oracle.judge


def oracle_of_clips(size: tuple[int, int], prompts: Sequence[str]) -> Callable[[Any, str], Any] | None:
    """``motion.judge`` for clips of the world's size whose prompts are captions of things in motion; else None."""
    from . import motion, scenes

    if size != (scenes.SIZE, scenes.SIZE):
        return None
    try:
        for prompt in prompts:
            motion.parse_caption(prompt)
    except ValueError:
        return None
    return motion.judge
