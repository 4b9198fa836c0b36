"""Stable Diffusion 3 and 3.5."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(transformer: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Latents cut into patches, then text; the second attention of some blocks of 3.5 is of the picture alone."""
    patch = transformer.config.patch_size
    rows, columns = (size // patch for size in arguments["hidden_states"].shape[2:])
    return [(1, rows, columns, 0, arguments["encoder_hidden_states"].shape[1]), (1, rows, columns, 0, 0)]


ADAPTER = Adapter(classes=("SD3Transformer2DModel",), layouts=layouts)
