"""DINO (Caron et al. 2021) and DINOv2 (Oquab et al. 2023) as extractors: the class token after the last layer norm.

Self-supervised features see what Inception's do not: the Fréchet distance of DINOv2 ViT-L/14 features follows human judgement of
realism better than FID (Stein et al. 2023, "Exposing flaws of generative model evaluation metrics").

Images are squashed to 224 x 224 by float bicubic (``resize.resize_clean``, as in Stein et al.'s code with its clean resize) and
normalized with ImageNet's statistics. The folder's own preprocessor_config.json is not used: it serves classification, where one
crops.

Not the published FD-DINOv2 to the last digit: DINOv2 was trained at 518 pixels, and its own code stretches the position
embeddings to 224 with an offset of 0.1 patches that transformers leaves out. Scores are comparable with each other, and
``comparable`` with published ones only on the caller's word.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import Dinov2Model, ViTModel

from .contract import as_images
from .hub import find_folder, sha256_of_texts
from .precision import whole_float32
from .pretrained import VERSION, load_pretrained
from .resize import resize_clean, resize_shorter

_SIZE = 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet
# By config.json's model_type. DINO's pooler is an untrained layer that some files lack.
_KINDS = {"vit": ("dino", ViTModel, {"add_pooling_layer": False}), "dinov2": ("dinov2", Dinov2Model, {})}


_PREPROCESS = {
    "squash": (f"pil-bicubic-float, squash {_SIZE}, imagenet", resize_clean),
    "vbench": (f"vbench, bilinear, shortest {_SIZE}, imagenet", resize_shorter),
}


class Dino:
    """A DINO (model type "vit") or DINOv2 ("dinov2") of transformers: a folder, or a cached hub id such as facebook/dinov2-large.

    ``preprocess``: "squash" (above), or "vbench" for VBench's subject consistency: the shorter side to 224 by bilinear
    interpolation without antialiasing, nothing cropped. Raises ``MissingWeights``, and ``ValueError`` for another kind of model
    or preprocessing and for unreadable or incomplete weights.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        preprocess: str = "squash",
        comparable: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if preprocess not in _PREPROCESS:
            raise ValueError(
                f"dino: preprocess must be one of {', '.join(_PREPROCESS)}, got {preprocess!r}. The default is squash."
            )
        self.preprocess, self._resize = _PREPROCESS[preprocess]
        folder = find_folder("dino", model, "config.json")
        found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if found not in _KINDS:
            raise ValueError(
                f"dino: model_type in {folder}/config.json must be one of {sorted(_KINDS)}, got {found!r}. Pick another."
            )
        prefix, kind, options = _KINDS[found]
        self.name = f"{prefix}[{folder.resolve().name if Path(model).is_dir() else model}]"
        self.version = f"1, {VERSION}"
        self.source, self.comparable, self.device = str(model), comparable, torch.device(device)
        network, self.sha256 = load_pretrained(self.name, kind, folder, **options)
        self.config_sha256 = sha256_of_texts(folder)
        patch = network.config.patch_size
        if _SIZE % patch and preprocess == "squash":
            raise ValueError(
                f"{self.name}: patch_size must divide {_SIZE}, got {patch}. Images would lose their right and lower edge."
            )
        self.network = network.to(self.device)
        self.dim = int(network.config.hidden_size)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of any size -> float32 [B, D]."""
        x = self._resize(as_images(self.name, images), _SIZE).cpu() / 255
        x = (x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        # DINO was trained at 224, so nothing is interpolated there; files of other sizes (384) would need it.
        # (Dinov2Model always does, without being asked.)
        resized = {"interpolate_pos_encoding": True} if isinstance(self.network, ViTModel) else {}
        with whole_float32():
            return self.network(pixel_values=x.to(self.device), **resized).last_hidden_state[:, 0].float().cpu()
