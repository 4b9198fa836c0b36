"""V-JEPA 2 of transformers as an extractor of clips: what its attentive pooler makes of all patches of all frames.

JEDi (Luo et al. 2024, arXiv 2410.05203) is a kernel distance on V-JEPA features after a probe trained on Something-Something v2.
Its own network, the first V-JEPA's ViT-H/16 with 1280 numbers, has no port in transformers; that of V-JEPA 2 with the same kind of
probe has ("facebook/vjepa2-vitl-fpc16-256-ssv2" and larger). So a distance on this extractor is JEDi's recipe, not the published
JEDi, and is never called comparable with it.

Frames are squashed to the model's crop size (bilinear, antialiased) and normalized with ImageNet's statistics; ``frames`` of a clip
are taken evenly, first and last included, as many as the checkpoint was trained on (``frames_per_clip``).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import VJEPA2ForVideoClassification

from .contract import as_clip
from .hub import find_folder, sha256_of_texts
from .precision import whole_float32
from .pretrained import VERSION, load_pretrained

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


class VJepa:
    """A classifier of transformers' V-JEPA 2: a folder, or a cached hub id. Raises ``MissingWeights``, and ``ValueError`` for
    unreadable or incomplete weights."""

    comparable = False

    def __init__(self, model: str | Path, *, device: str | torch.device = "cpu") -> None:
        folder = find_folder("vjepa2", model, "config.json")
        self.name = f"vjepa2[{folder.resolve().name if Path(model).is_dir() else model}]"
        network, self.sha256 = load_pretrained(self.name, VJEPA2ForVideoClassification, folder)
        self.version, self.config_sha256, self.source = f"1, {VERSION}", sha256_of_texts(folder), str(model)
        self.network, self.device = network.to(device), torch.device(device)
        config = network.config
        self.dim, self._side, self.frames = int(config.hidden_size), int(config.crop_size), int(config.frames_per_clip)
        self._step = int(config.tubelet_size)
        self.preprocess = f"bilinear antialiased, squash {self._side}, imagenet, {self.frames} frames evenly, attentive pooler"

    @torch.no_grad()
    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, 3, H, W] of any size -> float32 [B, D]. Short clips repeat frames; single frames are an error."""
        taken = torch.linspace(0, clips.shape[1] - 1, self.frames).round().long()
        mean, std = (torch.tensor(values, device=self.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        rows = []
        for clip in clips:
            frames = as_clip(self.name, clip, least=self._step)[taken].to(self.device).float()
            x = F.interpolate(frames, size=(self._side, self._side), mode="bilinear", align_corners=False, antialias=True)
            with whole_float32():
                states = self.network.vjepa2(pixel_values_videos=((x / 255 - mean) / std)[None], skip_predictor=True)
                rows.append(self.network.pooler(states.last_hidden_state).float().cpu())
        return torch.cat(rows)
