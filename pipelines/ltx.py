"""LTX-Video."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(transformer: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Packed latents, whose sizes are arguments."""
    return [(arguments["num_frames"], arguments["height"], arguments["width"], 0, 0)]


ADAPTER = Adapter(classes=("LTXVideoTransformer3DModel",), layouts=layouts)
