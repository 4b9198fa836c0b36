"""How much a clip moves, and how much it flickers once motion is taken out; from optical flow (``extractors/flow.py``).

    flow score   mean length of the flow over pixels and pairs of frames, in pixels of the clip (EvalCrafter's Flow-Score)
    warp error   mean squared error between a frame and the next one, moved back along the flow, where nothing is hidden
                 (Lai et al. 2018, arXiv 1808.00449, section 4.2), for frames in [0, 1]

More motion is neither better nor worse: papers print the flow score's distance from the original's. What is hidden is found by
going forth and back (Sundaram et al. 2010, eq. 5): a pixel counts where |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5. EvalCrafter's own
code halves frames first and gives RAFT numbers in [0, 1] where it expects 0 to 255; its values are smaller and other.
"""

from typing import Any

from torch import Tensor

from .extractors.contract import as_clip
from .extractors.flow import checked_flow, warp
from .score import ClipScore


def flow_score(estimator: Any, clip: Tensor) -> float:
    """Mean length of the flow between consecutive frames of a clip, uint8 [F, 3, H, W], F at least 2; pixels per frame."""
    clip = as_clip("flow_score", clip, least=2)
    return float(checked_flow(estimator, clip[:-1], clip[1:]).double().norm(dim=1).mean())


def warp_error(estimator: Any, clip: Tensor) -> float:
    """Mean over pairs of the squared error of visible pixels, of a clip uint8 [F, 3, H, W], F at least 2; frames count as [0, 1].

    A pair in which nothing is visible (a cut) counts all its pixels. 0 for a still clip. Raises ``ValueError`` as the flow does.
    """
    clip = as_clip("warp_error", clip, least=2)
    first, second = clip[:-1], clip[1:]
    there, back = checked_flow(estimator, first, second), checked_flow(estimator, second, first)
    read, inside = warp(second, there)
    error = ((read - first) / 255).double().square().mean(dim=1)
    seen = _visible(there, back) & inside
    seen = seen | ~seen.flatten(1).any(dim=1)[:, None, None]
    return float(((error * seen).sum(dim=(1, 2)) / seen.sum(dim=(1, 2))).mean())


def _visible(there: Tensor, back: Tensor) -> Tensor:
    """Whether a pixel comes back to itself, bool [B, H, W]; both flows [B, 2, H, W]."""
    returned, _ = warp(back, there)
    away = (there + returned).square().sum(dim=1)
    return away < 0.01 * (there.square().sum(dim=1) + returned.square().sum(dim=1)) + 0.5


SCORES = (
    ClipScore(
        name="flow_score",
        label="Flow score",
        unit="px",
        higher_is_better=None,
        digits=3,
        needs="flow",
        published=(("raft[things]", "*"),),
        function=lambda frames, fps, tool: flow_score(tool, frames),
    ),
    ClipScore(
        name="warp_error",
        label="Warp error",
        higher_is_better=False,
        digits=6,
        needs="flow",
        published=(),  # the tables' code halves frames and feeds RAFT other numbers
        function=lambda frames, fps, tool: warp_error(tool, frames),
    ),
)
