"""CLIP scores of clips, from the embeddings of their frames: whether frames fit the text, and whether they stay alike.

    clipsim     mean over frames of cos(frame, text)                       Wu et al. 2021 (GODIVA, arXiv 2104.14806)
    clip_temp   mean over consecutive frames of cos(frame, next frame)     Esser et al. 2023; EvalCrafter's CLIP-Temp

Papers of quantized video models (ViDiT-Q, Q-VDiT, PARO) print both as EvalCrafter's code computes them: with CLIP ViT-B/32, frames
squashed to 224, *0 to 255 and not normalized*, far outside of what the network knows. There CLIPSIM is about 0.18 and CLIP-Temp
0.998 for everything, differences in the fourth digit. ``legacy_clip.LegacyFrames`` makes embeddings that way, for standing beside
those tables; scores with it are named after it. With the model's own preprocessing the same functions are the
scores that the definitions mean.
"""

from torch import Tensor

from .clip_score import unit_rows
from .moments import check_features
from .score import FrameScore


def clipsim(frames: Tensor, text: Tensor) -> float:
    """Mean cosine of the frames' embeddings [F, D] with the text's [1, D], in [-1, 1].

    Raises ``ValueError`` for other shapes, NaN and zero rows.
    """
    check_features("clipsim", frames, text)
    if len(text) != 1:
        raise ValueError(f"clipsim: text must be one embedding [1, D], got {list(text.shape)}. Score one clip at a time.")
    rows, words = unit_rows("clipsim", "first", frames), unit_rows("clipsim", "second", text.to(frames.device))
    return float((rows @ words[0]).clamp(-1, 1).mean())


def clip_temp(frames: Tensor, text: Tensor | None = None) -> float:
    """Mean cosine of consecutive frames' embeddings [F, D], F at least 2. 1 for a still clip; higher is smoother, not better.

    Raises ``ValueError`` for other shapes, fewer frames, NaN and zero rows.
    """
    check_features("clip_temp", frames, least=2)
    rows = unit_rows("clip_temp", "first", frames)
    return float((rows[1:] * rows[:-1]).sum(dim=1).clamp(-1, 1).mean())


_B32 = (("clip[*base-patch32*]", "*"), ("open_clip[*vit-b-32*]", "*"), ("legacy[*b*32*]", "*"))  # what the tables are made with
SCORES = (
    FrameScore(name="clipsim", label="CLIPSIM", higher_is_better=True, function=clipsim, text="prompt", published=_B32),
    FrameScore(name="clip_temp", label="CLIP-Temp", higher_is_better=True, function=clip_temp, least=2, published=_B32),
)
