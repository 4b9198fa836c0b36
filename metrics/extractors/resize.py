"""Images on their way to a network: the resizes that published scores were computed with, and uint8 tensors as PIL images.

Three resizes that all call themselves "resize to 299" give FIDs that differ by more than papers do (Parmar et al. 2022, "On Aliased
Resizing and Surprising Subtleties in GAN Evaluation"):

    clean     PIL bicubic with antialiasing, one channel at a time in float, clipped to [0, 255], not rounded (clean-fid)
    legacy    bilinear with TensorFlow 1's corners: output pixel i is read at i * in / out, no half-pixel shift, no antialiasing
    pytorch   bilinear with half-pixel centres, no antialiasing (``F.interpolate``; pytorch-fid)

All squash to a square. Values stay on the scale 0-255.

``resize_shorter`` keeps the aspect instead: the shorter side to the size, as VBench resizes the frames of clips.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def as_pil(images: Tensor) -> list[Image.Image]:
    """uint8 [B, 3, H, W] -> RGB images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


def resize_clean(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size] on the CPU, bicubic in PIL's float mode."""
    channels = images.flatten(0, 1).cpu().numpy().astype(np.float32)
    resized = [np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    # Bicubic overshoots at edges; clean-fid clips, and so does every 8-bit resize.
    return torch.from_numpy(np.stack(resized)).clamp(0, 255).unflatten(0, images.shape[:2])


def resize_shorter(images: Tensor, size: int, mode: str = "bilinear") -> Tensor:
    """uint8 [B, 3, H, W] -> float32 with the shorter side ``size`` and the longer one in proportion, rounded down; half-pixel
    centres, no antialiasing. Bicubic overshoots, and is not clipped: the published scores are not either."""
    height, width = images.shape[2:]
    short = min(height, width)
    sides = tuple(size if side == short else int(size * side / short) for side in (height, width))
    return F.interpolate(images.float(), size=sides, mode=mode, align_corners=False)


def resize_legacy(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size]: ``tf.image.resize_bilinear`` of TensorFlow 1, rounding included."""
    x = images.float()
    for axis in (3, 2):  # TensorFlow interpolates along a row first, then between rows
        num = x.shape[axis]
        position = torch.arange(size, device=x.device, dtype=torch.float32) * torch.tensor(num / size, dtype=torch.float32)
        low = position.long()
        high = (low + 1).clamp(max=num - 1)
        fraction = (position - low).view(-1, *[1] * (3 - axis))
        left = x.index_select(axis, low)
        x = left + (x.index_select(axis, high) - left) * fraction
    return x


def resize_pytorch(images: Tensor, size: int) -> Tensor:
    """uint8 [B, 3, H, W] -> float32 [B, 3, size, size]: ``F.interpolate``, bilinear, half-pixel centres, no antialiasing."""
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", align_corners=False)
