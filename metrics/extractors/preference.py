"""The CLIPs of PickScore and HPSv2 as extractors of pictures and texts: where their weights lie, and how they resize.

PickScore v1 is a ``CLIPModel`` of transformers (hub id yuvalkirstain/PickScore_v1); tokenizer and image processor are those of the
CLIP ViT-H that it was trained from, as its authors have it. HPSv2's files are open_clip state dicts of ViT-H-14. Its own copy of
open_clip scales the longer side to 224 and pads with black, where open_clip's default would crop: the same for square pictures,
and not for others. Which version a file is, its name says.
"""

from pathlib import Path

import torch

from .clip import OpenClip, TransformersClip
from .weights import find_weights

PICKSCORE, PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HPS = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
HPS_ARCHITECTURE = "ViT-H-14"
_URL = "https://huggingface.co/xswu/HPSv2/resolve/main/"


def pickscore(model: str | Path | None = None, *, comparable: bool = False, device: str | torch.device = "cpu") -> TransformersClip:
    """PickScore's encoder: the cached hub id, or a folder with a ``CLIPModel``.

    ``comparable`` is the caller's word that these are the published weights. Raises ``MissingWeights``, and ``ValueError`` for
    unreadable ones.
    """
    found = TransformersClip(model or PICKSCORE, processor=PROCESSOR, comparable=comparable, device=device)
    found.name = "pickscore"
    return found


def hps(
    version: str, weights: str | Path | None = None, *, comparable: bool = False, device: str | torch.device = "cpu"
) -> OpenClip:
    """HPSv2's encoder, ``version`` of ``HPS``: a file, else its name in ``$DQTK_WEIGHTS`` and torch hub's cache.

    ``comparable`` is the caller's word that these are the published weights. Raises ``MissingWeights``, and ``ValueError`` for
    unreadable ones.
    """
    file = HPS[version]
    path = find_weights(version, "weights", (file,), _URL + file, weights)
    found = OpenClip(HPS_ARCHITECTURE, path, resize_mode="longest", comparable=comparable, device=device)
    found.name = version
    return found
