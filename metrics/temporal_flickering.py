"""How little a still scene flickers (VBench: temporal flickering): mean absolute difference of consecutive frames.

Huang et al. 2024, arXiv 2311.17982, section 3.2: (255 - mean over pairs and pixels of |difference|) / 255, on 8-bit values.
Motion counts as flickering, so VBench takes 25 clips of each of its 75 prompts of still scenes, and of these the still ones only
(``dynamic_degree.is_still``). Without that filter the number is of other clips: it has a name of its own and is published
nowhere.
"""

from itertools import pairwise
from typing import Any

from torch import Tensor

from .dynamic_degree import RAFT, is_still
from .extractors.contract import as_clip
from .score import ClipScore


def steadiness(frames: Tensor) -> float:
    """Of one clip uint8 [F, 3, H, W], F at least 2, in [0, 1]; 1 for equal frames. Raises ``ValueError`` for other clips."""
    frames = as_clip("temporal_flickering", frames, 2)
    # Pair by pair: a clip in float64 is eight times its size.
    means = [float((a.double() - b.double()).abs().mean()) for a, b in pairwise(frames)]
    return (255 - sum(means) / len(means)) / 255


def temporal_flickering(frames: Tensor, fps: float | None, flow: Any) -> float | None:
    """``steadiness`` of a still clip, None of one that moves."""
    assert fps is not None
    return steadiness(frames) if is_still(frames, fps, flow) else None


SCORES = (
    ClipScore(
        name="temporal_flickering",
        label="Temporal flickering",
        higher_is_better=True,
        function=temporal_flickering,
        needs="flow",
        needs_fps=True,
        published=RAFT,
    ),
    ClipScore(
        name="temporal_flickering_unfiltered",
        label="Temporal flickering, moving clips too",
        higher_is_better=True,
        function=lambda frames, fps, tool: steadiness(frames),
        published=(),
    ),
)
