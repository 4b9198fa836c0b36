"""A clip as the mean of its frames, in the space of a model of pictures and texts: a stand-in for models of video and text.

Eight frames, the middle of eight equal parts (as VBench samples for ViCLIP), are encoded; their embeddings, each of length one, are
averaged. That is the mean pooling of CLIP4Clip (Luo et al. 2021, arXiv 2104.08860, "parameter-free"): it sees what frames show and
not their order. Published temporal style and overall consistency are ViCLIP's, so nothing from here is comparable with them.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import ImageTextEncoder, checked_rows, identity

NUM_FRAMES = 8


def middle_frames(num: int, wanted: int = NUM_FRAMES) -> list[int]:
    """Indices of the middle of ``wanted`` equal parts of ``num`` frames; of fewer frames every one."""
    parts = min(num, wanted)
    edges = [int(i * num / parts) for i in range(parts + 1)]
    return [(low + high - 1) // 2 for low, high in pairwise(edges)]


class PooledClip:
    """The encoder of clips around ``encoder``, an ``ImageTextEncoder``."""

    comparable = False

    def __init__(self, encoder: ImageTextEncoder) -> None:
        self._encoder: Any = encoder
        self.name = f"frames[{encoder.name}]"
        self.version, self.source, self.sha256 = f"1, {encoder.version}", encoder.source, encoder.sha256
        self.config_sha256 = identity(encoder)
        self.preprocess = f"{NUM_FRAMES} middle frames, {encoder.preprocess}"
        self.dim, self.max_tokens, self.logit_scale = encoder.dim, encoder.max_tokens, encoder.logit_scale
        self.device = getattr(encoder, "device", torch.device("cpu"))

    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, 3, H, W] -> float32 [B, D]."""
        kept = clips[:, middle_frames(clips.shape[1])]
        rows = checked_rows(self._encoder, kept.flatten(0, 1)).unflatten(0, kept.shape[:2])
        return F.normalize(rows, dim=-1).mean(dim=1)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Texts -> float32 [B, D]."""
        return self._encoder.encode_texts(texts)

    def truncated(self, texts: list[str]) -> list[bool]:
        """As of the encoder."""
        return self._encoder.truncated(texts)
