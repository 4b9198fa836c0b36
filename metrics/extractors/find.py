"""Extractors by a text, as a job file or a command names them.

inception2015               the FID Inception, clean-fid's resize; inception2015-legacy, inception2015-pytorch: the other two
open_clip:WHERE             a folder, hf-hub:OWNER/NAME, or ARCHITECTURE=WEIGHTS
clip:WHERE                  CLIPModel of transformers, folder or hub id
dino:WHERE                  DINO or DINOv2 of transformers, folder or hub id
lucas-kanade                optical flow without weights
i3d:VARIANT, =FILE          of FVD: i3d:torchscript, i3d:kinetics400, i3d:rgb_imagenet; i3d:rgb_imagenet=FILE names the file
vjepa2:WHERE                clips: a V-JEPA 2 classifier of transformers, folder or hub id
raft, raft:FILE             optical flow: torchvision's raft_large with the published weights, or those of a file
"""

import difflib
from typing import Any

import torch

KINDS = (
    "inception2015",
    "inception2015-legacy",
    "inception2015-pytorch",
    "open_clip:WHERE",
    "clip:WHERE",
    "dino:WHERE",
    "i3d:VARIANT",
    "vjepa2:WHERE",
    "lucas-kanade",
    "raft",
    "raft:FILE",
)
_EMBEDDED = ("tiny-clip",)  # found by dqtk.resolve before this file is asked; here for its errors only


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
    if kind == "i3d" and where:
        from .i3d import I3D

        variant, _, file = where.partition("=")
        return I3D(variant, file or None, device=device)
    if kind == "vjepa2" and where:
        from .vjepa import VJepa

        return VJepa(where, device=device)
    if kind == "lucas-kanade" and not where:
        from .lucas_kanade import LucasKanade

        return LucasKanade(device)
    if kind == "raft":
        from .raft import Raft

        return Raft(where or None, device=device)
    names = [*KINDS, *_EMBEDDED]
    near = difflib.get_close_matches(kind, [name.partition(":")[0] for name in names], n=1)
    whole = next((name for name in names if name.partition(":")[0] == near[0]), "") if near else ""
    hint = f"Did you mean {whole!r}?" if whole else "For example open_clip:FOLDER."
    raise ValueError(f"extractor: name must be one of {', '.join(names)}, got {text!r}. {hint}")
