"""CLIP through both libraries, tiny and random: equal to the library's own result; hashes, truncation, and what is refused."""

import hashlib
import json
import logging
import shutil

import pytest
import torch
from dqtk.metrics.extractors.clip import OpenClip, TransformersClip
from dqtk.metrics.extractors.contract import ImageTextEncoder, checked_rows, identity
from dqtk.metrics.extractors.weights import MissingWeights
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

TEXTS = ["a red disc", "", "blue", "abcdefghijklmn", "abcdefghijklmno", "x! y?"]  # BOS, letters, EOS: 14 letters fill 16 places
CUT = [False, False, False, False, True, False]
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="optional; pip install 'dqtk[clip]'")


@pytest.fixture(scope="module")
def open_clip_folder(open_clip, byte_tokenizer, tmp_path_factory):
    """Configuration, bf16 safetensors and tokenizer, as ``train_clip.finish`` writes them."""
    folder = tmp_path_factory.mktemp("clips") / "tiny-clip"
    config = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
            "text_cfg": {
                "context_length": MAX_TOKENS,
                "vocab_size": len(byte_tokenizer),
                "width": 16,
                "heads": 2,
                "layers": 1,
                "hf_tokenizer_name": "tiny-clip",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25], "interpolation": "bicubic", "resize_mode": "shortest"},
    }
    torch.manual_seed(0)
    byte_tokenizer.save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = open_clip.CLIP(**config["model_cfg"]).state_dict()
    save_file({name: value.bfloat16().contiguous() for name, value in state.items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def copied(open_clip_folder, tmp_path):
    """The folder again, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in open_clip_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture(scope="module")
def clip_folder(byte_tokenizer, tmp_path_factory):
    """A transformers CLIP with a processor of 32 pixels."""
    folder = tmp_path_factory.mktemp("clips") / "tiny-hf"
    ids = {"bos_token_id": byte_tokenizer.bos_token_id, "eos_token_id": byte_tokenizer.eos_token_id, "pad_token_id": 0}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, **ids, "vocab_size": len(byte_tokenizer), "max_position_embeddings": MAX_TOKENS},
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, byte_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["open_clip", "transformers"])
def encoder(request):
    folder = request.getfixturevalue({"open_clip": "open_clip_folder", "transformers": "clip_folder"}[request.param])
    return (OpenClip if request.param == "open_clip" else TransformersClip)(folder)


def pil(images):
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def test_contract(encoder, images):
    assert isinstance(encoder, ImageTextEncoder)
    rows, texts = checked_rows(encoder, images), encoder.encode_texts(TEXTS)
    assert rows.shape == (3, 16)
    assert texts.shape == (len(TEXTS), 16)
    assert texts.dtype == torch.float32
    assert texts.isfinite().all()
    assert (encoder.dim, encoder.max_tokens, encoder.comparable) == (16, MAX_TOKENS, False)
    assert encoder.logit_scale == pytest.approx(1 / 0.07, rel=0.01)


def test_one_at_a_time_equals_the_batch(encoder, images):
    rows, texts = encoder.encode_images(images), encoder.encode_texts(TEXTS)
    for i in range(3):
        assert torch.allclose(encoder.encode_images(images[i : i + 1])[0], rows[i], rtol=1e-5, atol=1e-5)
    for i, text in enumerate(TEXTS):
        assert torch.allclose(encoder.encode_texts([text])[0], texts[i], rtol=1e-5, atol=1e-5)


def test_truncation_is_reported_and_true(encoder):
    assert encoder.truncated(TEXTS) == CUT
    fits, cut, cut_elsewhere = encoder.encode_texts(["abcdefghijklmn", "abcdefghijklmno", "abcdefghijklmnzyx"])
    assert torch.equal(cut, cut_elsewhere)  # of a cut prompt only the beginning is read
    assert not torch.allclose(fits, cut, atol=1e-4)


def test_refusals(encoder, images):
    with pytest.raises(ValueError, match=r"\[tiny-\w+\]: images must be uint8, got torch\.float32\. Floats do not say"):
        encoder.encode_images(images.float() / 255)
    for ask in (encoder.encode_texts, encoder.truncated):
        with pytest.raises(ValueError, match=r"\[tiny-\w+\]: texts must be a list of strings and not empty, got 'a red disc'"):
            ask("a red disc")


# open_clip


def test_equals_open_clip(open_clip, open_clip_folder, images):
    spec = f"local-dir:{open_clip_folder}"
    model, _, transform = open_clip.create_model_and_transforms(spec)
    model.eval()
    with torch.no_grad():
        wanted = model.encode_image(torch.stack([transform(image) for image in pil(images)]))
        wanted_texts = model.encode_text(open_clip.get_tokenizer(spec)(TEXTS))
    for name in (open_clip_folder, str(open_clip_folder), spec):
        ours = OpenClip(name)
        assert torch.equal(ours.encode_images(images), wanted)
        assert torch.equal(ours.encode_texts(TEXTS), wanted_texts)
        assert ours.source == str(open_clip_folder)


def test_open_clip_identity(open_clip, open_clip_folder):
    ours = OpenClip(open_clip_folder, comparable=True)
    weights = open_clip_folder / "open_clip_model.safetensors"
    assert ours.name == "open_clip[tiny-clip]"
    assert ours.version == f"1, open_clip {open_clip.__version__}"
    assert ours.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert ours.comparable
    assert ours.preprocess == "pil-bicubic, shortest 32x32+crop, mean=0.5/0.4/0.3, std=0.2/0.3/0.25"


def test_of_two_files_the_hashed_one_is_loaded_and_it_is_open_clips_choice(open_clip, copied, images):
    state = load_file(copied / "open_clip_model.safetensors")
    other = {name: value.float() * 0.5 for name, value in state.items()}
    torch.save(other, copied / "open_clip_pytorch_model.bin")
    save_file(other, copied / "a.safetensors")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{copied}")
    ours = OpenClip(copied)
    assert ours.sha256 == hashlib.sha256((copied / "open_clip_model.safetensors").read_bytes()).hexdigest()
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack([transform(image) for image in pil(images)]))
    assert torch.equal(ours.encode_images(images), wanted)
    (copied / "open_clip_model.safetensors").unlink()
    assert OpenClip(copied).sha256 == hashlib.sha256((copied / "open_clip_pytorch_model.bin").read_bytes()).hexdigest()


def test_architecture_with_a_path(open_clip, tmp_path, monkeypatch, images):
    """By name, with a file: the architecture of open_clip's registry, here a small one added to it; open_clip's own tokenizer."""
    text = {"context_length": MAX_TOKENS, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny", {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    torch.manual_seed(0)
    path = tmp_path / "tiny.pt"
    torch.save({"state_dict": open_clip.create_model("Tiny").state_dict()}, path)
    ours = OpenClip("Tiny", path)
    model, _, transform = open_clip.create_model_and_transforms("Tiny", pretrained=str(path))
    with torch.no_grad():
        wanted = model.eval().encode_image(torch.stack([transform(image) for image in pil(images)]))
    assert torch.equal(ours.encode_images(images), wanted)
    assert (ours.name, ours.source) == ("open_clip[Tiny]", str(path))
    assert ours.preprocess.startswith("pil-bicubic, shortest 32x32+crop, mean=0.481455/")
    words = "cat " * 14
    assert ours.truncated([words, words + "dog", "!", ""]) == [False, True, False, False]


def test_cached_hub_id(open_clip_folder, tmp_path, monkeypatch, images):
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(open_clip_folder, target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("a connection was opened"))
    ours = OpenClip("hf-hub:owner/tiny")
    assert (ours.name, ours.source) == ("open_clip[owner/tiny]", "owner/tiny")
    assert torch.equal(ours.encode_images(images), OpenClip(open_clip_folder).encode_images(images))
    with pytest.raises(MissingWeights, match=r"got 'owner/none' \(not there\)\. Run `hf download owner/none`"):
        OpenClip("hf-hub:owner/none")


def test_loading_says_nothing_untrue(open_clip_folder, caplog):
    """open_clip logs "Model initialized randomly" when asked for a model before its weights."""
    with caplog.at_level(logging.WARNING):
        OpenClip(open_clip_folder)
    assert "randomly" not in caplog.text
    logging.getLogger().warning("No pretrained weights loaded: a message of another time")
    assert "another time" in caplog.text


def test_open_clip_names_that_are_refused(open_clip, open_clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"open_clip: model must be a folder, hf-hub:OWNER/NAME or one of .*, got 'ViT-B-23'\."):
        OpenClip("ViT-B-23")
    with pytest.raises(ValueError, match=r"pretrained must be a weights file of ViT-B-32, got 'None'\. Pass the path of a file\."):
        OpenClip("ViT-B-32")
    with pytest.raises(MissingWeights, match=r"got 'laion2b_s34b_b79k'\. Run `hf download (\S+/\S+)` and pass hf-hub:\1 as model"):
        OpenClip("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(ValueError, match=r"pretrained must be None for a folder or hub id, got 'x\.pt'\."):
        OpenClip(open_clip_folder, "x.pt")
    with pytest.raises(ValueError, match=r"must be a model folder with open_clip_config\.json, got nothing\. Check the path"):
        OpenClip(tmp_path)


def test_open_clip_files_that_are_refused(copied, byte_tokenizer):
    weights = copied / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"open_clip: .*open_clip_model\.safetensors must be weights of copy, got: .*Download or write"
    ):
        OpenClip(copied)
    weights.write_bytes(whole)
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "visual.proj"}, weights)
    with pytest.raises(ValueError, match=r"must be weights of copy, got: .*Missing key\(s\) in state_dict: .visual\.proj"):
        OpenClip(copied)
    weights.unlink()
    with pytest.raises(MissingWeights, match=r"open_clip: .*copy must have one of open_clip_model\.safetensors, "):
        OpenClip(copied)
    weights.write_bytes(whole)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copied / file).unlink()
    with pytest.raises(ValueError, match=r"open_clip: .*copy must be a folder with the tokenizer of copy"):
        OpenClip(copied)


# transformers


def test_equals_transformers(clip_folder, images):
    """CLIPModel's own cosines, through its forward pass and PIL processor."""
    ours = TransformersClip(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder, backend="pil")
    inputs = processor(text=TEXTS, images=pil(images), return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS)
    with torch.no_grad():
        wanted = model(**inputs)
    rows, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (ours.encode_images(images), ours.encode_texts(TEXTS)))
    assert torch.allclose(rows, wanted.image_embeds, atol=1e-6)
    assert torch.allclose(texts, wanted.text_embeds, atol=1e-6)
    assert torch.allclose(ours.logit_scale * rows @ texts.T, wanted.logits_per_image, atol=1e-4)


def test_vbenchs_way_to_give_clip_its_frames(clip_folder, images):
    """Shorter side by bicubic interpolation without antialiasing, not clipped, centre crop: torchvision on tensors."""
    from torchvision.transforms.v2.functional import InterpolationMode, center_crop, normalize, resize

    extractor = TransformersClip(clip_folder, preprocess="vbench")
    size = CLIPModel.from_pretrained(clip_folder).config.vision_config.image_size
    x = center_crop(resize(images.float(), [size], InterpolationMode.BICUBIC, antialias=False), [size, size]) / 255
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    x = normalize(x, processor.image_mean, processor.image_std)
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip_folder).eval()
        wanted = model.visual_projection(model.vision_model(pixel_values=x).pooler_output)
    found = extractor.encode_images(images)
    assert torch.allclose(found, wanted, atol=1e-4)
    own = TransformersClip(clip_folder)
    assert not torch.allclose(found, own.encode_images(images), atol=1e-3)
    assert extractor.preprocess.startswith("vbench, bicubic")
    assert identity(extractor) != identity(own)
    with pytest.raises(ValueError, match="preprocess must be None or 'vbench', got 'squash'"):
        TransformersClip(clip_folder, preprocess="squash")


def test_transformers_identity(clip_folder):
    ours = TransformersClip(clip_folder)
    assert ours.name == "clip[tiny-hf]"
    assert ours.sha256 == hashlib.sha256((clip_folder / "model.safetensors").read_bytes()).hexdigest()
    assert ours.preprocess.startswith(
        "CLIPImageProcessorPil(resize+center_crop+rescale+normalize), size=shortest_edge:32, crop_size="
    )
    assert ours.version.startswith("1, transformers ")


def test_transformers_files_that_are_refused(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    save_file({name: value for name, value in state.items() if name != "text_projection.weight"}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold all weights of CLIPModel, got 1 missing, such as text_projection\.weight\."):
        TransformersClip(tmp_path)
    save_file({**state, "text_projection.weight": torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"clip\[.*\]: .* must be readable weights of CLIPModel, got: "):
        TransformersClip(tmp_path)
    weights.write_bytes((clip_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"must be readable weights of CLIPModel, got: "):
        TransformersClip(tmp_path)
    weights.unlink()
    with pytest.raises(MissingWeights, match=r"must have one of model\.safetensors, model\.safetensors\.index\.json, "):
        TransformersClip(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert TransformersClip(tmp_path).sha256 == hashlib.sha256((tmp_path / "pytorch_model.bin").read_bytes()).hexdigest()
    with pytest.raises(MissingWeights, match=r"clip: model must be a folder or a hub id in the cache, got 'owner/none'"):
        TransformersClip("owner/none")


def test_another_configuration_of_the_same_weights_is_another_identity(open_clip_folder, clip_folder, tmp_path):
    for kind, folder, file in (
        (OpenClip, open_clip_folder, "open_clip_config.json"),
        (TransformersClip, clip_folder, "config.json"),
    ):
        copied = tmp_path / kind.__name__ / folder.name
        shutil.copytree(folder, copied)
        same, data = kind(copied), json.loads((copied / file).read_text())
        assert identity(same) == identity(kind(folder))
        if kind is OpenClip:
            data["model_cfg"]["quick_gelu"] = True
        else:
            data["vision_config"]["hidden_act"] = "gelu"
        (copied / file).write_text(json.dumps(data))
        other = kind(copied)
        assert (other.name, other.sha256) == (same.name, same.sha256)
        assert identity(other) != identity(same)


def test_patches_are_convolved_in_whole_float32(encoder, images, monkeypatch):
    seen, convolve = [], torch.nn.Conv2d.forward

    def forward(self, x):
        seen.append(torch.backends.cudnn.allow_tf32)
        return convolve(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    before = torch.backends.cudnn.allow_tf32
    encoder.encode_images(images)
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.allow_tf32 is before is True
