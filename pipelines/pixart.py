"""PixArt-alpha and PixArt-Sigma."""

from typing import Any

from dqtk.sites import Adapter

ADAPTER = Adapter(classes=("PixArtTransformer2DModel",))

_BINNED_SIZES = (32, 64, 128, 256)  # latents for which the pipeline knows a table of aspect ratios


def call_kwargs(pipe: Any) -> dict[str, Any]:
    """What the pipeline cannot do without at this size.

    Resolution binning exists for the published sizes only and raises elsewhere. The prompt is padded to 300 tokens by default, more
    than a small text encoder may have been built for: its tokenizer's limit holds. Padding is masked, so only rounding changes.
    """
    if pipe.transformer.config.sample_size in _BINNED_SIZES:
        return {}
    return {
        "use_resolution_binning": False,
        "clean_caption": False,
        "max_sequence_length": min(300, pipe.tokenizer.model_max_length),
    }
