"""The stored form: configuration, digests, folders that appear whole, bare modules. Hosts are tested in their backends' files."""

import copy
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dqtk
from dqtk.checkpoint import (
    DIGESTS,
    check_output,
    config_of,
    digest,
    file_metadata,
    load_module,
    quantized_layers,
    read_config,
    save_module,
    verify_files,
    written_whole,
)
from dqtk.nn import QuantLinear


@pytest.fixture
def saved(bare, tmp_path):
    """(quantized bare module, its folder)."""
    dqtk.quantize(bare, dqtk.plan(bare, "w4a8-rtn"), progress=False)
    dqtk.save(bare, tmp_path / "bare")
    return bare, tmp_path / "bare"


def fresh():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False), nn.GELU(), nn.Linear(64, 16))


def rewrite(file, edit):
    """Change the tensors of a file and keep its metadata."""
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata=metadata)


# --- bare modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a16", "w8a8", "w4a16", "w4a8-rtn", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bare_module_comes_back_bit_identical(bare, tmp_path, recipe, dtype):
    bare = bare.to(dtype)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    dqtk.quantize(bare, recipe, progress=False)
    dqtk.save(bare, tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    with torch.device("meta"):
        empty = fresh()
    loaded = load_module(empty, tmp_path / "m")
    assert list(quantized_layers(loaded)) == ["0", "2", "4"]
    assert torch.equal(loaded(x), bare(x))
    assert {n: digest(t) for n, t in loaded.state_dict().items()} == {n: digest(t) for n, t in bare.state_dict().items()}


def test_tied_tensors_are_written_once_and_come_back_for_both(tmp_path):
    module = nn.ModuleDict({"embed": nn.Embedding(10, 64), "head": nn.Linear(64, 10, bias=False), "a": nn.Linear(64, 64)})
    module["head"].weight = module["embed"].weight
    dqtk.quantize(module, "w8a16", progress=False)
    save_module(module, tmp_path / "m")
    assert set(load_file(tmp_path / "m" / "model.safetensors")) & {"embed.weight", "head.weight"} == {"embed.weight"}
    blank = nn.ModuleDict({"embed": nn.Embedding(10, 64), "head": nn.Linear(64, 10, bias=False), "a": nn.Linear(64, 64)})
    loaded = load_module(blank, tmp_path / "m")
    assert torch.equal(loaded["head"].weight, module["embed"].weight)
    assert torch.equal(loaded["embed"].weight, module["embed"].weight)


def test_loading_needs_the_same_architecture(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"layer 2 must exist in Sequential, got none\. Was the model class changed\?"):
        load_module(nn.Sequential(nn.Linear(64, 96), nn.GELU()), folder)
    with pytest.raises(ValueError, match=r"layer 0 must be a linear or convolution, got GELU\. Was"):
        load_module(nn.Sequential(nn.GELU(), nn.GELU(), nn.GELU(), nn.GELU(), nn.GELU()), folder)
    other = fresh()
    other[0] = nn.Linear(64, 97)
    with pytest.raises(ValueError, match=r"load: .*bare must fit Sequential, got: .*size mismatch for 0\.qweight"):
        load_module(other, folder)
    more = fresh()
    more.append(nn.LayerNorm(16))
    with pytest.raises(ValueError, match=r"must fit Sequential, got: .*Missing key.*5\.weight"):
        load_module(more, folder)


def test_unsaved_buffers_must_be_real(saved):
    _, folder = saved
    with torch.device("meta"):
        module = fresh()
        module.register_buffer("table", torch.empty(3), persistent=False)
    with pytest.raises(ValueError, match=r"Sequential must get every tensor .*got none for table .*Build the module on"):
        load_module(module, folder)


def test_not_a_dqtk_folder(tmp_path, saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"load: folder must hold config\.json and model\.safetensors, got .*nowhere\. Use"):
        load_module(fresh(), tmp_path / "nowhere")
    (folder / "config.json").write_text('{"class": "Sequential"}')
    with pytest.raises(ValueError, match=r"config\.json must hold a quantization_config, got none\. Was the module quantized"):
        load_module(fresh(), folder)
    (folder / "config.json").write_text('{"class": ')
    with pytest.raises(ValueError, match=r"load: .*config\.json must be JSON, got: Expecting value"):
        load_module(fresh(), folder)
    with pytest.raises(ValueError, match=r"load: .*must be JSON"):
        dqtk.load(folder)


def test_load_of_a_bare_folder_says_how(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"must name a diffusers or transformers class.*Fill a bare module with"):
        dqtk.load(folder)


# --- damaged files ---------------------------------------------------------------------------------------------------


def flip_last_byte(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def spoil_metadata(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={DIGESTS: "{"})


def drop_metadata(folder):
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_last_byte, r"model\.safetensors must hold \S+ with digest \w{16}, got another\. The file was damaged or edited\."),
        (truncate, r"model\.safetensors must be a complete safetensors file, got: .*Copy or download it again\."),
        (spoil_metadata, r"must carry dqtk_digests as JSON, got: .*The file was damaged or edited\."),
        (drop_metadata, r"must carry dqtk_digests metadata, got none\. Save the model again with dqtk\."),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"must be a complete safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), r"must be a complete safetensors file, got: .*No such file"),
        (
            lambda f: rewrite(f / "model.safetensors", lambda s: s.pop("0.scale")),
            r"load: files must hold all 12 tensors, got 11: missing 0\.scale and 0 more\. Copy or download the folder again\.",
        ),
        (
            lambda f: rewrite(f / "model.safetensors", lambda s: s.update(extra=torch.zeros(1))),
            r"must hold only tensors of this checkpoint, got extra\. Files of two models are mixed\.",
        ),
        (
            lambda f: rewrite(f / "model.safetensors", lambda s: s["0.scale"].mul_(1.0001)),
            r"must hold 0\.scale with digest \w{16}, got another",
        ),
        (
            lambda f: rewrite(f / "model.safetensors", lambda s: s.update({"0.bias": s["0.bias"].double()})),
            r"must hold 0\.bias with digest \w{16}, got another",
        ),
    ],
)
def test_damaged_files_are_refused(saved, damage, says):
    _, folder = saved
    damage(folder)
    module = fresh()
    with pytest.raises(ValueError, match=says):
        load_module(module, folder)
    assert quantized_layers(module) == {}  # nothing was begun


def test_files_of_two_models_are_not_mixed(saved, bare, tmp_path):
    _, folder = saved
    torch.manual_seed(9)
    other = fresh()
    dqtk.quantize(other, "w8a16", progress=False)
    dqtk.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"must fit Sequential, got: .*(Missing key|size mismatch)"):
        load_module(fresh(), folder)
    for seed in (1, 2):
        state = {name: torch.randn(3, generator=torch.Generator().manual_seed(seed)) for name in ("a", "b")}
        for name in state:
            save_file({name: state[name]}, tmp_path / f"{name}{seed}.safetensors", metadata=file_metadata(state))
    verify_files([tmp_path / "a1.safetensors", tmp_path / "b1.safetensors"], "x")
    with pytest.raises(
        ValueError, match=r"x: .*b2\.safetensors must belong to the same model as the files before it, got another's"
    ):
        verify_files([tmp_path / "a1.safetensors", tmp_path / "b2.safetensors"], "x")


def test_missing_shard_is_noticed(tmp_path):
    state = {"a": torch.ones(2), "b": torch.ones(2)}  # equal contents, not the same tensor
    metadata = file_metadata(state)
    save_file({"a": state["a"]}, tmp_path / "1.safetensors", metadata=metadata)
    save_file({"b": state["b"]}, tmp_path / "2.safetensors", metadata=metadata)
    verify_files([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], "x")
    with pytest.raises(ValueError, match=r"x: files must hold all 2 tensors, got 1: missing b and 0 more\."):
        verify_files([tmp_path / "1.safetensors"], "x")


def test_shared_memory_is_one_tensor_under_two_names(tmp_path):
    tensor = torch.ones(2)
    metadata = file_metadata({"a": tensor, "b": tensor, "part": tensor[:1], "empty": torch.empty(0), "void": torch.empty(0)})
    marks = json.loads(metadata[DIGESTS])
    assert marks["b"] == "=a"
    assert not any(marks[name].startswith("=") for name in ("a", "part", "empty", "void"))
    for name in ("a", "b"):  # hosts choose which name they write
        rest = {"part": tensor[:1].clone(), "empty": torch.empty(0), "void": torch.empty(0)}
        save_file({name: tensor, **rest}, tmp_path / f"{name}.safetensors", metadata=metadata)
        verify_files([tmp_path / f"{name}.safetensors"], "x")


def test_digest_sees_dtype_shape_and_bytes():
    x = torch.arange(6, dtype=torch.int8)
    assert digest(x) == digest(x.clone()) == digest(torch.stack([x, x], 1)[:, 0])
    assert len({digest(x), digest(x.view(2, 3)), digest(x.to(torch.uint8)), digest(x + 1), digest(torch.empty(0))}) == 5
    assert digest(x.float().to(torch.float8_e4m3fn)) != digest(x.to(torch.uint8))


# --- configuration ---------------------------------------------------------------------------------------------------


def test_config_is_that_of_the_layers(saved):
    module, folder = saved
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads(json.dumps(config_of(module, "")))
    assert (config["quant_method"], config["format_version"]) == ("dqtk", 2)
    assert config["modules"] == {"0": "s0", "2": "s1", "4": "s0"}  # 96 channels take groups of 32
    assert read_config(config) == {path: layer.spec for path, layer in quantized_layers(module).items()}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda c: c.update(format_version=3), r"q: format_version must be 2, got 3\. .*pip install -U dqtk"),
        (lambda c: c.pop("format_version"), r"q: format_version must be 2, got None"),
        (lambda c: c["modules"].pop("2"), r"q: hash must be \w{16} for these modules, got '\w{16}'\. The file was edited\."),
        (lambda c: c["modules"].update({"2": "s0"}), r"q: hash must be"),
        (
            lambda c: c["modules"].update({"2": "s7"}),
            r"q: spec of 2 must be one of \['s0', 's1'\], got 's7'\.",
        ),
        (lambda c: c["specs"]["s0"]["weight"]["format"].update(bits=3), r"q: hash must be"),
        (lambda c: c["specs"]["s0"].update(colour=1), r"q\.specs\.s0: LayerSpec: field must be one of .*got 'colour'"),
        (lambda c: c["specs"].update(s0=3), r"q.*(spec of 0 must be one of|must be an object with a type, got 3)"),
        (lambda c: c.pop("specs"), r"q: specs must be a JSON object, got None\. The file was edited\."),
        (lambda c: c.update(modules=[]), r"q: modules must be a JSON object, got \[\]"),
    ],
)
def test_edited_configs_are_refused(saved, edit, says):
    config = copy.deepcopy(config_of(saved[0], "w4a8-rtn"))
    edit(config)
    with pytest.raises(ValueError, match=says):
        read_config(config, "q")


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device"), ValueError("x")])
def test_nothing_is_left_after_a_failure(tmp_path, error):
    def write():
        with written_whole(tmp_path / "deep" / "out") as folder:
            (folder / "half.safetensors").write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert list((tmp_path / "deep").iterdir()) == []


def test_folder_appears_whole(tmp_path):
    (tmp_path / "out").mkdir()  # empty: allowed
    with written_whole(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_relative_and_current_folders(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in ("out", "."):
        if path == ".":
            shutil.rmtree("out")
        with written_whole(path) as folder:
            (folder / "a").write_text("a")
        assert (tmp_path / "here" / ("" if path == "." else path) / "a").is_file()


def test_full_folder_or_file_is_refused_and_untouched(tmp_path, bare):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("p")
    dqtk.quantize(bare, "w8a16", progress=False)
    for path in (tmp_path / "full", tmp_path / "full" / "precious"):
        with pytest.raises(ValueError, match=r"save: folder must be new or empty, got .*\. Nothing was changed; choose"):
            dqtk.save(bare, path)
    with pytest.raises(ValueError, match=r"output: folder must be new or empty"):
        check_output(tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious"]
    assert (tmp_path / "full" / "precious").read_text() == "p"


def test_quantized_layers_are_found_by_path(saved):
    layers = quantized_layers(saved[0])
    assert list(layers) == ["0", "2", "4"]
    assert all(type(layer) is QuantLinear for layer in layers.values())
