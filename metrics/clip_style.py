"""Whether a clip has the style or the content that a text names (VBench: appearance style, temporal style, overall consistency).

Huang et al. 2024, arXiv 2311.17982, section 3.2. All three are cosines. Appearance style: of each frame (CLIP ViT-B/32) with the
name of the style, which the suite of prompts tells, averaged over frames. Temporal style and overall consistency: of the whole
clip with its prompt, in the space of a video and text model (ViCLIP); they differ in their prompts only. Negative cosines count
as they are.
"""

from torch import Tensor

from .clip_score import clip_cosine
from .score import FrameScore, TextScore


def style_cosine(frames: Tensor, text: Tensor | None) -> float:
    """Mean cosine of frames [F, D] with the embedding of one text [1, D], in [-1, 1]."""
    if text is None:
        raise ValueError("style_cosine: text must be the embedding of the style [1, D], got None. The suite of prompts names it.")
    return float(clip_cosine(frames, text.expand(len(frames), -1)).mean())


SCORES = (
    FrameScore(
        name="appearance_style",
        label="Appearance style",
        higher_is_better=True,
        function=style_cosine,
        text="style",
        published=(("clip[*base-patch32*]", "CLIPImageProcessor*"),),  # of PIL images, unlike background consistency
    ),
    TextScore(
        name="temporal_style",
        label="Temporal style",
        higher_is_better=True,
        function=clip_cosine,
        digits=4,
        of_clips=True,
        published=(("viclip*", "*"),),
    ),
    TextScore(
        name="overall_consistency",
        label="Overall consistency",
        higher_is_better=True,
        function=clip_cosine,
        digits=4,
        of_clips=True,
        published=(("viclip*", "*"),),
    ),
)
