"""Any picture extractor as one of clips: what the frames show, and how much it changes; for distances where no video network is.

A clip's row is [mean over frames of the features, root mean square of their changes from frame to frame], 2 D numbers. It sees what
is shown and how much it moves or flickers, not which way. Nobody publishes distances with it.
"""

from typing import Any

import torch
from torch import Tensor

from .contract import as_clip, checked_rows


class MovingFrames:
    """The extractor of clips around ``extractor``, one of pictures."""

    comparable = False

    def __init__(self, extractor: Any) -> None:
        self._of = extractor
        self.name, self.version = f"motion[{extractor.name}]", f"1, {extractor.version}"
        self.source, self.sha256, self.config_sha256 = extractor.source, extractor.sha256, extractor.config_sha256
        self.preprocess = f"{extractor.preprocess}, mean and rms change over frames"
        self.dim, self.device = 2 * extractor.dim, getattr(extractor, "device", torch.device("cpu"))

    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, 3, H, W] of any size, F at least 2 -> float32 [B, 2 D]. Raises ``ValueError`` for single frames."""
        rows = torch.stack([checked_rows(self._of, as_clip(self.name, clip, least=2)) for clip in clips]).double()
        changes = rows.diff(dim=1).square().mean(dim=1).sqrt()
        return torch.cat([rows.mean(dim=1), changes], dim=1).float()
