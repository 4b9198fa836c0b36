"""PixArt-alpha and PixArt-Sigma."""

from typing import Any

from dqtk.sites import Adapter

ADAPTER = Adapter(classes=("PixArtTransformer2DModel",))

_BINNED_SIZES = (32, 64, 128, 256)  # latents for which the pipeline knows a table of aspect ratios


def call_kwargs(pipe: Any) -> dict[str, Any]:
    """Resolution binning exists for the published sizes only; elsewhere the pipeline raises unless it is switched off."""
    return {} if pipe.transformer.config.sample_size in _BINNED_SIZES else {"use_resolution_binning": False}
