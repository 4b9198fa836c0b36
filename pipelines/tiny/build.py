"""The parts of the embedded image pipelines before training: tokenizers, text encoders, denoisers, schedulers.

Topology follows the real models; only widths and depths are small. ``tiny-sdxl``: DownBlock, two CrossAttnDownBlocks, mid block,
mirrored up-blocks with skip concatenation, text-time embedding, two CLIP text encoders. ``tiny-pixart``: adaLN-single transformer
over 256 image tokens, T5 v1.1 text encoder. Both predict v on PixArt's linear noise schedule, whose terminal signal is small enough
for black and white backgrounds.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .scenes import captions

MAX_TOKENS = 20  # the longest caption has 13 words, BOS and EOS
SCHEDULE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "v_prediction"}


def _corpus() -> list[str]:
    return captions(4000, seed=0, split="train")


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """A byte-level BPE tokenizer in CLIP's layout: bytes, bytes + ``</w>``, merges, BOS, EOS."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(_corpus(), trainer)
    merges = [tuple(pair) for pair in _merges(learner)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [f"{c}</w>" for c in alphabet] + [a + b for a, b in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=MAX_TOKENS)


def _merges(learner: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(learner.to_str())["model"]["merges"]


def t5_tokenizer(corpus: Sequence[str]) -> T5Tokenizer:
    """A unigram tokenizer in T5's layout: one piece per word of the captions, single characters for anything else."""
    counts = Counter(word for caption in corpus for word in caption.split())
    total = sum(counts.values())
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocab += [(f"▁{word}", float(torch.log(torch.tensor(n / total)))) for word, n in sorted(counts.items())]
    vocab += [(c, -12.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=MAX_TOKENS)


def _clip_config(tokenizer: CLIPTokenizer, width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=128,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_sdxl(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """An untrained tiny-sdxl around a trained autoencoder; about 9 M UNet parameters."""
    tokenizer, tokenizer_2 = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!")
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 96, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 3, 4),
        use_linear_projection=True,
        cross_attention_dim=192,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=128 + 6 * 32,
        norm_num_groups=16,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(_clip_config(tokenizer, 64, 3, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer_2, 128, 3, "gelu")),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=EulerDiscreteScheduler(timestep_spacing="trailing", **SCHEDULE),
        add_watermarker=False,
    )


def new_pixart(vae: AutoencoderKL) -> PixArtSigmaPipeline:
    """An untrained tiny-pixart around a trained autoencoder; about 4 M transformer parameters."""
    tokenizer = t5_tokenizer(_corpus())
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=128,
    )
    config = T5Config(
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
    return PixArtSigmaPipeline(
        vae=vae,
        transformer=transformer,
        text_encoder=T5EncoderModel(config),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(timestep_spacing="trailing", **SCHEDULE),
    )
