"""CLIP's image tower fed as EvalCrafter's code feeds it, for scores beside the tables of papers that used that code.

Frames are squashed to 224 x 224 (bilinear, half-pixel centres, no antialiasing, rounded to 8 bits: OpenCV's default) and given to
the network as numbers from 0 to 255, without CLIP's mean and standard deviation. The network saw inputs of about -2 to 2; what it
says of these is nearly the same for every picture. Texts are encoded as they should be.
"""

from typing import Any

import torch
from torch import Tensor

from .contract import as_images
from .precision import whole_float32
from .resize import resize_pytorch

_SIDE = 224


class LegacyFrames:
    """An ``OpenClip`` or ``TransformersClip`` with that preprocessing. Raises ``ValueError`` for another input size than 224."""

    def __init__(self, encoder: Any) -> None:
        side = _input_side(encoder)
        if side != _SIDE:
            raise ValueError(
                f"legacy: encoder must take {_SIDE} x {_SIDE} pixels, got {side} for {encoder.name}. The papers' is CLIP ViT-B/32."
            )
        self.of = encoder
        self.name, self.version = f"legacy[{encoder.name}]", f"1, {encoder.version}"
        self.source, self.sha256, self.config_sha256 = encoder.source, encoder.sha256, encoder.config_sha256
        self.comparable, self.device = encoder.comparable, encoder.device
        self.preprocess = f"bilinear without antialiasing, squash {_SIDE}, 0-255, not normalized"
        self.dim, self.max_tokens, self.logit_scale = encoder.dim, encoder.max_tokens, encoder.logit_scale
        self.encode_texts, self.truncated = encoder.encode_texts, encoder.truncated

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of any size -> float32 [B, D]."""
        pixels = resize_pytorch(as_images(self.name, images), _SIDE).round().to(self.device)
        network = self.of.network
        with whole_float32():
            if hasattr(network, "encode_image"):  # open_clip
                return network.encode_image(pixels).float().cpu()
            return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output).float().cpu()


def _input_side(encoder: Any) -> int:
    network = encoder.network
    size = network.visual.image_size if hasattr(network, "visual") else network.config.vision_config.image_size
    return int(size if isinstance(size, int) else size[0])
