"""Denoisers of published sizes with random weights, and one step of each: what nobody needs to download in order to be timed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dqtk.bench import Step

PIXART_XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 64,
    "patch_size": 2,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "use_additional_conditions": False,
}
SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def built(kind: Callable[..., nn.Module], config: dict[str, Any]) -> nn.Module:
    """A module in bfloat16 with seeded random weights, never held in float32."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return kind(**config).to(torch.bfloat16).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(usual)


def pixart_xl(size: int, layers: int | None) -> Step:
    """PixArt-Sigma-XL (0.6 B parameters): guidance batch of 2, 300 text tokens. ``layers``: blocks, of 28."""
    from diffusers import PixArtTransformer2DModel

    module = built(PixArtTransformer2DModel, PIXART_XL | ({} if layers is None else {"num_layers": layers}))
    call = {
        "hidden_states": _noise(2, 4, size // 8, size // 8),
        "encoder_hidden_states": _noise(2, 300, 4096),
        "timestep": torch.full((2,), 500),
        "encoder_attention_mask": torch.ones(2, 300, dtype=torch.bfloat16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return Step(component="transformer", module=module, calls=(call,), batch=1, asked={"height": size, "width": size})


def sdxl(size: int, layers: int | None) -> Step:
    """The UNet of SDXL (2.6 B parameters): guidance batch of 2, 77 text tokens. ``layers``: blocks per transformer, at most 10."""
    from diffusers import UNet2DConditionModel

    depths = SDXL["transformer_layers_per_block"]
    fewer = {} if layers is None else {"transformer_layers_per_block": tuple(min(depth, layers) for depth in depths)}
    module = built(UNet2DConditionModel, SDXL | fewer)
    call = {
        "sample": _noise(2, 4, size // 8, size // 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": _noise(2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": _noise(2, 1280), "time_ids": torch.tensor([[size, size, 0, 0, size, size]] * 2)},
        "return_dict": False,
    }
    return Step(component="unet", module=module, calls=(call,), batch=1, asked={"height": size, "width": size})


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


MODELS = {"pixart-xl": pixart_xl, "sdxl": sdxl}
