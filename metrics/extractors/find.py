"""Extractors by a text, as a job file or a command names them.

inception2015               the FID Inception, clean-fid's resize; inception2015-legacy, inception2015-pytorch: the other two
open_clip:WHERE             a folder, hf-hub:OWNER/NAME, or ARCHITECTURE=WEIGHTS
clip:WHERE                  CLIPModel of transformers, folder or hub id
dino:WHERE                  DINO or DINOv2 of transformers, folder or hub id
lucas-kanade                optical flow without weights
i3d:VARIANT, =FILE          of FVD: i3d:torchscript, i3d:kinetics400, i3d:rgb_imagenet; i3d:rgb_imagenet=FILE names the file
vjepa2:WHERE                clips: a V-JEPA 2 classifier of transformers, folder or hub id
raft, raft:FILE             optical flow: torchvision's raft_large with the published weights, or those of a file
pickscore, pickscore:WHERE  PickScore's CLIP: the cached hub id, or a folder
hpsv2, hpsv2.1, =FILE       HPSv2's CLIPs: by their files' names, or hpsv2=FILE
motion:EXTRACTOR            clips: mean and change of what an extractor of pictures says of their frames
legacy:CLIP                 CLIP fed with 0-255, as tables of quantized video models were made; clip: or open_clip:
warp:FLOW                   interpolator of frames by an optical flow
frames:ENCODER              clips as the mean of what a model of pictures and texts says of their frames
aesthetic:HEAD=ENCODER      a linear head on the embeddings of another extractor
immerkaer                   quality of single pictures without weights
musiq, musiq:FILE           the same by MUSIQ: with the published weights (SPAQ), or those of a file
clip-vbench:WHERE, dino-vbench:WHERE    as clip and dino, with VBench's way to resize

Where an extractor is made of another (ENCODER, FLOW), that is any text of this list, or an embedded extractor's name.
"""

import difflib
from collections.abc import Callable
from types import SimpleNamespace
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
    "pickscore",
    "hpsv2",
    "hpsv2.1",
    "motion:EXTRACTOR",
    "legacy:CLIP",
    "vjepa2:WHERE",
    "lucas-kanade",
    "raft",
    "raft:FILE",
    "warp:FLOW",
    "frames:ENCODER",
    "aesthetic:HEAD=ENCODER",
    "immerkaer",
    "musiq",
    "musiq:FILE",
    "clip-vbench:WHERE",
    "dino-vbench:WHERE",
)
# What the first word of a name promises, where that is not pictures to embeddings.
_METHODS = {
    "lucas-kanade": "flow",
    "raft": "flow",
    "warp": "interpolate",
    "frames": "encode_clips",
    "motion": "encode_clips",
    "i3d": "encode_clips",
    "vjepa2": "encode_clips",
}
_GIVES = {"aesthetic": "aesthetic", "musiq": "quality", "immerkaer": "quality"}
_EMBEDDED = ("tiny-clip",)  # found by dqtk.resolve before this file is asked; here for its errors only


def extractor_named(text: str, device: str | torch.device = "cpu", inner: Callable[[str], Any] | None = None) -> Any:
    """The extractor, loaded; ``inner`` finds those that it is made of (default: this function).

    Raises ``ValueError`` for an unknown kind and ``MissingWeights`` where its weights are not here.
    """
    find = inner or (lambda name: extractor_named(name, device))
    kind, _, where = text.partition(":")
    if kind.startswith("inception2015") and not where:
        from .inception import Inception

        return Inception(preprocess=kind.removeprefix("inception2015").lstrip("-") or "clean", device=device)
    if kind == "open_clip" and where:
        from .clip import OpenClip

        model, _, weights = where.partition("=")
        return OpenClip(model, weights or None, device=device)
    if kind in ("clip", "clip-vbench") and where:
        from .clip import TransformersClip

        return TransformersClip(where, preprocess=kind.partition("-")[2] or None, device=device)
    if kind in ("dino", "dino-vbench") and where:
        from .dino import Dino

        return Dino(where, preprocess=kind.partition("-")[2] or "squash", device=device)
    if kind == "i3d" and where:
        from .i3d import I3D

        variant, _, file = where.partition("=")
        return I3D(variant, file or None, device=device)
    if kind == "pickscore":
        from .preference import pickscore

        return pickscore(where or None, device=device)
    if kind.partition("=")[0] in ("hpsv2", "hpsv2.1"):
        from .preference import hps

        version, _, file = text.partition("=")
        return hps(version, file or None, device=device)
    if kind == "vjepa2" and where:
        from .vjepa import VJepa

        return VJepa(where, device=device)
    if kind == "lucas-kanade" and not where:
        from .lucas_kanade import LucasKanade

        return LucasKanade(device)
    if kind == "raft":
        from .raft import Raft

        return Raft(where or None, device=device)
    if (made := _made_of_another(kind, where, find, device)) is not None:
        return made
    names = [*KINDS, *_EMBEDDED]
    near = difflib.get_close_matches(kind, [name.partition(":")[0] for name in names], n=1)
    whole = next((name for name in names if name.partition(":")[0] == near[0]), "") if near else ""
    hint = f"Did you mean {whole!r}?" if whole else "For example open_clip:FOLDER."
    raise ValueError(f"extractor: name must be one of {', '.join(names)}, got {text!r}. {hint}")


def stand_in(text: str) -> Any:
    """What ``score.serves`` looks at, of an extractor whose weights are not here: a name, a method, what it gives."""
    kind = text.partition(":")[0].partition("=")[0]
    return SimpleNamespace(name=kind, gives=_GIVES.get(kind, "embedding"), **{_METHODS.get(kind, "encode_images"): None})


def _made_of_another(kind: str, where: str, find: Callable[[str], Any], device: str | torch.device) -> Any:
    """What is built around another extractor, and judges of single pictures; None for another kind."""
    if kind == "warp" and where:
        from .interpolation import WarpInterpolator

        return WarpInterpolator(_having("flow", find(where), "an optical flow", kind, where))
    if kind == "frames" and where:
        from .pooled_clip import PooledClip

        return PooledClip(_having("encode_texts", find(where), "a model of pictures and texts", kind, where))
    if kind == "motion" and where:
        from .moving_frames import MovingFrames

        return MovingFrames(_having("encode_images", find(where), "an extractor of pictures", kind, where))
    if kind == "legacy" and where:
        from .legacy_clip import LegacyFrames

        return LegacyFrames(_having("encode_texts", find(where), "a model of pictures and texts", kind, where))
    if kind == "aesthetic" and "=" in where:
        from .aesthetic import AestheticHead

        head, _, encoder = where.partition("=")
        return AestheticHead(_having("encode_images", find(encoder), "an extractor of pictures", kind, where), head or None)
    if kind == "musiq":
        from .musiq import Musiq

        return Musiq(where or None, device=device)
    if kind == "immerkaer" and not where:
        from .immerkaer import Immerkaer

        return Immerkaer()
    return None


def _having(method: str, found: Any, what: str, kind: str, where: str) -> Any:
    if not hasattr(found, method):
        raise ValueError(f"extractor: {kind}:{where} must be of {what}, got {found.name}. See docs/video.md.")
    return found
