"""How well every second frame follows from its neighbours (VBench: motion smoothness).

Huang et al. 2024, arXiv 2311.17982, section 3.2: frames of odd index are dropped and interpolated from those before and behind,
and compared with the real ones: (255 - mean absolute error) / 255. Even motion is predictable, jumps are not. VBench interpolates
with AMT-S (Li et al. 2023); an own interpolator (``extractors/interpolation.py``) gives another number under its own name. A last
frame of odd index has nothing behind it and is left out.
"""

from typing import Any

import torch
from torch import Tensor

from .extractors.contract import as_clip
from .extractors.interpolation import checked_middle
from .score import ClipScore

_AT_ONCE = 8  # frames interpolated together


def motion_smoothness(frames: Tensor, fps: float | None, interpolator: Any) -> float:
    """Of one clip uint8 [F, 3, H, W], F at least 3, in [0, 1]. Raises ``ValueError`` for shorter clips."""
    frames = as_clip("motion_smoothness", frames, 3)
    kept, dropped = frames[::2], frames[1:-1:2]
    parts = zip(kept[:-1].split(_AT_ONCE), kept[1:].split(_AT_ONCE), dropped.split(_AT_ONCE), strict=True)
    errors = [(checked_middle(interpolator, a, b).double() - real.double()).abs().mean(dim=(1, 2, 3)) for a, b, real in parts]
    return float(255 - torch.cat(errors).mean()) / 255


SCORES = (
    ClipScore(
        name="motion_smoothness",
        label="Motion smoothness",
        higher_is_better=True,
        function=motion_smoothness,
        needs="interpolate",
        least=3,
        published=(("amt-s", "*"),),
    ),
)
