"""The parts of tiny-wan before training: tokenizer, UMT5 text encoder, video transformer, scheduler.

Topology is Wan 2.1's (rotary positions over frames, rows and columns, cross-attention to every text token, one modulation table per
block); only widths and depths are small. A clip is 9 x 8 x 8 = 576 tokens. Padded text is zeros that the cross-attention sees, as
in Wan's own pipeline, so the model knows texts padded to ``MAX_TOKENS`` (``pipelines/wan.py`` passes that length).
"""

from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from .build import t5_tokenizer
from .motion import captions

FLOW_SHIFT = 3.0  # Wan's for its smaller size; also shifts the noise levels of training


def new_wan(vae: AutoencoderKLWan) -> WanPipeline:
    """An untrained tiny-wan around a trained autoencoder; about 1.5 M transformer parameters."""
    tokenizer = t5_tokenizer(captions(4000, seed=0, split="train"))
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=config.d_model,
        freq_dim=64,
        ffn_dim=512,
        num_layers=5,
        rope_max_seq_len=64,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config),
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT),
    )
