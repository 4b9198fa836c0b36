"""Stressed twins: the same function with the outliers of large models, by exact reparametrization.

Small models lack the outliers that smoothing, rotation, constant-token and shortcut-split methods exist for. ``stress`` puts them
into a copy of a pipeline at the published ratios (channels 40x: ViDiT-Q, arXiv 2406.02540; first text token 60x and unequal halves
at ``conv_shortcut``: MixDQ, arXiv 2405.17873). In real arithmetic the pipeline computes what it computed before, for every prompt.

* *Channels.* Something linear writes a channel, something linear reads it: multiply here, divide there. Norm affine -> projections;
  adaLN-single modulation -> projections (one scale for all PixArt blocks: they share ``adaln_single.linear``); value -> out; the
  ungated half of a gated feed-forward -> down; ``caption_projection.linear_2`` -> every cross-attention key and value; T5's last
  norm -> ``caption_projection.linear_1``; key <-> query. Scales are powers of two, hence bit-identical outputs in any float format;
  only PixArt's modulation tables, which store ``scale`` where ``1 + scale`` is used, round.
* *First token* (SDXL): see ``first_token.py``. Exact, but only a first token whose channel mean already stands out can be raised;
  otherwise ``stress`` warns and leaves it alone, and ``prepare_first_token`` is the remedy. T5 has no constant first token.
* *Skip halves* (UNet). *Scaling* one half is not exact: GroupNorm's eps notices. A *shift* that is constant over whole groups is:
  ``norm1`` removes it and ``conv_shortcut.bias`` absorbs it. The half from below is shifted, so it becomes one-sided, which an
  asymmetric quantizer of its own undoes and a common one does not. Left alone: channels of a group that straddles the seam, and the
  skip half itself, because a padded down-sampling convolution reads it too and would see the shift at the border.

Not reachable exactly, hence unchanged: inputs behind SiLU or GELU (resnet convolutions, PixArt's and CLIP's feed-forward down),
residual streams (PixArt's cross-attention query, samplers, ``conv_in``), PixArt's final modulation (it adds the raw time
embedding). A twin is a pipeline: its denoiser goes with its text encoders.
"""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, StableDiffusionXLPipeline
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5LayerFF, T5LayerSelfAttention

from .first_token import prepare_first_token, raise_first_token
from .outliers import OutlierRatios, channel_absmax, components_of, denoiser_of, outlier_ratios, recording, run_briefly, skip_joints
from .scenes import captions

__all__ = ["OutlierRatios", "outlier_ratios", "prepare_first_token", "stress"]

PROBE_PROMPTS = 8
MARGIN = 1.25  # other prompts than the probe's have somewhat other ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pair:
    """Channels that may be scaled: rows of ``writers`` by s, columns of ``readers`` and rows of ``inverse`` by 1 / s.

    ``tables`` hold ``t`` of a factor ``1 + t`` and become ``s * t + s - 1``. ``probe`` is the module whose input shows the channels
    (its output, for a pair without readers).
    """

    probe: nn.Module
    writers: tuple[Tensor, ...]
    readers: tuple[Tensor, ...] = ()
    inverse: tuple[Tensor, ...] = ()
    tables: tuple[Tensor, ...] = ()


def stress(
    pipe: DiffusionPipeline,
    *,
    channel_ratio: float | None = 40.0,
    bos_ratio: float | None = 60.0,
    skip_ratio: float | None = 8.0,
    seed: int = 0,
) -> DiffusionPipeline:
    """A copy of ``pipe`` with large-model outliers and an unchanged function; ``pipe`` itself is not touched.

    Args:
        pipe: a pipeline around a ``UNet2DConditionModel`` or ``PixArtTransformer2DModel``, float32 or float64. It is run once (two
            steps, eight captions) to see the ranges that are there.
        channel_ratio: wanted largest / median channel at the scaled sites; reached within a factor of about 2
            (cross-attention's out projections vary more, with the prompt). ``None`` skips.
        bos_ratio: wanted first / other text tokens at SDXL's cross-attentions. ``None`` skips.
        skip_ratio: wanted half from below / skip half at the up blocks' ``conv_shortcut``. ``None`` skips.
        seed: draws the outlier channels.

    Raises ``ValueError`` for another denoiser, a half-precision pipeline or a ratio not above 1; warns (``UserWarning``) when the
    first token cannot be raised.
    """
    _check(pipe, channel_ratio=channel_ratio, bos_ratio=bos_ratio, skip_ratio=skip_ratio)
    twin = copy.deepcopy(pipe)
    prompts = captions(PROBE_PROMPTS)
    pairs = list(_pairs(twin)) if channel_ratio is not None else []
    joints = list(skip_joints(denoiser_of(twin))) if skip_ratio is not None else []
    inputs = [p.probe for p in pairs if p.readers] + [resnet.conv_shortcut for _, resnet, _ in joints]
    outputs = [p.probe for p in pairs if not p.readers]
    with torch.no_grad():
        with recording(_by_id(inputs), channel_absmax) as read, recording(_by_id(outputs), channel_absmax, output=True) as written:
            run_briefly(twin, prompts, seed)
        generator = torch.Generator().manual_seed(seed)
        for pair in pairs:
            absmax = (read if pair.readers else written)[str(id(pair.probe))]
            _scale(pair, _draw_scales(absmax.cpu().double(), channel_ratio, generator))
        for bias, resnet, factor in joints:
            _shift(bias, resnet, factor, read[str(id(resnet.conv_shortcut))], skip_ratio)
    has_token = bos_ratio is not None and isinstance(twin, StableDiffusionXLPipeline)
    if has_token and not raise_first_token(twin, 1.1 * bos_ratio, prompts):
        warnings.warn(
            f"stress: the first text token cannot become {bos_ratio:g}x the others exactly, because its channel mean does not "
            "stand out. It is left as it was; prepare_first_token(pipe, prompts) makes room for it.",
            stacklevel=2,
        )
    return twin


def _check(pipe: DiffusionPipeline, **ratios: float | None) -> None:
    denoiser_of(pipe)
    dtypes = {p.dtype for module in components_of(pipe).values() for p in module.parameters()}
    if not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(str(d) for d in dtypes))
        raise ValueError(f"stress: pipe must be float32 or float64, got {found}. Call pipe.to(torch.float32) first.")
    for name, ratio in ratios.items():
        if ratio is not None and not 1 < ratio < float("inf"):
            raise ValueError(f"stress: {name} must be above 1 or None, got {ratio}. Pass None to leave that outlier out.")


def _by_id(modules: list[nn.Module]) -> dict[str, nn.Module]:
    return {str(id(module)): module for module in modules}


# --- channels --------------------------------------------------------------------------------------------------------


def _draw_scales(absmax: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Powers of two [K]: a log-normal body and a heavy tail. One channel in fifty, at least one, ends up at ``ratio / 4`` to
    ``2 * ratio`` times the median of ``absmax`` [K]; the first one drawn at ``ratio`` or more."""
    scales = torch.exp2((0.7 * torch.randn(len(absmax), generator=generator)).round()).double()
    median = (absmax * scales).median().clamp_min(1e-12)
    alive = torch.nonzero(absmax >= absmax.median() / 4).flatten()
    chosen = alive[torch.randperm(len(alive), generator=generator)[: max(1, len(absmax) // 50)]]
    wanted = MARGIN * ratio * median / absmax[chosen].clamp_min(1e-12)
    tail = torch.randint(0, 3, wanted.shape, generator=generator)
    tail[:1] = 0
    scales[chosen] = torch.exp2(wanted.log2().ceil() - tail)
    return scales


def _scale(pair: _Pair, scales: Tensor) -> None:
    def like(x: Tensor, dim: int) -> Tensor:
        return scales.to(x).view([-1 if i == dim else 1 for i in range(x.ndim)])

    for x in pair.writers:
        x.mul_(like(x, 0))
    for x in pair.tables:
        x.mul_(like(x, 0)).add_(like(x, 0) - 1)
    for x in pair.inverse:
        x.div_(like(x, 0))
    for x in pair.readers:
        x.div_(like(x, 1))


def _rows(module: nn.Module, start: int = 0, stop: int | None = None) -> tuple[Tensor, ...]:
    """Views of a layer's weight and bias, output channels ``start`` to ``stop``."""
    return tuple(p.data[start:stop] for p in (module.weight, getattr(module, "bias", None)) if p is not None)


def _weights(*modules: nn.Module) -> tuple[Tensor, ...]:
    return tuple(m.weight.data for m in modules)


def _from_norm(norm: nn.Module, *consumers: nn.Module) -> Iterator[_Pair]:
    if getattr(norm, "weight", None) is not None:
        yield _Pair(probe=consumers[0], writers=_rows(norm), readers=_weights(*consumers))


def _pairs(pipe: DiffusionPipeline) -> Iterator[_Pair]:
    denoiser = denoiser_of(pipe)
    for module in denoiser.modules():
        if isinstance(module, Transformer2DModel) and getattr(module, "norm", None) is not None:
            yield from _from_norm(module.norm, module.proj_in)
        elif isinstance(module, Attention):
            yield from _attention_pairs(module)
        elif isinstance(module, BasicTransformerBlock):
            yield from _block_pairs(module)
    if isinstance(denoiser, PixArtTransformer2DModel):
        yield from _pixart_pairs(denoiser)
    for name in ("text_encoder", "text_encoder_2"):
        yield from _encoder_pairs(getattr(pipe, name, None))
    final_norm = getattr(getattr(getattr(pipe, "text_encoder", None), "encoder", None), "final_layer_norm", None)
    if isinstance(denoiser, PixArtTransformer2DModel) and final_norm is not None and denoiser.caption_projection is not None:
        yield from _from_norm(final_norm, denoiser.caption_projection.linear_1)


def _attention_pairs(attn: Attention) -> Iterator[_Pair]:
    yield _Pair(probe=attn.to_out[0], writers=_rows(attn.to_v), readers=_weights(attn.to_out[0]))
    if attn.norm_q is None and attn.norm_k is None:
        yield _Pair(probe=attn.to_k, writers=_rows(attn.to_k), inverse=_rows(attn.to_q))


def _self_inputs(attn: Attention) -> tuple[nn.Module, ...]:
    return (attn.to_q,) if attn.is_cross_attention else (attn.to_q, attn.to_k, attn.to_v)


def _block_pairs(block: BasicTransformerBlock) -> Iterator[_Pair]:
    up, down = block.ff.net[0], block.ff.net[2]
    if block.norm_type == "layer_norm":
        yield from _from_norm(block.norm1, *_self_inputs(block.attn1))
        if block.attn2 is not None:
            yield from _from_norm(block.norm2, *_self_inputs(block.attn2))
        yield from _from_norm(block.norm3, up.proj)
    if isinstance(up, GEGLU):
        yield _Pair(probe=down, writers=_rows(up.proj, 0, down.in_features), readers=_weights(down))


def _pixart_pairs(denoiser: PixArtTransformer2DModel) -> Iterator[_Pair]:
    blocks, width = denoiser.transformer_blocks, denoiser.inner_dim
    attention = tuple(layer for b in blocks for layer in _self_inputs(b.attn1))
    for shift, scale, consumers in ((0, 1, attention), (3, 4, tuple(b.ff.net[0].proj for b in blocks))):
        linear = [r for i in (shift, scale) for r in _rows(denoiser.adaln_single.linear, i * width, (i + 1) * width)]
        yield _Pair(
            probe=consumers[0],
            writers=(*linear, *(b.scale_shift_table.data[shift] for b in blocks)),
            tables=tuple(b.scale_shift_table.data[scale] for b in blocks),
            readers=_weights(*consumers),
        )
    if denoiser.caption_projection is not None:
        consumers = tuple(layer for b in blocks for layer in (b.attn2.to_k, b.attn2.to_v))
        yield _Pair(probe=consumers[0], writers=_rows(denoiser.caption_projection.linear_2), readers=_weights(*consumers))


def _encoder_pairs(encoder: nn.Module | None) -> Iterator[_Pair]:
    for layer in encoder.modules() if encoder is not None else ():
        if isinstance(layer, CLIPEncoderLayer):
            q, k, v, out = (getattr(layer.self_attn, f"{n}_proj") for n in ("q", "k", "v", "out"))
            yield from _from_norm(layer.layer_norm2, layer.mlp.fc1)
            norm = layer.layer_norm1
        elif isinstance(layer, T5LayerSelfAttention):
            q, k, v, out = (getattr(layer.SelfAttention, n) for n in ("q", "k", "v", "o"))
            norm = layer.layer_norm
        elif isinstance(layer, T5LayerFF) and hasattr(layer.DenseReluDense, "wi_1"):
            ff = layer.DenseReluDense
            yield from _from_norm(layer.layer_norm, ff.wi_0, ff.wi_1)
            yield _Pair(probe=ff.wo, writers=_rows(ff.wi_1), readers=_weights(ff.wo))
            continue
        else:
            continue
        yield from _from_norm(norm, q, k, v)
        yield _Pair(probe=out, writers=_rows(v), readers=_weights(out))
        yield _Pair(probe=k, writers=_rows(k), inverse=_rows(q))


# --- skip halves -----------------------------------------------------------------------------------------------------


def _shift(bias: Tensor, resnet: nn.Module, factor: float, absmax: Tensor, ratio: float) -> None:
    """Add a constant to the half from below, over whole groups of ``norm1``; ``absmax`` [C] is that of the concatenation."""
    below, skip = absmax[: len(bias)].max(), absmax[len(bias) :].max()
    group = resnet.norm1.num_channels // resnet.norm1.num_groups
    whole = len(bias) // group * group
    if below >= ratio * skip or whole == 0 or resnet.conv_shortcut.bias is None:
        return
    constant = (MARGIN * ratio * skip).item()
    bias[:whole] += constant * factor
    resnet.conv_shortcut.bias.data -= constant * resnet.conv_shortcut.weight.data[:, :whole].sum(dim=(1, 2, 3))
