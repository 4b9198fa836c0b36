"""How far a clip's changes from frame to frame are from the original clip's: PSNR of the difference between the two differences.

PSNR frame by frame cannot tell a still error from a flickering one: a colour that is off by as much in every frame and a colour
that jumps by as much have the same error per frame. Here the first counts for nothing, since it leaves every change as it was, and
the second twice. So a clip that loses little by PSNR and much by this one flickers, or moves otherwise.

    10 log10( 1 / mean over t of ((c[t+1] - c[t]) - (r[t+1] - r[t]))^2 )        c, r in [0, 1]

Of independent noise in each frame it is 3 dB below PSNR. Nobody publishes it under this name; it stands beside paired scores.
"""

import torch
from torch import Tensor

from .psnr import CAP_DB
from .score import PairScore


def as_clips(where: str, a: Tensor, b: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both batches on one device. Raises ``ValueError`` unless they are floating [B, F, 3, H, W] in [0, 1] of one shape, F at least
    ``least``."""
    for name, x in (("first", a), ("second", b)):
        if x.ndim != 5 or x.shape[2] != 3 or x.numel() == 0 or x.shape[1] < least:
            raise ValueError(
                f"{where}: the {name} batch must be clips [B, F, 3, H, W] of at least {least} frames, got {list(x.shape)}. "
                "Stack the frames before the channels."
            )
        if not x.is_floating_point():
            raise ValueError(f"{where}: the {name} batch must be floating point in [0, 1], got {x.dtype}. Divide uint8 by 255.")
        low, high = float(x.min()), float(x.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{where}: the {name} batch must be in [0, 1], got [{low:.4g}, {high:.4g}]. Rescale it.")
    if a.shape != b.shape:
        raise ValueError(
            f"{where}: both batches must be of one shape, got {list(a.shape)} and {list(b.shape)}. Compare clips of one size."
        )
    return a, b.to(a.device)


def frame_changes(candidate: Tensor, reference: Tensor) -> Tensor:
    """PSNR of the changes from frame to frame in dB, float64 [B]; ``inf`` where all changes are equal.

    Both batches are float [B, F, 3, H, W] in [0, 1], F at least 2; symmetric. Raises ``ValueError`` for anything else.
    """
    a, b = as_clips("frame_changes", candidate, reference)
    total = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    before = None
    for mine, theirs in zip(a.unbind(1), b.unbind(1), strict=True):  # frame by frame: a long clip in float64 is gigabytes
        error = mine.double() - theirs.double()
        if before is not None:
            total += (error - before).square().mean(dim=(1, 2, 3))
        before = error
    return -10 * torch.log10(total / (a.shape[1] - 1))


SCORES = (
    PairScore(
        name="frame_changes",
        label="PSNR of changes between frames",
        unit="dB",
        higher_is_better=True,
        digits=2,
        cap=CAP_DB,
        clips=True,
        load=lambda **options: frame_changes,
    ),
)
