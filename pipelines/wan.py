"""Wan 2.1 and 2.2."""

from typing import Any

from dqtk.sites import Adapter

ADAPTER = Adapter(classes=("WanTransformer3DModel",))

_TEXT = 512  # tokens that the published models pad every text to
_FRAMES, _SIDE = 9, 16  # latents of a miniature's clip


def call_kwargs(pipe: Any) -> dict[str, Any]:
    """Size, text length and steps of miniature models: those whose tokenizer stops before the published length.

    The pipeline's defaults are 50 steps, a clip of 81 frames of 480x832, and texts padded to 512 tokens. Padding is not masked, so
    another length is another function: a model answers well only to the one that it was trained with.
    """
    limit = pipe.tokenizer.model_max_length
    if limit >= _TEXT:
        return {}
    side = _SIDE * pipe.vae_scale_factor_spatial
    frames = (_FRAMES - 1) * pipe.vae_scale_factor_temporal + 1
    return {"height": side, "width": side, "num_frames": frames, "max_sequence_length": limit, "num_inference_steps": 20}
