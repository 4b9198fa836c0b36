"""How much a clip stays the same: cosines of its frames' embeddings (VBench: subject and background consistency).

Both are one formula on two networks (Huang et al. 2024, arXiv 2311.17982, section 3.2). Frame i after the first is compared with
its predecessor and with the first; negative cosines count as 0; the mean of the two is averaged over frames. A still clip has 1.
VBench takes DINO ViT-B/16 for the subject and CLIP ViT-B/32 for the background, each with its own way to resize
(``preprocess="vbench"`` of the extractors); another network gives another number.

The value of many clips is the mean over clips. VBench's own program averages over frames on one GPU and over clips on several,
which differs where clips have unequal lengths.
"""

from torch import Tensor

from .clip_score import unit_rows
from .moments import check_features
from .score import FrameScore


def consistency(frames: Tensor, text: Tensor | None = None) -> float:
    """Of one clip's embeddings [F, D], F at least 2, in [0, 1]. Raises ``ValueError`` for fewer frames, NaN and zero rows."""
    check_features("consistency", frames, least=2)
    rows = unit_rows("consistency", "first", frames)
    to_last = (rows[1:] * rows[:-1]).sum(dim=1).clamp(0, 1)
    to_first = (rows[1:] * rows[0]).sum(dim=1).clamp(0, 1)
    return float((to_last + to_first).mean() / 2)


SCORES = (
    FrameScore(
        name="subject_consistency",
        label="Subject consistency",
        higher_is_better=True,
        function=consistency,
        least=2,
        published=(("dino[*vitb16*]", "vbench, *"), ("dino[*vit-b*16*]", "vbench, *")),
    ),
    FrameScore(
        name="background_consistency",
        label="Background consistency",
        higher_is_better=True,
        function=consistency,
        least=2,
        published=(("clip[*base-patch32*]", "vbench, *"),),
    ),
)
