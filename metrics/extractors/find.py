"""Extractors by a text, as a job file or a command names them.

inception2015               the FID Inception, clean-fid's resize; inception2015-legacy, inception2015-pytorch: the other two
open_clip:WHERE             a folder, hf-hub:OWNER/NAME, or ARCHITECTURE=WEIGHTS
clip:WHERE                  CLIPModel of transformers, folder or hub id
dino:WHERE                  DINO or DINOv2 of transformers, folder or hub id
"""

from typing import Any

import torch

KINDS = ("inception2015", "inception2015-legacy", "inception2015-pytorch", "open_clip:WHERE", "clip:WHERE", "dino:WHERE")


def extractor_named(text: str, device: str | torch.device = "cpu") -> Any:
    """The extractor, loaded. Raises ``ValueError`` for an unknown kind and ``MissingWeights`` where its weights are not here."""
    kind, _, where = text.partition(":")
    if kind.startswith("inception2015") and not where:
        from .inception import Inception

        return Inception(preprocess=kind.removeprefix("inception2015").lstrip("-") or "clean", device=device)
    if kind == "open_clip" and where:
        from .clip import OpenClip

        model, _, weights = where.partition("=")
        return OpenClip(model, weights or None, device=device)
    if kind == "clip" and where:
        from .clip import TransformersClip

        return TransformersClip(where, device=device)
    if kind == "dino" and where:
        from .dino import Dino

        return Dino(where, device=device)
    raise ValueError(f"extractor: name must be one of {', '.join(KINDS)}, got {text!r}. For example open_clip:FOLDER.")
