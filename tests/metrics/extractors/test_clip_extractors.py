"""Other extractors of clips: V-JEPA 2 against transformers' own, frames of any picture extractor, CLIP as old tables were made."""

import pytest
import torch
from dqtk.metrics.extractors.clip import TransformersClip
from dqtk.metrics.extractors.find import extractor_named
from dqtk.metrics.extractors.legacy_clip import LegacyFrames
from dqtk.metrics.extractors.moving_frames import MovingFrames
from dqtk.metrics.extractors.vjepa import VJepa
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, VJEPA2Config, VJEPA2ForVideoClassification


@pytest.fixture(scope="module")
def vjepa_folder(tmp_path_factory):
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "mlp_ratio": 2, "num_pooler_layers": 1}
    predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "pred_mlp_ratio": 2}
    config = VJEPA2Config(patch_size=8, crop_size=16, frames_per_clip=4, tubelet_size=2, num_labels=3, **small, **predictor)
    folder = tmp_path_factory.mktemp("vjepa") / "small"
    VJEPA2ForVideoClassification(config).save_pretrained(folder)
    return folder


def test_vjepa_is_what_the_classifier_sees(vjepa_folder):
    found = extractor_named(f"vjepa2:{vjepa_folder}")
    clips = torch.randint(0, 256, (2, 7, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    rows = found.encode_clips(clips)
    assert rows.shape == (2, found.dim) == (2, 24)
    assert not found.comparable
    seen = []
    found.network.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    frames = clips[0, [0, 2, 4, 6]].float()
    x = torch.nn.functional.interpolate(frames, size=(16, 16), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        found.network(pixel_values_videos=((x / 255 - mean) / std)[None])
    torch.testing.assert_close(rows[0], seen[0][0])
    assert not torch.allclose(found.encode_clips(clips.flip(1)), rows)  # it sees which way time goes
    with pytest.raises(ValueError, match="a clip must have at least 2 frames, got 1"):
        VJepa(vjepa_folder).encode_clips(clips[:, :1])


class Mean:
    """A picture's mean colour."""

    name, version, source, sha256, config_sha256, comparable, preprocess, dim = "mean", "1", "", "", "", True, "none", 3

    def encode_images(self, images):
        return images.float().mean(dim=(2, 3))


def test_moving_frames_see_what_and_how_much():
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8, generator=generator)
    found = MovingFrames(Mean())
    rows = found.encode_clips(clips)
    colours = clips.double().mean(dim=(3, 4))
    torch.testing.assert_close(rows[:, :3].double(), colours.mean(dim=1), rtol=1e-6, atol=0)
    changes = (colours[:, 1:] - colours[:, :-1]).square().mean(dim=1).sqrt()
    torch.testing.assert_close(rows[:, 3:].double(), changes, rtol=1e-5, atol=0)
    assert (found.dim, found.name, found.comparable) == (6, "motion[mean]", False)
    still = clips[:, :1].expand(-1, 5, -1, -1, -1)
    assert not found.encode_clips(still)[:, 3:].any()
    with pytest.raises(ValueError, match=r"motion\[mean\]: a clip must have at least 2 frames, got 1\."):
        found.encode_clips(clips[:, :1])


def clip_folder(folder, byte_tokenizer, side):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "vocab_size": len(byte_tokenizer), "max_position_embeddings": 16, "eos_token_id": 513, "bos_token_id": 512}
    vision = {**small, "image_size": side, "patch_size": side // 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    CLIPProcessor(image_processor=processor, tokenizer=byte_tokenizer).save_pretrained(folder)
    return folder


def test_legacy_frames_are_neither_cropped_nor_normalized(byte_tokenizer, tmp_path):
    encoder = TransformersClip(clip_folder(tmp_path / "clip", byte_tokenizer, 224))
    legacy, seen = LegacyFrames(encoder), []
    encoder.network.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    images = torch.randint(0, 256, (2, 3, 30, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = legacy.encode_images(images)
    assert rows.shape == (2, 8)
    (pixels,) = seen
    assert pixels.shape == (2, 3, 224, 224)
    assert torch.equal(pixels, pixels.round())
    assert float(pixels.min()) >= 0
    assert 200 < float(pixels.max()) <= 255
    assert torch.equal(legacy.encode_texts(["a"]), encoder.encode_texts(["a"]))
    assert legacy.name == "legacy[clip[clip]]"
    assert not torch.allclose(rows, encoder.encode_images(images), atol=1e-2)
    with pytest.raises(ValueError, match=r"legacy: encoder must take 224 x 224 pixels, got 32"):
        LegacyFrames(TransformersClip(clip_folder(tmp_path / "small", byte_tokenizer, 32)))
