"""The UNet of Stable Diffusion 1, 2 and XL."""

from collections.abc import Mapping
from typing import Any

from dqtk.sites import Adapter


def layouts(unet: Any, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Latents, and what is left of them after each downsampling convolution."""
    height, width = arguments["sample"].shape[2:]
    found = []
    for _ in unet.config.down_block_types:
        found.append((1, height, width, 0, 0))
        height, width = -(-height // 2), -(-width // 2)
    return found


ADAPTER = Adapter(classes=("UNet2DConditionModel",), layouts=layouts)

_SMALL = 32  # latents per side; the published models have 64 to 128


def call_kwargs(pipe: Any) -> dict[str, Any]:
    """Sampling steps of miniature models: 20.

    The pipelines default to 50 steps whatever the model. tiny-sdxl's oracle score is the same after 20, in two fifths of the time.
    """
    size = pipe.unet.config.sample_size  # a side, a pair of them, or None
    side = max(size) if isinstance(size, (tuple, list)) else size
    return {"num_inference_steps": 20} if side is not None and side < _SMALL else {}
