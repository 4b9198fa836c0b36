"""What a video score asks of an optical flow: two batches of uint8 frames in, one finite displacement per pixel out.

As for features (``contract``), only uint8 crosses the boundary, and a flow is named by everything that moves its numbers. Frames
are RGB [B, 3, H, W]. A flow is float32 [B, 2, H, W] in pixels of these frames: channel 0 to the right, channel 1 down. What is
seen at pixel p of ``first`` is at p + flow[p] in ``second``.
"""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import as_images


@runtime_checkable
class FlowEstimator(Protocol):
    """Pairs of frames to displacements. The attributes mean what they mean for ``contract.Extractor``."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def sha256(self) -> str: ...

    @property
    def config_sha256(self) -> str: ...

    @property
    def comparable(self) -> bool: ...

    @property
    def preprocess(self) -> str: ...

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice -> float32 [B, 2, H, W] on the CPU, x then y, in pixels."""


def as_frames(where: str, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both batches, if they are uint8 [B, 3, H, W] of one shape; else ``ValueError``."""
    first, second = as_images(where, first), as_images(where, second)
    if first.shape != second.shape:
        raise ValueError(
            f"{where}: both batches must be of one shape, got {list(first.shape)} and {list(second.shape)}. Pair frames."
        )
    return first, second


def checked_flow(estimator: Any, first: Tensor, second: Tensor) -> Tensor:
    """``estimator.flow(first, second)``, float32 [B, 2, H, W], with the contract checked.

    Raises ``ValueError`` for frames outside the contract, and for an estimator that returns another shape, NaN or infinity.
    """
    first, second = as_frames(estimator.name, first, second)
    found = estimator.flow(first, second)
    wanted = [len(first), 2, *first.shape[2:]]
    if list(found.shape) != wanted or found.dtype != torch.float32:
        raise ValueError(
            f"{estimator.name}: flow must be float32 {wanted}, x then y, got {found.dtype} {list(found.shape)}. Fix the estimator."
        )
    if not bool(found.isfinite().all()):
        bad = int((~found.isfinite().flatten(1).all(dim=1)).sum())
        raise ValueError(
            f"{estimator.name}: flow must be finite, got NaN or infinity in {bad} of {len(first)} pairs. Check these frames."
        )
    return found


def warp(images: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Backward warping: ``images`` [B, C, H, W] read at p + flow[p] (bilinear, edges repeated), and where that lies inside.

    Returns floating [B, C, H, W] and bool [B, H, W]. With the flow from ``first`` to ``second``, ``warp(second, flow)`` is
    ``first`` wherever nothing is hidden. Half a pixel beyond the outermost centres still counts as inside.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device, dtype=flow.dtype) + flow[:, 0]
    y = torch.arange(height, device=images.device, dtype=flow.dtype)[:, None] + flow[:, 1]
    # grid_sample without aligned corners: -1 and 1 are the outer edges of the outermost pixels.
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    read = F.grid_sample(images.to(flow.dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return read, (grid.abs() <= 1).all(dim=-1)
