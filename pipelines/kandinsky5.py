"""Kandinsky 5."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(transformer: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Latents [B, F, H, W, C] cut into patches; and the text, which attends to itself in blocks of its own.

    Raises ``ValueError`` for tokens in the order of its sparse attention, which is not that of rows.
    """
    sparse = arguments.get("sparse_params")
    if sparse is not None and sparse["to_fractal"]:
        raise ValueError(
            "attention: tokens of Kandinsky5Transformer3DModel must be in rows, got those of its sparse attention. "
            "Load a variant without it."
        )
    frames, height, width = arguments["hidden_states"].shape[1:4]
    along, down, across = transformer.config.patch_size
    return [(frames // along, height // down, width // across), (1, 1, arguments["encoder_hidden_states"].shape[1])]


ADAPTER = Adapter(classes=("Kandinsky5Transformer3DModel",), layouts=layouts, frame_dim=1)
