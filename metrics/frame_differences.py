"""How differently two clips of one prompt and noise move: the error of the changes from frame to frame.

A clip whose frames are each a little off, all in the same way, moves as the original does; one that flickers does not, however
good each frame is alone. So the error is that of differences of neighbouring frames, in which whatever stands still cancels. It is
paired: scores of one clip alone (flow, warping error) could not tell single layers apart (ViDiT-Q, arXiv 2406.02540, publishes
tables of such, in which 8 bits beat 4 in half of the layers).
"""

import torch
from torch import Tensor

from .images import as_pair
from .psnr import CAP_DB
from .score import ClipScore


def difference_psnr(candidate: Tensor, reference: Tensor) -> Tensor:
    """PSNR of the changes from frame to frame in dB, float64 [B]; ``inf`` where both clips change alike.

    ``-10 log10`` of the mean of ``((a[f + 1] - a[f]) - (b[f + 1] - b[f]))^2``. Clips are float [B, F, 3, H, W] in [0, 1] with at
    least two frames; symmetric. Raises ``ValueError`` for anything else.
    """
    for x in (candidate, reference):
        if x.ndim != 5 or x.shape[1] < 2:
            raise ValueError(
                f"difference_psnr: clips must be [B, F, 3, H, W] with at least two frames, got {list(x.shape)}. Give whole clips."
            )
    if candidate.shape != reference.shape:
        raise ValueError(
            f"difference_psnr: both batches must be of one shape, got {list(candidate.shape)} and {list(reference.shape)}."
        )
    pair = as_pair("difference_psnr", candidate.flatten(0, 1), reference.flatten(0, 1), dtype=torch.float64)
    a, b = (x.view(reference.shape).diff(dim=1) for x in pair)
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3, 4)))


CLIP_SCORES = (
    ClipScore(
        name="difference_psnr",
        label="PSNR of changes between frames",
        unit="dB",
        higher_is_better=True,
        digits=2,
        cap=CAP_DB,
        load=lambda **options: difference_psnr,
    ),
)
