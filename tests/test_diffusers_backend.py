"""Quantized pipelines and denoisers through diffusers' own doors: saved, sharded, loaded, dequantized, damaged, refused."""

import json
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers.models.activations import GEGLU, GELU
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dqtk
from dqtk.checkpoint import _hash, digest, quantized_layers
from dqtk.diffusers_backend import FusedGEGLU, FusedGELU
from dqtk.nn import Quantized, QuantLinear
from dqtk.plan import Recipe, Rule
from dqtk.recipes import RECIPES, recipe_named
from dqtk.resolve import call_kwargs_for
from dqtk.spec import from_json, to_json

DTYPES = [torch.float32, torch.bfloat16]


def auto(path, **kwargs):
    return diffusers.AutoModel.from_pretrained(str(path), **kwargs)  # the class takes no Path


def digests(module):
    return {name: digest(tensor) for name, tensor in module.state_dict().items()}


def quantized(pipe, recipe, **kwargs):
    """The pipeline, quantized; calibrated on one prompt and step where the recipe needs it."""
    plan = dqtk.plan(pipe, recipe, **kwargs)
    stats = None
    if plan.needs_stats:
        steps = call_kwargs_for(pipe) | {"num_inference_steps": 1}
        stats = dqtk.calibrate(pipe, ["a small blue cross"], plan, call_kwargs=steps, progress=False)
    return dqtk.quantize(pipe, plan, stats, progress=False)


# --- round trips -----------------------------------------------------------------------------------------------------


SAME = ("vqdm-2bit", "vqdm-4bit", "trellis-2bit", "trellis-4bit")  # as with 3 bits in everything but a number
RECIPES = [recipe for recipe in RECIPES if recipe not in SAME]
LEARNING = [recipe for recipe in RECIPES if recipe_named(recipe).main_spec().needs_inputs]
CASES = [(name, recipe, dtype) for name in ("pixart", "sdxl") for recipe in RECIPES if recipe not in LEARNING for dtype in DTYPES]
CASES += [("pixart", recipe, torch.float32) for recipe in LEARNING]  # what they store differs in nothing else


@pytest.mark.parametrize(("name", "recipe", "dtype"), CASES)
def test_pipeline_comes_back_bit_identical(load_tiny, draw, tmp_path, name, recipe, dtype):
    pipe = load_tiny(name, dtype)
    before = draw(pipe)
    quantized(pipe, recipe, text_encoders="w8a16" if recipe_named(recipe).main_spec().needs_stats else recipe)
    expected = draw(pipe)
    assert torch.isfinite(expected).all()
    assert not torch.equal(expected, before)
    dqtk.save(pipe, tmp_path / "out")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=dtype)
    parts = dqtk.sites.components_of(pipe)
    for part_name, part in dqtk.sites.components_of(loaded).items():
        assert quantized_layers(part).keys() == quantized_layers(parts[part_name]).keys() != set()
        assert digests(part) == digests(parts[part_name])
    assert torch.equal(draw(loaded), expected)


@pytest.fixture(scope="module")
def saved(load_tiny, draw, tmp_path_factory):
    """(folder, latents) of a bf16 pixart, saved by ``pipe.save_pretrained`` itself, the denoiser in shards."""
    pipe = quantized(load_tiny("pixart", torch.bfloat16), "w4a8-rtn", text_encoders="w8a8")
    folder = tmp_path_factory.mktemp("saved") / "pixart-w4a8"
    pipe.save_pretrained(folder, max_shard_size="400KB")
    return folder, draw(pipe)


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of the folder to damage, and a function that tries to load it."""
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_shards(saved, draw):
    folder, expected = saved
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 3
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("door", ["class", "AutoModel", "load", "load_pipeline", "subfolder"])
def test_every_door_opens(saved, load_tiny, draw, door):
    folder, expected = saved
    if door == "load_pipeline":
        pipe = dqtk.load(folder, dtype=torch.bfloat16)
    else:
        part, dtype = folder / "transformer", {"dtype": torch.bfloat16}
        model = {
            "class": lambda: diffusers.PixArtTransformer2DModel.from_pretrained(part, **dtype),
            "AutoModel": lambda: auto(part, **dtype),
            "load": lambda: dqtk.load(part, **dtype),
            "subfolder": lambda: auto(folder, subfolder="transformer", **dtype),
        }[door]()
        pipe = diffusers.PixArtSigmaPipeline.from_pretrained(folder, transformer=model, dtype=torch.bfloat16)
    assert torch.equal(draw(pipe), expected)


@pytest.mark.parametrize("order", ["import dqtk, diffusers", "import diffusers, dqtk"])
def test_both_import_orders(saved, tmp_path, order):
    """In a new process: whichever comes first, ``from_pretrained`` finds the quantizers of both libraries."""
    folder, expected = saved
    script = f"""
{order}
import torch
from dqtk.resolve import call_kwargs_for
from dqtk.spec import from_json, to_json
pipe = diffusers.DiffusionPipeline.from_pretrained({str(folder)!r}, dtype=torch.bfloat16)
options = call_kwargs_for(pipe) | dict(num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(3))
torch.save(pipe("a large red circle on a plain blue background", **options).images, {str(tmp_path / "latents.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "latents.pt", weights_only=True), expected)


# --- scales keep their bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_not_rounded_by_loading(load_tiny, tmp_path, dtype):
    """diffusers casts floating tensors to the load dtype before the quantizer sees them."""
    model = quantized(load_tiny("pixart"), "w8a16").transformer
    layer = next(iter(quantized_layers(model).values()))
    layer.scale.fill_(1.2345678)
    model.save_pretrained(tmp_path / "m")
    loaded = auto(tmp_path / "m", dtype=dtype)
    got = next(iter(quantized_layers(loaded).values()))
    assert got.scale.dtype == torch.float32
    assert torch.equal(got.scale, torch.full_like(layer.scale, 1.2345678))
    assert got.compute_dtype == dtype
    assert {t.dtype for _, t in loaded.named_parameters()} == {dtype}


def test_disk_offload_while_loading_is_refused(saved):
    with pytest.raises(ValueError, match=r"device_map must place quantized layers in memory, got 'disk'\. Load on the CPU"):
        auto(saved[0] / "transformer", device_map={"": "disk"})


# --- configuration and saving ----------------------------------------------------------------------------------------


def test_config_survives(saved, load_tiny, tmp_path):
    folder, _ = saved
    stored = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format_version"], stored["recipe"]) == ("dqtk", 2, "w4a8-rtn, text encoders w8a8")
    model = auto(folder / "transformer")
    model.save_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == stored
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == stored
    again = auto(tmp_path / "again")
    assert digests(again) == digests(model)


def test_config_satisfies_the_ecosystem(saved):
    """What diffusers' own quantization tests ask of a config."""
    model = auto(saved[0] / "transformer")
    config = model.hf_quantizer.quantization_config
    assert "quantization_config" in model.config
    assert config.quant_method.value == "dqtk"
    assert config.to_diff_dict() == config.to_dict()
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert type(config).from_dict({**config.to_dict(), "added_by_somebody": 1}).fields["added_by_somebody"] == 1
    assert "w4a8-rtn" in repr(config)
    assert model.hf_quantizer.is_serializable is True
    assert model.hf_quantizer.is_trainable is False
    assert model.hf_quantizer.is_compileable is True


@pytest.mark.parametrize("fresh", [True, False])
def test_dequantize_gives_an_ordinary_model(load_tiny, draw, tmp_path, saved, fresh):
    if fresh:
        pipe = quantized(load_tiny("pixart"), "w4a16")
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(saved[0], dtype=torch.bfloat16)
        before = {path: layer.dequantize() for path, layer in quantized_layers(pipe.transformer).items()}
    expected = draw(pipe)
    pipe.transformer.dequantize()
    assert quantized_layers(pipe.transformer) == {}
    assert {type(layer) for _, layer in pipe.transformer.named_modules() if hasattr(layer, "in_features")} == {torch.nn.Linear}
    if fresh:
        torch.testing.assert_close(draw(pipe), expected)
    else:
        assert all(torch.equal(pipe.transformer.get_submodule(path).weight, weight) for path, weight in before.items())
    pipe.transformer.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain = auto(tmp_path / "plain", dtype=pipe.transformer.dtype)
    assert digests(plain) == digests(pipe.transformer)


# --- activations in the kernel of the layer before them ---------------------------------------------------------------


def feed_forwards(module):
    return [part for part in module.modules() if isinstance(part, GELU | GEGLU)]


@pytest.mark.parametrize("name", ["pixart", "sdxl"])
def test_activations_are_fused_where_nobody_looks_in_between(load_tiny, draw, tmp_path, name, monkeypatch):
    """In memory and loaded; hooks on the projection see what they always saw; dequantizing gives diffusers' own classes back."""
    pipe = quantized(load_tiny(name), "w8a8")
    module = getattr(pipe, "transformer", None) or pipe.unet
    fused = feed_forwards(module)
    assert fused
    assert {type(part) for part in fused} <= {FusedGELU, FusedGEGLU}
    asked = []
    forward = QuantLinear.forward

    def watched(self, x, activation="none", active_from=0):
        asked.append(activation)
        return forward(self, x, activation, active_from)

    monkeypatch.setattr(QuantLinear, "forward", watched)
    picture = draw(pipe)
    assert len([name for name in asked if name != "none"]) >= len(fused)
    seen, asked[:] = [], []
    hooks = [
        part.proj.register_forward_hook(lambda layer, args, y: seen.append(y.shape[-1] == layer.out_features)) for part in fused
    ]
    hooked = draw(pipe)
    assert set(asked) == {"none"}
    assert all(seen)
    assert (picture - hooked).abs().max() < 0.02
    for hook in hooks:
        hook.remove()
    dqtk.save(pipe, tmp_path / "out")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    again = getattr(loaded, "transformer", None) or loaded.unet
    assert [type(part) for part in feed_forwards(again)] == [type(part) for part in fused]
    again.dequantize()
    assert {type(part) for part in feed_forwards(again)} <= {GELU, GEGLU}
    assert torch.isfinite(draw(loaded)).all()


def test_interrupted_quantize_is_still_true(load_tiny, draw, tmp_path, monkeypatch):
    pipe = load_tiny("pixart")
    module = sys.modules["dqtk.stages"]
    calls, solve = [], module.solve_site

    def interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return solve(*args, **kwargs)

    monkeypatch.setattr(module, "solve_site", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dqtk.quantize(pipe, "w8a8", progress=False)
    assert len(quantized_layers(pipe.transformer)) == 19
    expected = draw(pipe)
    dqtk.save(pipe, tmp_path / "part")
    loaded = dqtk.load(tmp_path / "part")
    assert len(quantized_layers(loaded.transformer)) == 19
    assert torch.equal(draw(loaded), expected)


def test_interrupted_save_leaves_nothing(load_tiny, tmp_path, monkeypatch):
    pipe = quantized(load_tiny("pixart"), "w8a8")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dqtk.save(pipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- damaged folders -------------------------------------------------------------------------------------------------


def shard(folder, number=1):
    return sorted((folder / "transformer").glob("*.safetensors"))[number]


def edit_config(change):
    def damage(folder):
        file = folder / "transformer" / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))

    return damage


def edit_shard(change):
    def damage(folder):
        with safe_open(shard(folder), framework="pt") as file:
            metadata = file.metadata()
        state = load_file(shard(folder))
        change(state)
        save_file(state, shard(folder), metadata=metadata)

    return damage


def flip_byte(folder):
    content = bytearray(shard(folder).read_bytes())
    content[-100] ^= 4
    shard(folder).write_bytes(content)


def mix(folder):
    """A file of another component."""
    shutil.copy(next((folder / "text_encoder").glob("*.safetensors")), shard(folder))


def drop_first_scale(state):
    state.pop(next(name for name in state if name.endswith(".scale")))


def halve_first_scale(state):
    state[next(name for name in state if name.endswith(".scale"))] *= 0.5


DAMAGES = {
    "edited byte": (flip_byte, r"must hold \S+ with digest \w{16}, got another\. The file was damaged or edited\."),
    "edited tensor": (edit_shard(halve_first_scale), r"must hold \S+\.scale with digest"),
    "missing tensor": (edit_shard(drop_first_scale), r"files must hold all \d+ tensors, got \d+: missing \S+\.scale and 0 more\."),
    "extra tensor": (edit_shard(lambda s: s.update(more=torch.ones(1))), r"must hold only tensors of this checkpoint, got more\."),
    "truncated": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-9]),
        r"must be a complete safetensors file, got: .*Copy or",
    ),
    "mixed files": (mix, r"must belong to the same model as the files before it, got another's\. Files of"),
    "newer format": (
        edit_config(lambda c: c["quantization_config"].update(format_version=3)),
        r"quantization_config: format_version must be 2, got 3\. .*pip install -U dqtk",
    ),
    "edited modules": (
        edit_config(lambda c: c["quantization_config"]["modules"].popitem()),
        r"quantization_config: hash must be \w{16} for these modules, got '\w{16}'\. The file was edited\.",
    ),
    "edited architecture": (
        edit_config(lambda c: c.update(num_layers=5)),
        r"transformer_blocks\.5\.\S+ must exist in PixArt",
    ),
    "edited width": (edit_config(lambda c: c.update(caption_channels=64)), r"caption_projection\.linear_1\.weight expected shape"),
    "fewer layers stored": (
        edit_config(lambda c: c.update(num_layers=7)),
        r"must hold every tensor of PixArt.*got none for",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folder_is_refused(copied, kind):
    damage, says = DAMAGES[kind]
    damage(copied)
    with pytest.raises(ValueError, match=says):
        diffusers.DiffusionPipeline.from_pretrained(copied, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"load: {copied} must be complete and readable, got: .*{says}"):
        dqtk.load(copied, dtype=torch.bfloat16)


def test_missing_shard(copied):
    shard(copied).unlink()
    with pytest.raises(ValueError, match=r"load: .* must be complete and readable, got: .*safetensors"):
        dqtk.load(copied)


def test_codes_of_another_width_are_refused(copied):
    """The weights are whole and so is the config, yet they belong to different models."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(copied)
    eight = to_json(recipe_named("w8a16").main_spec())
    config = pipe.transformer.config["quantization_config"].to_dict()
    specs = dict.fromkeys(config["specs"], eight)
    config = {**config, "specs": specs, "hash": _hash(dict.fromkeys(config["modules"], from_json(eight)))}
    edit_config(lambda c: c.update(quantization_config=config))(copied)
    with pytest.raises(ValueError, match=r"from_pretrained: \S+\.qweight must have shape \(.*Config and weights belong to"):
        auto(copied / "transformer")


# --- runtime layers inside other families, nothing kept ---------------------------------------------------------------


SMALL = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32}


def wan():
    return diffusers.WanTransformer3DModel(**SMALL, ffn_dim=96, num_layers=2, rope_max_seq_len=32)


def skyreels():
    return diffusers.SkyReelsV2Transformer3DModel(**SMALL, ffn_dim=96, num_layers=2, rope_max_seq_len=32)


def z_image():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 32, 32],
    )


def run(model):
    """One forward pass of a family on fixed inputs, as one tensor."""
    noise = torch.Generator().manual_seed(1)
    dtype = model.dtype
    text = torch.randn(2, 7, 32, generator=noise).to(dtype)
    if isinstance(model, diffusers.ZImageTransformer2DModel):
        x = torch.randn(2, 4, 1, 8, 8, generator=noise).to(dtype)
        return torch.stack(model(list(x), torch.tensor([0.3, 0.3]), list(text), return_dict=False)[0])
    x = torch.randn(2, 4, 3, 8, 8, generator=noise).to(dtype)
    return model(x, torch.tensor([300, 300]), text, return_dict=False)[0]


@pytest.mark.parametrize("family", [wan, skyreels, z_image])
@pytest.mark.parametrize(("recipe", "limit"), [("w8a8", 0.05), ("w8a16", 0.05), ("w4a8-rtn", 0.6), ("w4a16", 0.6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_empty_keep_list(family, recipe, limit, dtype, tmp_path):
    """Time embedders and their kin read ``weight.dtype`` and cast to it: nothing must break when they are packed."""
    torch.manual_seed(0)
    family().save_pretrained(tmp_path / "plain")
    model = auto(tmp_path / "plain", dtype=dtype)
    with torch.no_grad():
        exact = run(model).float()
        everything = Recipe(name="everything", rules=(Rule(spec=recipe_named(recipe).main_spec(), why="all"),))
        plan = dqtk.plan(model, everything)
        assert all(choice.spec is not None for choice in plan.choices)
        dqtk.quantize(model, plan, progress=False)
        assert all(isinstance(model.get_submodule(choice.site.path), Quantized) for choice in plan.choices)
        got = run(model)
        assert ((got.float() - exact).norm() / exact.norm()) < limit
        model.save_pretrained(tmp_path / "quantized")
        loaded = auto(tmp_path / "quantized", dtype=dtype)
        assert digests(loaded) == digests(model)
        assert torch.equal(run(loaded), got)
