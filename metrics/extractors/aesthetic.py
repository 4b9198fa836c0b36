"""An aesthetic score of a picture: one linear layer on a CLIP's embedding of unit length (LAION's aesthetic predictor, version 1).

The published one is ``sa_0_4_vit_l_14_linear.pth`` on OpenAI's CLIP ViT-L/14, trained on people's scores from 1 to 10. (Version
2, an MLP on the same embedding, is another number.) A head belongs to the encoder that it was trained on.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Extractor, checked_rows, identity
from .weights import check_names, find_weights, load_state

URL = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"
NAME = URL.rsplit("/", 1)[1]


class AestheticHead:
    """Verdicts [B, 1] of pictures, between 0 and 10.

    ``head``: a state dict of ``nn.Linear(D, 1)`` (weight [1, D], bias [1]); a bare name is also looked for in ``$DQTK_WEIGHTS``.
    ``comparable`` is the caller's word. Raises ``MissingWeights``, and ``ValueError`` for another file or a head of another
    encoder.
    """

    gives = "aesthetic"
    dim = 1

    def __init__(self, encoder: Extractor, head: str | Path | None = None, *, comparable: bool = False) -> None:
        asked = Path(head) if head is not None else None
        by_name = asked is None or (len(asked.parts) == 1 and not asked.is_file())
        name = NAME if asked is None else asked.name
        path = find_weights("aesthetic", "the head", [name], URL, None if by_name else asked)
        state, digest = load_state("aesthetic", path)
        check_names("aesthetic", path, {"weight", "bias"}, set(state))
        if list(state["weight"].shape) != [1, encoder.dim]:
            raise ValueError(
                f"aesthetic: weight of {path} must be [1, {encoder.dim}], the width of {encoder.name}, got "
                f"{list(state['weight'].shape)}. Take the encoder that the head was trained on."
            )
        self._encoder: Any = encoder
        self._weight, self._bias = state["weight"].float(), state["bias"].float()
        self.name, self.version = f"aesthetic[{path.stem}, {encoder.name}]", f"1, {encoder.version}"
        self.source, self.sha256, self.config_sha256 = str(path), digest, identity(encoder)
        self.preprocess, self.comparable = encoder.preprocess, comparable
        self.device = getattr(encoder, "device", torch.device("cpu"))

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 1]."""
        return F.linear(F.normalize(checked_rows(self._encoder, images), dim=1), self._weight, self._bias)
