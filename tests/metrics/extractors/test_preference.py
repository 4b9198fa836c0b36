"""PickScore and HPSv2: found by name, resized as their authors do, scored in both scales, and with nothing else."""

import json

import pytest
import torch
from dqtk.metrics.clip_score import clip_cosine
from dqtk.metrics.extractors import preference
from dqtk.metrics.extractors.clip import TransformersClip
from dqtk.metrics.extractors.find import extractor_named
from dqtk.metrics.extractors.weights import MissingWeights
from dqtk.metrics.preference import SCORES
from dqtk.metrics.score import comparable, serves
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

BY_NAME = {score.name: score for score in SCORES}


@pytest.fixture
def weights(tmp_path, monkeypatch, byte_tokenizer):
    """``$DQTK_WEIGHTS`` with a PickScore that lacks its processor, and the CLIP that has it."""
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "vocab_size": len(byte_tokenizer), "max_position_embeddings": 16, "eos_token_id": 513, "bos_token_id": 512}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    ).save_pretrained(tmp_path / preference.PICKSCORE)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=byte_tokenizer).save_pretrained(tmp_path / preference.PROCESSOR)
    return tmp_path


def test_pickscore_takes_its_processor_from_the_clip_it_comes_from(weights, images):
    found = extractor_named("pickscore")
    assert (found.name, found.comparable, found.source) == ("pickscore", False, preference.PICKSCORE)
    whole = TransformersClip(weights / preference.PICKSCORE, processor=preference.PROCESSOR)
    assert torch.equal(found.encode_images(images), whole.encode_images(images))
    texts = found.encode_texts(["a", "b", "c"])
    rows = found.encode_images(images)
    cosine = clip_cosine(rows, texts)
    assert torch.equal(BY_NAME["pickscore_cosine"].function(rows, texts), cosine)
    assert BY_NAME["pickscore"].scaled
    assert not BY_NAME["pickscore_cosine"].scaled
    assert extractor_named(f"pickscore:{weights / preference.PICKSCORE}").sha256 == found.sha256
    (weights / preference.PROCESSOR / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"must be a model folder with tokenizer_config\.json"):
        extractor_named("pickscore")


def test_scores_are_taken_with_their_networks_alone(weights):
    found = preference.pickscore(comparable=True)
    other = TransformersClip(weights / preference.PICKSCORE, processor=preference.PROCESSOR)
    assert [name for name, score in BY_NAME.items() if serves(score, found)] == ["pickscore", "pickscore_cosine"]
    assert not any(serves(score, other) for score in SCORES)
    assert comparable(BY_NAME["pickscore"], found, to_original=False)
    assert not comparable(BY_NAME["pickscore"], found, to_original=True)


@pytest.fixture
def hps_file(weights, monkeypatch, byte_tokenizer):
    """A tiny architecture in ViT-H's place, and its weights in the form that HPSv2's files have."""
    open_clip = pytest.importorskip("open_clip", reason="optional; pip install 'dqtk[clip]'")
    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (weights / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(weights / "tiny-hps.json")
    monkeypatch.setattr(preference, "HPS_ARCHITECTURE", "tiny-hps")
    torch.manual_seed(0)
    file = weights / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict()}, file)
    return file


def test_hps_pads_where_clip_would_crop(hps_file, images):
    found = extractor_named("hpsv2.1")
    assert (found.name, found.comparable) == ("hpsv2.1", False)
    assert "longest" in found.preprocess
    changed = images.clone()
    changed[..., :4] = 255 - changed[..., :4]  # the left edge of 56 x 40 pictures: a centre crop would not see it
    assert not torch.allclose(found.encode_images(images), found.encode_images(changed))
    rows, texts = found.encode_images(images), found.encode_texts(["a", "b", "c"])
    assert torch.equal(BY_NAME["hpsv2_100"].function(rows, texts), 100 * BY_NAME["hpsv2"].function(rows, texts))
    assert [name for name, score in BY_NAME.items() if serves(score, found)] == ["hpsv2", "hpsv2_100"]
    with pytest.raises(MissingWeights, match=r"hpsv2: weights must be a file, got .*HPS_v2_compressed\.pt"):
        extractor_named("hpsv2")
    other = hps_file.with_name("mine.pt")
    other.write_bytes(hps_file.read_bytes())
    named = extractor_named(f"hpsv2={other}")
    assert (named.name, named.sha256) == ("hpsv2", found.sha256)
