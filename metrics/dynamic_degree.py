"""Whether a clip moves at all (VBench: dynamic degree), and whether it stands still (VBench's filter of still clips).

Huang et al. 2024, arXiv 2311.17982, with the constants of the published program. Frames are looked at about 8 times per second;
the motion of a pair is the mean of its largest flow magnitudes. How much of that counts grows with the picture's shorter side.

    dynamic    at least round(4 n / 16) of the pairs of n frames move more than 6 * side / 256 pixels (largest 5 % of pixels);
               with fewer frames per second than 8, as much more as they are further apart in time
    still      at most c = round(2 n / 16) pairs move more than 3 * side / 256 (largest 2 %), and between the first frame and the
               last, either way, the motion is at most 2 c times that

The flow is RAFT's (trained on FlyingThings, 20 updates) wherever numbers are published. Of clips of so few frames that a count
rounds to 0, which would make every clip dynamic and none still, it is taken for 1.
"""

from typing import Any

import torch
from torch import Tensor

from .extractors.contract import as_clip
from .extractors.flow import checked_flow
from .score import ClipScore

_RATE = 8  # frames per second that motion is looked at
_AT_ONCE = 16  # pairs: a flow is larger than its frames
_REFERENCE_SIDE, _REFERENCE_FRAMES = 256, 16
RAFT = (("raft[things]", "*"),)


def sampled(frames: Tensor, fps: float) -> Tensor:
    """About 8 frames per second of a clip [F, 3, H, W]: every round(fps / 8)th, at least every one."""
    return frames[:: max(1, round(fps / _RATE))]


def largest_motion(frames: Tensor, flow: Any, share: float) -> Tensor:
    """Per pair of consecutive frames the mean of the largest ``share`` of its flow magnitudes, float32 [F - 1], in pixels."""
    num = max(1, int(frames.shape[2] * frames.shape[3] * share))
    pairs = zip(frames[:-1].split(_AT_ONCE), frames[1:].split(_AT_ONCE), strict=True)
    found = [checked_flow(flow, a, b).norm(dim=1).flatten(1).topk(num).values.mean(dim=1) for a, b in pairs if len(a)]
    return torch.cat(found) if found else torch.zeros(0)


def is_dynamic(frames: Tensor, fps: float, flow: Any) -> bool:
    """Whether a clip uint8 [F, 3, H, W] of ``fps`` frames per second moves, by the optical flow ``flow``."""
    taken = sampled(as_clip("dynamic_degree", frames, 2), fps)
    threshold = max(1.0, _RATE / fps) * 6 * min(frames.shape[2:]) / _REFERENCE_SIDE
    moves = largest_motion(taken, flow, 0.05) > threshold
    return int(moves.sum()) >= max(1, round(4 * len(taken) / _REFERENCE_FRAMES))


def is_still(frames: Tensor, fps: float, flow: Any) -> bool:
    """Whether a clip uint8 [F, 3, H, W] of ``fps`` frames per second stands still enough to be judged for flickering."""
    taken = sampled(as_clip("temporal_flickering", frames, 2), fps)
    allowed, threshold = max(1, round(2 * len(taken) / _REFERENCE_FRAMES)), 3 * min(frames.shape[2:]) / _REFERENCE_SIDE
    moves = largest_motion(taken, flow, 0.02) > threshold
    across = largest_motion(torch.stack([taken[0], taken[-1], taken[0]]), flow, 0.02)
    return int(moves.sum()) <= allowed and bool((across <= 2 * allowed * threshold).all())


def dynamic_degree(frames: Tensor, fps: float | None, flow: Any) -> float:
    """1 for a dynamic clip, else 0; a set's degree is the mean. Higher is not better by itself: a broken model also moves."""
    assert fps is not None
    return float(is_dynamic(frames, fps, flow))


SCORES = (
    ClipScore(
        name="dynamic_degree",
        label="Dynamic degree",
        higher_is_better=True,
        function=dynamic_degree,
        needs="flow",
        needs_fps=True,
        boolean=True,
        published=RAFT,
    ),
)
