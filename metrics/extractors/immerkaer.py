"""Quality of a single picture without weights: how little noise it has, as Immerkaer 1996 estimates it.

"Fast noise variance estimation" (Computer Vision and Image Understanding 64): a mask that answers to neither constant nor linear
structure is convolved with the picture; the mean absolute answer is proportional to the standard deviation of white noise. Here
of the luma (ITU-R BT.601), mapped to 100 / (1 + sigma / 10 levels): 100 without noise, 50 at 10 levels.

A stand-in for a trained judge (MUSIQ): it sees noise and broken texture, and blur as quality. Never comparable with published
imaging quality.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import as_images

_MASK = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))
_LUMA = (0.299, 0.587, 0.114)
_HALF = 10.0  # levels of noise at which half of the quality is left


class Immerkaer:
    """Verdicts [B, 1] of pictures of at least 3 x 3 pixels, in (0, 100]."""

    name = "immerkaer"
    version = "1"
    source = "no weights"
    sha256 = ""
    config_sha256 = ""
    comparable = False
    preprocess = "native size, luma"
    gives = "quality"
    dim = 1

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 1]."""
        return (100 / (1 + self.noise(images) / _HALF))[:, None].float()

    def noise(self, images: Tensor) -> Tensor:
        """Estimated standard deviation of the noise in levels of 255, float64 [B]."""
        images = as_images(self.name, images).cpu().double()
        if min(images.shape[2:]) < 3:
            raise ValueError(f"{self.name}: images must be at least 3 x 3 pixels, got {list(images.shape[2:])}. Take larger ones.")
        luma = (images * torch.tensor(_LUMA, dtype=torch.float64).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        answers = F.conv2d(luma, torch.tensor(_MASK, dtype=torch.float64).view(1, 1, 3, 3))
        return math.sqrt(math.pi / 2) * answers.abs().mean(dim=(1, 2, 3)) / 6
