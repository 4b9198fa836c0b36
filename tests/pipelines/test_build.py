"""The embedded pipelines before training: real classes, real topology, tokenizers that know the world, folders that load."""

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, StableDiffusionXLPipeline
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UpBlock2D
from dqtk.pipelines.tiny.build import MAX_TOKENS
from dqtk.pipelines.tiny.scenes import captions
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

PROMPTS = ["a large red circle in the top left on a striped background", "three small blue crosses on a plain gray background"]


def num_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def words() -> list[str]:
    return sorted({word for split in ("train", "heldout") for text in captions(2000, 1, split) for word in text.split()})


def test_sdxl_has_sdxl_topology(sdxl):
    assert type(sdxl) is StableDiffusionXLPipeline
    unet = sdxl.unet
    assert [type(b) for b in unet.down_blocks] == [DownBlock2D, CrossAttnDownBlock2D, CrossAttnDownBlock2D]
    assert [type(b) for b in unet.up_blocks] == [CrossAttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D]
    assert [len(a.transformer_blocks) for b in unet.down_blocks[1:] for a in b.attentions] == [1, 1, 2, 2]
    assert all(resnet.conv_shortcut is not None for block in unet.up_blocks for resnet in block.resnets)
    assert unet.config.addition_embed_type == "text_time"
    assert type(sdxl.text_encoder) is CLIPTextModel
    assert type(sdxl.text_encoder_2) is CLIPTextModelWithProjection
    widths = sdxl.text_encoder.config.hidden_size + sdxl.text_encoder_2.config.hidden_size
    assert unet.config.cross_attention_dim == widths
    assert 8e6 <= num_parameters(unet) <= 12e6


def test_pixart_has_pixart_topology(pixart):
    assert type(pixart) is PixArtSigmaPipeline
    transformer = pixart.transformer
    assert transformer.config.norm_type == "ada_norm_single"
    assert (transformer.config.sample_size // transformer.config.patch_size) ** 2 == 256
    assert type(pixart.text_encoder) is T5EncoderModel
    assert pixart.text_encoder.config.is_gated_act
    assert 3e6 <= num_parameters(transformer) <= 5e6


def test_latents_are_16x16x4_and_pictures_64x64(pipe, paint):
    assert paint(pipe, PROMPTS).shape == (2, 4, 16, 16)
    assert paint(pipe, PROMPTS[:1], "np").shape == (1, 64, 64, 3)


def test_every_word_is_one_clip_token(sdxl):
    for tokenizer in (sdxl.tokenizer, sdxl.tokenizer_2):
        for word in words():
            ids = tokenizer(word).input_ids
            assert len(ids) == 3, word
            assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert tokenizer.decode(ids[1:-1]).strip() == word


def test_every_word_is_one_t5_token(pixart):
    tokenizer = pixart.tokenizer
    for word in words():
        ids = tokenizer(word).input_ids
        assert len(ids) == 2, word
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids[:-1]).strip() == word


def test_clip_encoders_pad_as_sdxl_does(sdxl):
    one, two = (t(PROMPTS[0], padding="max_length").input_ids for t in (sdxl.tokenizer, sdxl.tokenizer_2))
    assert len(one) == len(two) == MAX_TOKENS
    assert one[-1] == sdxl.tokenizer.eos_token_id
    assert two[-1] == sdxl.tokenizer_2.pad_token_id != sdxl.tokenizer_2.eos_token_id


def test_no_caption_is_truncated(pipe):
    longest = max(len(pipe.tokenizer(text).input_ids) for text in captions(2000))
    assert longest <= MAX_TOKENS


def test_unseen_text_is_spelled_not_refused(pipe):
    ids = pipe.tokenizer("a photo of a cat, please").input_ids
    assert len(ids) > 6
    assert pipe.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "").startswith("aphotoofacat")


def test_the_clip_first_token_is_the_same_for_every_prompt(sdxl):
    states = sdxl.encode_prompt(PROMPTS, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    assert torch.equal(states[0, 0], states[1, 0])
    assert not torch.equal(states[0, 1], states[1, 1])


def test_the_prompt_matters(pipe, paint):
    first, second = paint(pipe, PROMPTS), paint(pipe, [PROMPTS[0], PROMPTS[0]])
    torch.testing.assert_close(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_paints_the_same(pipe, paint, tmp_path, dtype):
    pipe.save_pretrained(tmp_path / "float32")
    folder = tmp_path / "float32"
    if dtype != torch.float32:
        folder = tmp_path / "half"
        DiffusionPipeline.from_pretrained(tmp_path / "float32", dtype=dtype).save_pretrained(folder)
    first = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    first.set_progress_bar_config(disable=True)
    assert type(first) is type(pipe)
    if dtype == torch.float32:
        assert torch.equal(paint(first, PROMPTS), paint(pipe, PROMPTS))
        return
    second = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    second.set_progress_bar_config(disable=True)
    latents = paint(first, PROMPTS)
    assert latents.dtype == dtype
    assert torch.equal(latents, paint(second, PROMPTS))
