"""How good single frames look, whatever they should show (VBench: aesthetic quality, imaging quality).

Huang et al. 2024, arXiv 2311.17982, section 3.2. Both are means over frames of what a network says of one picture: an aesthetic
head on CLIP ViT-L/14 (LAION's linear one, 0 to 10), divided by 10; a judge of technical quality without reference (MUSIQ trained
on SPAQ, 0 to 100), divided by 100.
"""

from torch import Tensor

from .moments import check_features
from .score import FrameScore


def _mean(where: str, rows: Tensor, full: float) -> float:
    check_features(where, rows)
    if rows.shape[1] != 1:
        raise ValueError(
            f"{where}: rows must be one number per frame [F, 1], got {list(rows.shape)}. Pass verdicts, not embeddings."
        )
    return float(rows.double().mean()) / full


def aesthetic_quality(rows: Tensor, text: Tensor | None = None) -> float:
    """Mean over frames of verdicts [F, 1] between 0 and 10, divided by 10."""
    return _mean("aesthetic_quality", rows, 10)


def imaging_quality(rows: Tensor, text: Tensor | None = None) -> float:
    """Mean over frames of verdicts [F, 1] between 0 and 100, divided by 100."""
    return _mean("imaging_quality", rows, 100)


SCORES = (
    FrameScore(
        name="aesthetic_quality",
        label="Aesthetic quality",
        higher_is_better=True,
        function=aesthetic_quality,
        gives="aesthetic",
        published=(("aesthetic[*sa_0_4_vit_l_14_linear*, clip[*large-patch14]]", "*"),),
    ),
    FrameScore(
        name="imaging_quality",
        label="Imaging quality",
        higher_is_better=True,
        function=imaging_quality,
        gives="quality",
        published=(("musiq[*spaq*]", "*"),),
    ),
)
