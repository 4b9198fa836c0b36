"""Measure the outliers that make a pipeline hard to quantize: channels, the first text token, unequal skip halves.

Ratios of absolute maxima over a short run of the whole pipeline, read by hooks that live inside a context manager only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutlierRatios:
    """What ``outlier_ratios`` measured, keyed by site id ``component:path``; every value is a ratio of absolute maxima.

    ``channels``: largest / median input channel, per linear and convolution. ``first_token``: first text token / all others, per
    cross-attention key projection. ``skips``: half from below / skip half, per ``conv_shortcut`` of an up block.
    """

    channels: dict[str, float]
    first_token: dict[str, float]
    skips: dict[str, float]


def outlier_ratios(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int = 0) -> OutlierRatios:
    """Run ``pipe`` for two steps on ``prompts`` (guidance at its default) and measure its outliers; nothing stays on the modules.

    Raises ``ValueError`` for a denoiser that is neither a ``UNet2DConditionModel`` nor a ``PixArtTransformer2DModel``.
    """
    denoiser = denoiser_of(pipe)
    sites = {
        f"{component}:{path}": module
        for component, root in components_of(pipe).items()
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    halves = {id(resnet.conv_shortcut): bias.numel() for bias, resnet, _ in skip_joints(denoiser)}
    has_first_token = isinstance(denoiser, UNet2DConditionModel)  # a causal encoder's; PixArt's T5 has none
    keys = {name: module for name, module in sites.items() if has_first_token and name.endswith("attn2.to_k")}
    with recording(sites, channel_absmax) as channels, recording(keys, _token_absmax) as tokens:
        run_briefly(pipe, prompts, seed)
    skips = {}
    for name, module in sites.items():
        if split := halves.get(id(module)):
            skips[name] = (channels[name][:split].max() / channels[name][split:].max()).item()
    return OutlierRatios(
        channels={name: (x.max() / x.median().clamp_min(1e-12)).item() for name, x in channels.items()},
        first_token={name: (x[0] / x[1:].max()).item() for name, x in tokens.items()},
        skips=skips,
    )


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The UNet or transformer. Raises ``ValueError`` when it is of another class than the two that can be stressed."""
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, UNet2DConditionModel | PixArtTransformer2DModel):
        raise ValueError(
            "tiny.stress: the denoiser must be a UNet2DConditionModel or a PixArtTransformer2DModel, "
            f"got {type(denoiser).__name__}. Other families have no stressed twin."
        )
    return denoiser


def components_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Denoiser and text encoders by component name."""
    return {name: getattr(pipe, name) for name in COMPONENTS if isinstance(getattr(pipe, name, None), nn.Module)}


def run_briefly(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int) -> None:
    """Two steps to latents at the pipeline's default size and guidance."""
    options = {}
    if isinstance(denoiser_of(pipe), PixArtTransformer2DModel):
        length = min(300, pipe.tokenizer.model_max_length)
        options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": length}
    generator = torch.Generator().manual_seed(seed)
    pipe(prompt=list(prompts), num_inference_steps=2, output_type="latent", generator=generator, **options)


def channel_absmax(x: Tensor, module: nn.Module) -> Tensor:
    """Absolute maximum per channel, [K]: dimension 1 of a picture, the last one otherwise."""
    return x.abs().transpose(1, -1).flatten(0, -2).amax(0) if isinstance(module, nn.Conv2d) else x.abs().flatten(0, -2).amax(0)


def _token_absmax(x: Tensor, module: nn.Module) -> Tensor:
    """Absolute maximum per token, [T], of states [B, T, K]."""
    return x.abs().amax(dim=(0, 2))


@contextmanager
def recording(
    modules: dict[str, nn.Module], measure: Callable[[Tensor, nn.Module], Tensor], *, output: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Running elementwise maximum of ``measure(tensor, module)`` over the inputs (or outputs) of ``modules`` while inside."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, x: Tensor) -> None:
        value = measure(x.detach(), module)
        seen[name] = torch.maximum(seen[name], value) if name in seen else value

    handles = []
    for name, module in modules.items():
        if output:
            handles.append(module.register_forward_hook(lambda m, args, y, name=name: keep(name, m, y)))
        else:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: keep(name, m, args[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def skip_joints(denoiser: nn.Module) -> Iterator[tuple[Tensor, nn.Module, float]]:
    """For every up-block resnet that reads ``cat([from below, skip])``: the bias [C] that is added last to the half from below and
    reaches nothing else, the resnet, and what that bias is divided by on its way. Empty for a transformer."""
    if not isinstance(denoiser, UNet2DConditionModel) or denoiser.mid_block is None:
        return
    last = denoiser.mid_block.resnets[-1]
    writer, factor = last.conv2, last.output_scale_factor
    for block in denoiser.up_blocks:
        known = isinstance(block, UpBlock2D | CrossAttnUpBlock2D)
        for i, resnet in enumerate(block.resnets):
            if known and writer is not None and writer.bias is not None and resnet.conv_shortcut is not None:
                yield writer.bias.data, resnet, factor
            attentions = getattr(block, "attentions", None)
            writer, factor = (attentions[i].proj_out, 1.0) if attentions else (resnet.conv2, resnet.output_scale_factor)
        if block.upsamplers:
            writer, factor = block.upsamplers[-1].conv, 1.0
        if not known:
            writer = None
