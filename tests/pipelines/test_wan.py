"""tiny-wan: real classes and topology, training that means what the pipeline does, and trained clips that the oracle can read."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from dqtk.pipelines.tiny import calibration_prompts, folder
from dqtk.pipelines.tiny.build import MAX_TOKENS
from dqtk.pipelines.tiny.judge_wan import generate, reconstruct, score, to_bytes
from dqtk.pipelines.tiny.motion import FRAMES, Moving, captions, is_held_out, parse_caption, render, sample_clip
from dqtk.pipelines.tiny.train_wan import flow_loss, text_states
from dqtk.pipelines.tiny.train_wan_vae import half_size
from dqtk.pipelines.wan import call_kwargs
from transformers import UMT5EncoderModel

import dqtk
from dqtk.bench import record_step

PROMPTS = [
    "a small red circle moving left slowly on a striped background",
    "a medium blue cross moving up quickly on a gradient background",
]
FLOOR = 0.7


@pytest.fixture(scope="module")
def trained():
    return dqtk.load("tiny-wan")


def test_wan_has_wan_topology(wan):
    assert type(wan) is WanPipeline
    assert [type(part) for part in (wan.vae, wan.transformer, wan.text_encoder)] == [
        AutoencoderKLWan,
        WanTransformer3DModel,
        UMT5EncoderModel,
    ]
    assert type(wan.scheduler) is UniPCMultistepScheduler
    assert wan.scheduler.config.prediction_type == "flow_prediction"
    assert tuple(wan.transformer.config.patch_size) == (1, 2, 2)
    assert 1e6 <= sum(p.numel() for p in wan.transformer.parameters()) <= 3e6


def test_a_clip_is_576_tokens(wan):
    asked = call_kwargs(wan) | {"num_inference_steps": 1}
    seen = []
    handle = wan.transformer.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    latents = wan(PROMPTS, output_type="latent", **asked).frames
    handle.remove()
    assert latents.shape == (2, 8, 9, 16, 16)
    assert seen[0] == (2, 576, 128)


def test_call_arguments_are_for_miniatures_only(wan):
    size = {"height": 64, "width": 64, "num_frames": FRAMES}
    assert call_kwargs(wan) == size | {"max_sequence_length": MAX_TOKENS, "num_inference_steps": 20}
    published = type("Pipe", (), {"tokenizer": type("Tokenizer", (), {"model_max_length": 512})})
    assert call_kwargs(published) == {}


def test_every_word_is_one_token(wan):
    for split in ("train", "heldout"):
        for caption in captions(200, 1, split):
            ids = wan.tokenizer(caption).input_ids
            assert len(ids) == len(caption.split()) + 1 <= MAX_TOKENS
            assert wan.tokenizer.unk_token_id not in ids


def test_training_reads_text_as_the_pipeline_does(wan):
    coded = wan.tokenizer(PROMPTS, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    given, empty = wan.encode_prompt(PROMPTS, max_sequence_length=MAX_TOKENS)
    states = text_states(wan, coded.input_ids, coded.attention_mask, torch.tensor([False, True]))
    torch.testing.assert_close(states[0], given[0])
    torch.testing.assert_close(states[1], empty[1])
    assert not states[1, 1:].any()


def test_training_means_the_velocity_of_the_scheduler(wan):
    """Who knows the clean latents has no loss, and leads the scheduler to them."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4, 8, 2, 4, 4, generator=generator)

    def velocity(x, t):
        return (x - clean) / (t / 1000).view(-1, 1, 1, 1, 1)

    assert flow_loss(velocity, clean, generator) < 1e-6
    assert flow_loss(lambda x, t: -velocity(x, t), clean, generator) > 1
    scheduler = UniPCMultistepScheduler.from_config(wan.scheduler.config)
    scheduler.set_timesteps(10)
    x = torch.randn(clean.shape, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t.expand(4)), t, x).prev_sample
    torch.testing.assert_close(x, clean, atol=0.01, rtol=0)  # the scheduler rounds times to whole numbers


def test_half_size_clips_move_as_fast_in_their_own_pixels():
    clip = Moving(shape="square", colour="red", size="medium", direction="right", speed="quickly", background="plain black")
    frames = torch.from_numpy(render(clip, 0, 1)).permute(3, 0, 1, 2)[None].float()
    half = half_size(frames)
    assert half.shape == (1, 3, 9, 32, 32)

    def speed(x):
        columns = torch.arange(x.shape[-1]).float()
        weight = (x[0, 0] - x[0, 1]).clamp(min=0).sum(1)
        places = (weight * columns).sum(-1) / weight.sum(-1)
        return float((places[-1] - places[0]) / (len(places) - 1))

    assert speed(half) == pytest.approx(speed(frames), abs=0.02)
    assert speed(frames) == pytest.approx(2, abs=0.02)


@torch.no_grad()
def test_the_first_frames_have_the_first_latents(wan):
    """What training on the beginnings of clips rests on."""
    x = torch.rand(1, 3, FRAMES, 32, 32, generator=torch.Generator().manual_seed(0))
    whole, begun = (wan.vae.encode(part).latent_dist.mean for part in (x, x[:, :, :9]))
    assert whole.shape == (1, 8, 9, 8, 8)
    torch.testing.assert_close(whole[:, :, :5], begun)


def test_a_saved_folder_makes_the_same_clip(wan, tmp_path):
    wan.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is WanPipeline
    first, second = (generate(pipe, PROMPTS[:1], num_inference_steps=2) for pipe in (wan, again))
    assert np.abs(first.astype(int) - second).max() <= 1  # tensors lie elsewhere in memory: other rounding


def test_prompt_files_are_captions():
    place = folder("tiny-wan").parent.parent
    calibration = calibration_prompts("tiny-wan").read_text().splitlines()
    assert not any(is_held_out(parse_caption(line)) for line in calibration)
    assert all(is_held_out(parse_caption(line)) for line in (place / "motion_prompts.txt").read_text().splitlines())


# --- trained ---------------------------------------------------------------------------------------------------------


def test_stored_small_and_in_bf16():
    files = list(folder("tiny-wan").rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= 10e6
    for file in files:
        from safetensors.torch import load_file

        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_the_autoencoder_keeps_what_the_oracle_reads(trained):
    wanted = [sample_clip(1, i, "heldout") for i in range(3)]
    decoded = [reconstruct(trained, render(clip, 1, i)) for i, clip in enumerate(wanted)]
    assert score(decoded, wanted)["mean"] > 0.9


def test_clips_show_what_held_out_captions_say(trained, wan):
    """Well above what clips of untrained weights and clips of other captions score."""
    wanted = [sample_clip(1, i, "heldout") for i in range(3)]
    words = [clip.caption for clip in wanted]
    made = generate(trained, words, num_inference_steps=8)
    assert made.shape == (3, FRAMES, 64, 64, 3)
    assert score(list(made), wanted)["mean"] > FLOOR
    assert score([*made[1:], made[0]], wanted)["mean"] < FLOOR
    assert score(list(generate(wan, words[:1], num_inference_steps=2)), wanted[:1])["mean"] < FLOOR - 0.2


def test_a_seed_is_a_clip(trained):
    asked = call_kwargs(trained) | {"num_inference_steps": 2, "output_type": "np"}

    def clip(seed):
        return to_bytes(trained(PROMPTS[0], generator=torch.Generator().manual_seed(seed), **asked).frames)

    first = clip(0)
    assert np.array_equal(first, clip(0))
    assert not np.array_equal(first, clip(1))


def test_a_step_has_the_dtype_of_most_weights():
    """Wan keeps its modulation tables and time embedding in float32, the first parameter among them."""
    pipe = dqtk.load("tiny-wan")
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    assert record_step(pipe, height=32, width=32, num_frames=3).dtype == torch.bfloat16
