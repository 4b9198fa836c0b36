"""Sites: the places of a model that can be quantized, found by structure and named by role.

A site is an ``nn.Linear`` or ``nn.Conv1d/2d/3d``. Its role comes from where it stands (inside a repeated block or outside), from
its kind and from the words in its path; the words are those that diffusers and transformers use for the same thing. That is enough
to plan any denoiser and any text encoder without knowing its family. An ``Adapter`` (one file per family in ``pipelines/``) only
corrects it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

ROLES = {
    "self_attn.q": "queries of self or joint attention",
    "self_attn.k": "keys of self or joint attention",
    "self_attn.v": "values of self or joint attention",
    "self_attn.out": "output of self or joint attention",
    "cross_attn.q": "queries of cross-attention",
    "cross_attn.k": "keys of cross-attention, from text",
    "cross_attn.v": "values of cross-attention, from text",
    "cross_attn.out": "output of cross-attention",
    "ff.up": "first linear of a feed-forward (gate included)",
    "ff.down": "last linear of a feed-forward",
    "block_in": "projection into a transformer inside a UNet",
    "block_out": "projection out of a transformer inside a UNet",
    "conv": "convolution",
    "shortcut_conv": "convolution on a shortcut",
    "downsampler": "downsampling convolution",
    "upsampler": "upsampling convolution",
    "modulation": "shift, scale and gate from the noise level (adaLN, time_emb_proj)",
    "time_embedding": "embedding of the noise level, guidance or size",
    "text_projection": "projection of text features at the entrance",
    "patch_embedding": "first layer on the latents",
    "output_projection": "last layer",
    "other": "none of the known places",
}

DENOISERS = re.compile(r"(unet|transformer|prior)(_\d+)?")
TEXT_ENCODERS = re.compile(r"text_encoder(_\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One quantizable place.

    id: ``component:path``. kind: "linear" or "conv". shape: weight as the layer holds it, [N, K] or [N, C_in / groups, *kernel].
    shared_input: name shared by sites that read the same tensor, or None. unsupported: why it cannot be quantized, or None.
    """

    id: str
    kind: str
    role: str
    shape: tuple[int, ...]
    bias: bool
    shared_input: str | None = None
    unsupported: str | None = None

    @property
    def component(self) -> str:
        return self.id.partition(":")[0]

    @property
    def path(self) -> str:
        return self.id.partition(":")[2]

    @property
    def n(self) -> int:
        """Output features."""
        return self.shape[0]

    @property
    def k(self) -> int:
        """Inputs of one output number: C_in * taps."""
        return self.num_weights // self.n

    @property
    def channels(self) -> int:
        """Input channels: what a weight group must divide."""
        return self.shape[1]

    @property
    def num_weights(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches the id or the path."""
        return fnmatchcase(self.path, pattern) or fnmatchcase(self.id, pattern)


@dataclass(frozen=True, kw_only=True, slots=True)
class CfgLayout:
    """Which half of classifier-free guidance a pipeline puts first, where its denoiser gets both: in a batch, and of the two calls
    of a step. Which of the two it does is seen (``calibrate/guidance.py``).

    Without more it is what diffusers' pipelines do (0.42): all with a call per half, over fifty, make the conditional one first; in
    a batch the unconditional half comes first, but in a few, whose adapters say so (DiT, Z-Image, Lumina 1, OmniGen, ACE-Step,
    Stable Cascade).
    """

    batched: tuple[str, str] = ("uncond", "cond")
    separate: tuple[str, str] = ("cond", "uncond")


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """What structure alone cannot know about a family. Every field may stay empty.

    classes: denoiser class names it is for. roles: (glob on the path, role), first match wins over what structure says.
    keep: (glob on the path, why), sites that recipes leave at 16 bits. reversed_time: the denoiser is given 1 - sigma as its time.
    layouts: (denoiser, arguments of a call by name) -> (frames, rows, columns, text tokens before, and after) of every sequence
    that attends to itself, where they are not simply the latents cut into patches. frame_dim: of the frames of latents
    [B, C, F, H, W]; 1 where they are [B, F, C, H, W] or [B, F, H, W, C]. cfg_layout: where the halves of guidance stand.
    """

    classes: tuple[str, ...]
    roles: tuple[tuple[str, str], ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    reversed_time: bool = False
    layouts: Callable[[nn.Module, Mapping[str, Any]], list[tuple[int, ...]]] | None = None
    frame_dim: int = 2
    cfg_layout: CfgLayout = CfgLayout()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """One self-attention or joint attention. id: ``component:path``. heads: of the queries. channels: of a head; None: its module
    does not show them."""

    id: str
    heads: int
    channels: int | None = None

    @property
    def component(self) -> str:
        return self.id.partition(":")[0]

    @property
    def path(self) -> str:
        return self.id.partition(":")[2]

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches the id or the path."""
        return fnmatchcase(self.path, pattern) or fnmatchcase(self.id, pattern)


def components_of(target: Any) -> dict[str, nn.Module]:
    """Denoisers and text encoders of a pipeline by name, or ``{"model": target}`` for a bare module.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(target, nn.Module):
        return {"model": target}
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise ValueError(
            f"components_of: target must be a diffusers pipeline or an nn.Module, got {type(target).__name__}. "
            "Load it with DiffusionPipeline.from_pretrained first."
        )
    found = {
        name: part
        for name, part in parts.items()
        if isinstance(part, nn.Module) and (DENOISERS.fullmatch(name) or TEXT_ENCODERS.fullmatch(name))
    }
    if not any(DENOISERS.fullmatch(name) for name in found):
        raise ValueError(
            f"components_of: pipeline must have a denoiser (unet, transformer or prior), got {sorted(parts)}. "
            "Pass the module itself."
        )
    return found


def find_sites(module: nn.Module, component: str = "model", adapter: Adapter | None = None) -> list[Site]:
    """All sites of a module in definition order. Works on the meta device."""
    inside = _paths_in_blocks(module)
    ties = _ties(module)
    sites = []
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        role = _role(module, path, layer, path in inside)
        for pattern, corrected in adapter.roles if adapter else ():
            if fnmatchcase(path, pattern):
                role = corrected
                break
        sites.append(
            Site(
                id=f"{component}:{path}",
                kind="linear" if isinstance(layer, nn.Linear) else "conv",
                role=role,
                shape=tuple(layer.weight.shape),
                bias=layer.bias is not None,
                shared_input=_shared_input(component, path, role),
                unsupported=_unsupported(layer, path, ties),
            )
        )
    return sites


def _paths_in_blocks(module: nn.Module) -> set[str]:
    """Paths below an indexed entry of a ModuleList: a repeated block."""
    lists = [path for path, part in module.named_modules() if isinstance(part, nn.ModuleList)]
    below = tuple(f"{path}." for path in lists)
    return {path for path, _ in module.named_modules() if path.startswith(below)} if below else set()


def _ties(module: nn.Module) -> dict[int, list[str]]:
    """Parameter -> all its names. Packing one of several would save nothing and part what belongs together."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _unsupported(layer: Any, path: str, ties: Mapping[int, list[str]]) -> str | None:
    if not path:
        return "it is the whole model, which cannot be replaced in place"
    others = [name for name in ties.get(id(layer.weight), ()) if name != f"{path}.weight"]
    if others:
        return f"weight is tied to {others[0]}"
    if isinstance(layer, nn.Linear):
        known = type(layer) is nn.Linear
    else:
        if layer.groups != 1:
            return f"grouped convolution (groups={layer.groups})"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"padding {layer.padding_mode!r}, {layer.padding!r} (only zeros, given as numbers)"
        known = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return None if known else f"layer class {type(layer).__name__} has its own forward"


def find_attention(module: nn.Module, component: str = "model") -> list[AttentionSite]:
    """All places of a denoiser where a sequence attends to itself: modules with a processor (as diffusers has them) and heads that
    are not made for another sequence. Works on the meta device."""
    found = []
    for path, part in module.named_modules():
        heads = heads_of(part)
        if heads is not None and not _reads_another(part, path.rpartition(".")[2]):
            width = getattr(getattr(part, "to_q", None), "out_features", None)
            channels = width // heads if isinstance(width, int) else None
            found.append(AttentionSite(id=f"{component}:{path}", heads=heads, channels=channels))
    return found


def heads_of(part: Any) -> int | None:
    """Number of heads of an attention module; None for other modules."""
    heads = getattr(part, "heads", None)
    return heads if isinstance(heads, int) and hasattr(part, "processor") else None


# --- roles -----------------------------------------------------------------------------------------------------------

_OUTSIDE = (
    (r"timestep_embedder|time_embedder|guidance_embedder", "time_embedding"),
    (r"(^|\.)(proj_out(_\d)?|conv_out|final_layer.*|head|lm_head)$", "output_projection"),
    (r"norm_out|adaln|adaLN|modulation|time_proj$|time_embed\.linear$|(^|\.)\w*_mod(\.|$)", "modulation"),
    (r"time|guidance|resolution|aspect|add_embedding|class_embed|size_emb", "time_embedding"),
    (r"text|caption|context|txt|encoder_hid|cap_", "text_projection"),
    (r"patch|pos_embed|x_embedder|img_in|conv_in|proj_in|image_embed", "patch_embedding"),
)
_INSIDE = (
    (r"timestep_embedder|time_embedd", "time_embedding"),
    (r"norm\w*\.linear(_\d)?$|_mod\.\d+$|adaLN|modulation|time_emb_proj|norm\w*\.\d$", "modulation"),
    (r"shortcut", "shortcut_conv"),
    (r"downsample", "downsampler"),
    (r"upsample", "upsampler"),
    (r"attentions\.\d+\.proj_in$", "block_in"),
    (r"attentions\.\d+\.proj_out$", "block_out"),
    (
        r"net\.0\.proj$|proj_mlp$|(mlp|ff|ffn|feed_forward|DenseReluDense)\w*\.(fc1|w1|w3|wi(_\d)?|linear_1|linear_3|gate_proj|up_proj|0)$",
        "ff.up",
    ),
    (r"net\.2$|(mlp|ff|ffn|feed_forward|DenseReluDense)\w*\.(fc2|w2|wo|linear_2|down_proj|2)$", "ff.down"),
    (r"single_\w*blocks\.\d+\.proj_out$", "ff.down"),  # attention output and feed-forward in one
)
_ATTENTION = re.compile(
    r"(?:^|\.)(?:(?:add_|to_|to_add_)?(?P<part>q|k|v|qkv|kv|query|key|value|out)(?:_proj|_lin)?|(?P<o>o|o_proj|out_proj)|to_(?P<outs>out)\.0)$"
)
_PART = {"q": "q", "query": "q", "k": "k", "key": "k", "kv": "k", "v": "v", "value": "v", "qkv": "q", "out": "out"}
_ATTENTION_PARENT = re.compile(r"attn|attention|Attention", re.IGNORECASE)


def _role(root: nn.Module, path: str, layer: nn.Module, inside: bool) -> str:
    for pattern, role in _INSIDE if inside else _OUTSIDE:
        if re.search(pattern, path):
            return role
    attention = _ATTENTION.search(path)
    if inside and attention and _ATTENTION_PARENT.search(path):
        part = attention["part"]
        part = _PART[part] if part else "out"
        return f"{'cross' if _is_cross(root, path) else 'self'}_attn.{part}"
    return "other" if isinstance(layer, nn.Linear) else "conv"


def _is_cross(root: nn.Module, path: str) -> bool:
    """Whether the attention module around a projection reads another sequence."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if not _ATTENTION_PARENT.search(parts[end - 1]):
            continue
        attention: Any = root.get_submodule(".".join(parts[:end]))
        return _reads_another(attention, parts[end - 1])
    return False


def _reads_another(attention: Any, name: str) -> bool:
    """Whether an attention module reads another sequence: as it declares itself, else by its name."""
    declared = getattr(attention, "is_cross_attention", None)
    return declared if isinstance(declared, bool) else bool(re.search(r"cross|encdec|attn2", name, re.IGNORECASE))


def _shared_input(component: str, path: str, role: str) -> str | None:
    """Projections that stand side by side and read the same tensor: q, k and v; gate and up."""
    parent, _, name = path.rpartition(".")
    side = "add" if name.startswith("add_") else "own"
    if role in ("self_attn.q", "self_attn.k", "self_attn.v"):
        return f"{component}:{parent}.{side}_qkv"
    if role in ("cross_attn.k", "cross_attn.v"):
        return f"{component}:{parent}.{side}_kv"
    if role == "ff.up" and re.search(r"(w1|w3|wi_\d|linear_1|linear_3|gate_proj|up_proj)$", name):
        return f"{component}:{parent}.up"
    return None


def read_together(root: nn.Module, path: str) -> list[str]:
    """Names of the modules beside ``path``, itself included, that read the same tensor as it does; by their names alone."""
    parent = path.rpartition(".")[0]
    holder = root.get_submodule(parent)

    def key(name: str) -> str | None:
        beside = f"{parent}.{name}" if parent else name
        return _shared_input("", beside, _role(root, beside, holder.get_submodule(name), inside=True))

    wanted = key(path.rpartition(".")[2])
    return [] if wanted is None else [name for name, _ in holder.named_children() if key(name) == wanted]


def repeated_block(path: str) -> str:
    """The repeated block around a layer: ``down_blocks.1.attentions.0.transformer_blocks.2``; elsewhere the part it stands in."""
    found = re.match(r"(.*?(?:blocks?|layers?)\.\d+(?:\.(?:\w*blocks|attentions|resnets|layers)\.\d+)*)(\.|$)", path)
    return found[1] if found else path.split(".")[0]


def meta(factory: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a module without memory: ``meta(UNet2DConditionModel, **config)``."""
    with torch.device("meta"):
        return factory(*args, **kwargs)
