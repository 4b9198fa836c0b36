"""CogVideoX."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(transformer: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Text, then latents [B, F, C, H, W] cut into patches, in 1.5 along frames too."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch, along = transformer.config.patch_size, transformer.config.patch_size_t or 1
    return [(-(-frames // along), height // patch, width // patch, arguments["encoder_hidden_states"].shape[1], 0)]


ADAPTER = Adapter(classes=("CogVideoXTransformer3DModel",), layouts=layouts, frame_dim=1)
