"""HunyuanVideo."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(transformer: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Latents cut into patches, then text; text attends to itself alone first (``context_embedder``), as one row without a grid."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch, along = transformer.config.patch_size, transformer.config.patch_size_t
    text = arguments["encoder_hidden_states"].shape[1]
    return [(frames // along, height // patch, width // patch, 0, text), (1, 1, text, 0, 0)]


ADAPTER = Adapter(classes=("HunyuanVideoTransformer3DModel",), layouts=layouts)
