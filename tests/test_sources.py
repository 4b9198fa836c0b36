"""MODEL in its three forms, prompts in their two, and what is said when they cannot be read."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import dqtk
from dqtk.checkpoint import quantized_layers
from dqtk.installed import installed_plan
from dqtk.resolve import adapters, call_kwargs_for, embedded_names, families, oracle_for
from dqtk.sources import load_pipeline, local_folder, locate, meta_pipeline, read_json, stored_dtype


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A pixart folder of one's own."""
    shutil.copytree(tiny_folders["pixart"], tmp_path / "pixart")
    return tmp_path / "pixart"


# --- where -----------------------------------------------------------------------------------------------------------


def test_local_folders_and_hub_ids(folder, tmp_path, monkeypatch):
    assert locate(str(folder)) == str(folder)
    assert locate("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS") == "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"
    monkeypatch.chdir(tmp_path)
    assert locate("pixart") == "pixart"
    assert locate("./pixart") == "pixart"


def test_embedded_names_come_first(monkeypatch, tmp_path, folder):
    import dqtk.pipelines.tiny as tiny

    monkeypatch.setattr(tiny, "_WEIGHTS", folder.parent)
    assert embedded_names() == ("pixart",)
    assert str(dqtk.load("pixart").config._name_or_path) == str(folder)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match=r"load: pixart must be an embedded .*, got both\. Write .*/pixart\."):
        dqtk.load("pixart")
    monkeypatch.chdir(folder)
    assert locate("pixart") == str(folder)
    with pytest.raises(
        ValueError, match=r"model: MODEL must be an embedded pipeline \(pixart\), .*got 'pixat'\. Did you mean 'pixart'\?"
    ):
        locate("pixat")


@pytest.mark.parametrize("name", ["nothing here", "../out/pixart", "./no-such-folder", "a/b/c", ".hidden/x"])
def test_unknown_model(name):
    with pytest.raises(ValueError, match=r"MODEL must be an embedded pipeline .*, a diffusers folder or a hub id \(owner/name\)"):
        locate(name)


def test_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold model_index\.json .*, got \S+ with nothing\. Give the folder that"):
        locate(str(tmp_path))
    for i in range(6):
        (tmp_path / f"f{i}").touch()
    with pytest.raises(ValueError, match=r"with f0, f1, f2, f3, \.\.\.\. Give"):
        locate(str(tmp_path))


def test_hub_id_offline_is_one_line(monkeypatch, tmp_path):
    """With no network and nothing in the cache: no stack trace, no minute of retries."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for open_model in (load_pipeline, meta_pipeline):
        with pytest.raises(ValueError, match=r"some-owner/no-such-model is not a local folder, so it must be on the hub") as error:
            open_model("some-owner/no-such-model")
        assert "\n" not in str(error.value)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "expected"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("stored", "float32")])
def test_dtypes(folder, dtype, expected):
    pipe = load_pipeline(str(folder), dtype)
    assert {part.dtype for part in (pipe.transformer, pipe.text_encoder, pipe.vae)} == {getattr(torch, expected)}


def test_stored_dtype_of_a_quantized_folder_is_that_of_what_was_kept(load_tiny, tmp_path):
    for dtype in (torch.bfloat16, torch.float32):
        pipe = load_tiny("pixart", dtype)
        dqtk.quantize(pipe, "w8a8", progress=False)
        path = tmp_path / str(dtype)
        dqtk.save(pipe, path)
        assert stored_dtype(path) == str(dtype).removeprefix("torch.")


WEIGHTS, CONFIG = "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "no file named|does not appear|not found"),
        (
            lambda f: (f / WEIGHTS).write_bytes(b"\x10" * 30),
            "header|safetensors|deserial",
        ),
        (lambda f: (f / "text_encoder/model.safetensors").write_bytes(b"\x10" * 30), "header|safetensors|deserial"),
        (lambda f: (f / "text_encoder/model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / CONFIG).write_text("{"), "JSON|json"),
        (lambda f: (f / "model_index.json").write_text("{"), "JSON|json"),
        (lambda f: change(f / CONFIG, num_layers="six"), "str|int"),
        (lambda f: change(f / CONFIG, caption_channels=64), "shape"),
        (lambda f: change(f / "text_encoder/config.json", d_model=64), "shape|size"),
        (lambda f: shutil.rmtree(f / "scheduler"), "scheduler"),
    ],
)
def test_damaged_pipelines_are_one_line(folder, damage, says):
    damage(folder)
    with pytest.raises(ValueError, match=rf"model: {folder}\S* must be complete and readable, got: .*({says})") as error:
        load_pipeline(str(folder))
    assert "\n" not in str(error.value)


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_truncated_weights(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert len(load_file(file)) > 100
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"model: \S+/diffusion_pytorch_model.safetensors must be complete and readable, got: "):
        load_pipeline(str(folder))


# --- meta ------------------------------------------------------------------------------------------------------------


def test_meta_pipeline_reads_no_weights(folder, load_tiny):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    pipe = meta_pipeline(str(folder))
    assert {tensor.device.type for part in pipe.components.values() for tensor in part.parameters()} == {"meta"}
    planned = dqtk.plan(pipe, "w4a8-rtn", text_encoders="w8a8")
    assert planned == dqtk.plan(load_tiny("pixart"), "w4a8-rtn", text_encoders="w8a8")


def test_meta_pipeline_of_a_quantized_folder_shows_its_layers(load_tiny, tmp_path):
    pipe = load_tiny("sdxl")
    dqtk.quantize(pipe, dqtk.plan(pipe, "w4a8-rtn", text_encoders="w8a16"), progress=False)
    dqtk.save(pipe, tmp_path / "q")
    meta = meta_pipeline(str(tmp_path / "q"))
    assert installed_plan(meta).hash == installed_plan(pipe).hash
    assert len(quantized_layers(meta.components["text_encoder_2"])) == len(quantized_layers(pipe.text_encoder_2)) > 0
    with pytest.raises(ValueError, match=r"plan: target must have something to quantize, .*: \d+ layers are quantized already\."):
        dqtk.plan(meta, "w8a8")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda f: change(f / CONFIG, quantization_config={"quant_method": "torchao"}),
            "got 'torchao'. Plan the",
        ),
        (lambda f: change(f / CONFIG, quantization_config={"quant_method": "dqtk"}), "format_version must be 2"),
        (lambda f: (f / CONFIG).unlink(), "file must exist"),
        (lambda f: (f / CONFIG).write_text("x"), "must be JSON"),
        (lambda f: change(f / "model_index.json", transformer=["os", "system"]), r"got os\.system\. Update the library"),
        (lambda f: change(f / "model_index.json", transformer=["diffusers", "NewModel"]), r"got diffusers\.NewModel\."),
    ],
)
def test_meta_pipeline_of_a_damaged_folder(folder, damage, says):
    damage(folder)
    with pytest.raises(ValueError, match=rf"model: transformer of {folder} must be complete and readable, got: .*{says}"):
        meta_pipeline(str(folder))


def test_local_folder_is_itself(folder):
    assert local_folder(str(folder)) == local_folder(str(folder), weights=False) == folder


# --- prompts and JSON ------------------------------------------------------------------------------------------------


def test_read_json(tmp_path):
    with pytest.raises(ValueError, match=r"x: file must exist, got \S+no\.json\. Check the path\."):
        read_json(tmp_path / "no.json", "x")


# --- families --------------------------------------------------------------------------------------------------------


def test_families_are_found_by_class():
    assert {"PixArtTransformer2DModel", "DiTTransformer2DModel"} <= set(adapters())
    assert all(family.__name__.startswith("dqtk.pipelines.") for family in families())
    claimed = [name for family in families() for name in family.ADAPTER.classes]
    assert len(claimed) == len(set(claimed))


def test_call_kwargs_of_known_and_unknown_families(load_tiny):
    assert call_kwargs_for(load_tiny("pixart"))["max_sequence_length"] == 20
    assert call_kwargs_for(load_tiny("sdxl")) == {"num_inference_steps": 20}
    large = load_tiny("sdxl")
    large.unet.register_to_config(sample_size=128)
    assert call_kwargs_for(large) == {}
    assert call_kwargs_for(torch.nn.Linear(2, 2)) == {}


def test_sides_of_miniature_unets(load_tiny):
    pipe = load_tiny("sdxl")
    for side, steps in ((16, 20), ((16, 24), 20), ((64, 16), None), (None, None)):
        pipe.unet.register_to_config(sample_size=side)
        assert call_kwargs_for(pipe).get("num_inference_steps") == steps


def test_the_oracle_is_for_pictures_of_its_size(load_tiny):
    """The captions alone do not tell: another model may be given them too."""
    pipe, captions = load_tiny("pixart"), ["a large red circle in the top left on a plain white background"]
    assert oracle_for(pipe, captions) is not None
    assert oracle_for(pipe, [*captions, "a cat"]) is None
    pipe.transformer.register_to_config(sample_size=128)
    assert oracle_for(pipe, captions) is None
