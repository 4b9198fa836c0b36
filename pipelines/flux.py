"""Flux."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(transformer: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Text, then packed latents, whose rows and columns are in their ids."""
    ids = arguments["img_ids"]
    rows, columns = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
    return [(1, rows, columns, arguments["encoder_hidden_states"].shape[1], 0)]


ADAPTER = Adapter(classes=("FluxTransformer2DModel",), layouts=layouts)
