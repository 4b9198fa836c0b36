"""Frames between frames: what motion smoothness asks of an interpolator, and one made of an optical flow.

An interpolator gives the picture half-way between two frames: ``interpolate(first, second)``, uint8 [B, 3, H, W] in and out,
beside the attributes that name every extractor (``contract.Extractor``). VBench's is AMT-S; its program and weights are not here,
so its number comes from VBench's own result files.
"""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .contract import identity
from .flow import as_frames, checked_flow, warp


@runtime_checkable
class FrameInterpolator(Protocol):
    """Two frames to the one between them."""

    @property
    def name(self) -> str: ...

    @property
    def comparable(self) -> bool: ...

    def interpolate(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice -> uint8 [B, 3, H, W] on the CPU."""


def checked_middle(interpolator: Any, first: Tensor, second: Tensor) -> Tensor:
    """``interpolator.interpolate(first, second)`` with the contract checked. Raises ``ValueError`` where either side breaks it."""
    first, second = as_frames(interpolator.name, first, second)
    made = interpolator.interpolate(first, second)
    if made.dtype != torch.uint8 or made.shape != first.shape:
        raise ValueError(
            f"{interpolator.name}: the middle must be uint8 {list(first.shape)}, got {made.dtype} {list(made.shape)}. "
            "Fix the interpolator."
        )
    return made


class WarpInterpolator:
    """Both frames moved half-way along a flow, and averaged.

    The flows from the middle are those of Jiang et al. 2018 ("Super SloMo", eq. 4) at half time: a quarter of the difference of
    both directions. Where one frame would be read outside, the other alone counts. ``flow``: of ``extractors/flow.py``.
    """

    version = "1"
    comparable = False

    def __init__(self, flow: Any) -> None:
        self._flow = flow
        self.name = f"warp[{flow.name}]"
        self.source, self.sha256 = flow.source, flow.sha256
        # Whatever moves the flow moves the middle; its identity stands for that.
        self.config_sha256, self.preprocess = identity(flow), flow.preprocess
        self.device = getattr(flow, "device", torch.device("cpu"))

    @torch.no_grad()
    def interpolate(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice -> uint8 [B, 3, H, W]."""
        towards = (checked_flow(self._flow, first, second) - checked_flow(self._flow, second, first)) / 4
        (early, seen_early), (late, seen_late) = warp(first.cpu().float(), -towards), warp(second.cpu().float(), towards)
        weight = torch.where(seen_early == seen_late, 0.5, seen_early.float())[:, None]
        return (weight * early + (1 - weight) * late).round().clamp(0, 255).to(torch.uint8)
