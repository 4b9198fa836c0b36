"""DINO and DINOv2, tiny and random, under the hub's tensor names: class token, preprocessing, identity, refusals."""

import hashlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from dqtk.metrics.extractors.contract import Extractor, checked_rows, identity
from dqtk.metrics.extractors.dino import Dino
from dqtk.metrics.extractors.resize import resize_clean
from dqtk.metrics.extractors.weights import MissingWeights
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

_SHAPE = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """DINO with patches of 32 at 224 pixels, DINOv2 with patches of 14 trained at 70."""
    root = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    dino = ViTConfig(**_SHAPE, intermediate_size=48, image_size=224, patch_size=32)
    ViTModel(dino, add_pooling_layer=False).save_pretrained(root / "dino")
    dinov2 = Dinov2Model(Dinov2Config(**_SHAPE, mlp_ratio=2, image_size=70, patch_size=14))
    torch.nn.init.normal_(dinov2.embeddings.position_embeddings)
    dinov2.save_pretrained(root / "dinov2")
    return root


def test_stored_names_are_the_hubs(folders):
    """Transformers 5 renamed the modules; facebook's files have the old names, and so have ours, which are converted on loading."""
    for kind in ("dino", "dinov2"):
        names = load_file(folders / kind / "model.safetensors").keys()
        assert {"embeddings.cls_token", "encoder.layer.0.attention.attention.query.weight", "layernorm.bias"} <= names


@pytest.mark.parametrize(("kind", "model"), [("dino", ViTModel), ("dinov2", Dinov2Model)])
def test_rows_are_the_models_class_tokens(folders, kind, model, images):
    extractor = Dino(folders / kind)
    assert isinstance(extractor, Extractor)
    rows = checked_rows(extractor, images)
    assert rows.shape == (3, 24)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (resize_clean(images, 224) / 255 - mean) / std
    with torch.no_grad():
        wanted = model.from_pretrained(folders / kind).eval()(pixel_values=x).last_hidden_state[:, 0]
    assert torch.allclose(rows, wanted, atol=1e-6)
    for i in range(3):
        assert torch.allclose(extractor.encode_images(images[i : i + 1])[0], rows[i], rtol=1e-5, atol=1e-5)


def test_vbenchs_way_to_give_dino_its_frames(folders, images):
    """Oblong: 40 x 56 becomes 224 x 313, of which a patch's width of 25 at the right is not read."""
    extractor = Dino(folders / "dino", preprocess="vbench")
    x = F.interpolate(images.float(), size=(224, 313), mode="bilinear", align_corners=False) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        model = ViTModel.from_pretrained(folders / "dino", add_pooling_layer=False).eval()
        wanted = model(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
    assert torch.allclose(checked_rows(extractor, images), wanted, atol=1e-5)
    assert extractor.preprocess == "vbench, bilinear, shortest 224, imagenet"
    assert identity(extractor) != identity(Dino(folders / "dino"))
    with pytest.raises(ValueError, match="preprocess must be one of squash, vbench, got 'crop'"):
        Dino(folders / "dino", preprocess="crop")


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_identity(folders, kind):
    extractor = Dino(folders / kind, comparable=True)
    assert extractor.name == f"{kind}[{kind}]"
    assert extractor.sha256 == hashlib.sha256((folders / kind / "model.safetensors").read_bytes()).hexdigest()
    assert extractor.preprocess == "pil-bicubic-float, squash 224, imagenet"
    assert extractor.comparable
    assert not Dino(folders / kind).comparable


def test_half_precision_files_are_computed_in_float32(folders, tmp_path, images):
    Dinov2Model.from_pretrained(folders / "dinov2").half().save_pretrained(tmp_path)
    half = Dino(tmp_path)
    assert next(half.network.parameters()).dtype == torch.float32
    assert torch.allclose(half.encode_images(images), Dino(folders / "dinov2").encode_images(images), atol=0.02)


def test_dino_of_another_size_is_interpolated(tmp_path, images):
    config = ViTConfig(**_SHAPE, intermediate_size=48, image_size=64, patch_size=16)
    ViTModel(config, add_pooling_layer=True).save_pretrained(tmp_path)  # its pooler is left unread
    assert checked_rows(Dino(tmp_path), images).shape == (3, 24)


def test_refusals(folders, tmp_path, images):
    with pytest.raises(ValueError, match=r"dinov2\[dinov2\]: images must be uint8, got torch\.float32"):
        Dino(folders / "dinov2").encode_images(images / 255)
    CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"model_type in .* must be one of \['dinov2', 'vit'\], got 'clip_vision_model'"):
        Dino(tmp_path / "clip")
    with pytest.raises(MissingWeights, match=r"dino: model must be a folder .* Run `hf download owner/none`"):
        Dino("owner/none")
    Dinov2Model(Dinov2Config(**_SHAPE, mlp_ratio=2, image_size=64, patch_size=15)).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"dinov2\[odd\]: patch_size must divide 224, got 15\."):
        Dino(tmp_path / "odd")
    folder = tmp_path / "other"
    Dinov2Model(Dinov2Config(**_SHAPE, mlp_ratio=2, image_size=70, patch_size=14)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match=r"must hold all weights of Dinov2Model, got \d+ missing, such as encoder\.layer\.1\."):
        Dino(folder)


def test_patches_are_convolved_in_whole_float32(folders, images, monkeypatch):
    seen, convolve = [], torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda self, x: (seen.append(torch.backends.cudnn.allow_tf32), convolve(self, x))[1]
    )
    Dino(folders / "dino").encode_images(images)
    assert seen == [False]


def test_another_configuration_of_the_same_weights_is_another_identity(folders, tmp_path):
    same, copied = Dino(folders / "dino"), tmp_path / "dino"
    shutil.copytree(folders / "dino", copied)
    data = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(data | {"hidden_act": "relu"}))
    assert identity(Dino(copied)) != identity(same)
