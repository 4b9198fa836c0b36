"""Quantized text encoders through transformers' own doors, with nothing kept; T5's feed-forward reads ``wo.weight.dtype``."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import dqtk
from dqtk.checkpoint import digest, quantized_layers
from dqtk.nn import Quantized
from dqtk.plan import Recipe, Rule
from dqtk.recipes import recipe_named
from dqtk.transformers_backend import DqtkTextConfig

TOKENS = torch.tensor([[5, 7, 11, 13, 2, 1, 1, 1], [3, 4, 5, 6, 7, 8, 9, 2]])


def t5():
    sizes = {"vocab_size": 50, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-gelu"))


def clip():
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**sizes, max_position_embeddings=8, projection_dim=32, eos_token_id=2)
    )


def everything(recipe):
    return Recipe(name=recipe, rules=(Rule(spec=recipe_named(recipe).main_spec(), why="nothing is kept"),))


def digests(module):
    return {name: digest(tensor) for name, tensor in module.state_dict().items()}


def output(model):
    with torch.no_grad():
        return model(TOKENS).last_hidden_state


@pytest.fixture
def plain(tmp_path):
    """Function (maker, dtype) -> a model loaded as users do, so that buffers have the dtype that loading gives them."""

    def load(make, dtype=torch.float32):
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / make.__name__)
        return type(make()).from_pretrained(tmp_path / make.__name__, dtype=dtype)

    return load


@pytest.mark.parametrize("make", [t5, clip])
@pytest.mark.parametrize(("recipe", "limit"), [("w8a8", 0.05), ("w8a16", 0.05), ("w4a8-rtn", 0.5), ("w4a16", 0.5), ("fp8", 0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_empty_keep_list(make, recipe, limit, dtype, plain, tmp_path):
    model = plain(make, dtype)
    exact = output(model)
    plan = dqtk.plan(model, everything(recipe))
    assert all(choice.spec is not None for choice in plan.choices)
    dqtk.quantize(model, plan, progress=False)
    got = output(model)
    assert got.dtype == exact.dtype == dtype
    assert (got.float() - exact.float()).norm() / exact.float().norm() < limit
    model.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) >= 2
    loaded = type(model).from_pretrained(tmp_path / "q", dtype=dtype)
    assert digests(loaded) == digests(model)
    assert torch.equal(output(loaded), got)
    assert torch.equal(output(dqtk.load(tmp_path / "q", dtype=dtype)), got)


def test_t5_wo_keeps_its_compute_dtype(plain):
    """T5 casts the feed-forward's hidden states to ``wo.weight.dtype`` unless it is int8: it must be the compute dtype."""
    model = plain(t5, torch.bfloat16)
    dqtk.quantize(model, everything("w8a8"), progress=False)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, Quantized)
    seen = []
    wo.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    output(model)
    assert seen == [wo.weight.dtype]
    assert wo.weight.dtype == wo.compute_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_are_not_rounded_by_loading(plain, tmp_path, dtype):
    model = plain(t5)
    dqtk.quantize(model, everything("w8a16"), progress=False)
    for layer in quantized_layers(model).values():
        layer.scale.fill_(1.2345678)
    model.save_pretrained(tmp_path / "q")
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path / "q", dtype=dtype)
    for layer in quantized_layers(loaded).values():
        assert torch.equal(layer.scale, torch.full_like(layer.scale, 1.2345678))
    assert loaded.dtype == dtype


def test_config_survives_and_is_true(plain, tmp_path):
    model = plain(clip)
    dqtk.quantize(model, dqtk.plan(model, "w4a8-rtn"), progress=False)
    model.save_pretrained(tmp_path / "q")
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["recipe"]) == ("dqtk", "w4a8-rtn")
    loaded = type(model).from_pretrained(tmp_path / "q")
    config = loaded.hf_quantizer.quantization_config
    assert config.to_dict() == config.to_diff_dict() == stored
    assert "w4a8-rtn" in repr(config)
    assert DqtkTextConfig.from_dict({**stored, "new": 1}, return_unused_kwargs=True, other=2)[1] == {"other": 2}
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"] == stored
    assert digests(type(model).from_pretrained(tmp_path / "again")) == digests(model)


def test_checkpoints_with_older_names(tmp_path):
    """The published SD and SDXL text encoders: files say ``text_model.``; transformers 5 drops and restores the prefix."""
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(clip().config)
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    model = transformers.CLIPTextModel.from_pretrained(tmp_path / "old")
    dqtk.quantize(model, everything("w4a8-rtn"), progress=False)
    model.save_pretrained(tmp_path / "q")
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "q" / "model.safetensors"))
    loaded = transformers.CLIPTextModel.from_pretrained(tmp_path / "q")
    assert digests(loaded) == digests(model)
    assert torch.equal(output(loaded), output(model))


def test_embedding_with_two_names_is_written_once(plain, tmp_path):
    model = plain(t5)
    dqtk.quantize(model, everything("w8a16"), progress=False)
    names = {name for name in model.state_dict() if "shared" in name or "embed_tokens" in name}
    assert len(names) == 2
    model.save_pretrained(tmp_path / "q")
    written = set(load_file(tmp_path / "q" / "model.safetensors"))
    assert len(names & written) == 1
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path / "q")
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    assert torch.equal(loaded.shared.weight, model.shared.weight)


def test_dequantize_gives_an_ordinary_model(plain, tmp_path):
    model = plain(t5)
    dqtk.quantize(model, everything("w4a16"), progress=False)
    expected = output(model)
    model.dequantize()
    assert quantized_layers(model) == {}
    torch.testing.assert_close(output(model), expected)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert digests(transformers.T5EncoderModel.from_pretrained(tmp_path / "plain")) == digests(model)


# --- damage ----------------------------------------------------------------------------------------------------------


def rewrite(folder, edit):
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata=metadata)


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def newer(config):
    config["quantization_config"]["format_version"] = 3


WO = "encoder.block.1.layer.1.DenseReluDense.wo"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: rewrite(f, lambda s: s.pop(f"{WO}.scale")), rf"files must hold all \d+ tensors, got \d+: missing {WO}\.scale"),
        (lambda f: rewrite(f, lambda s: s[f"{WO}.scale"].mul_(2)), rf"must hold {WO}\.scale with digest \w{{16}}, got another"),
        (lambda f: rewrite(f, lambda s: s.update(more=torch.ones(1))), r"must hold only tensors of this checkpoint, got more\."),
        (lambda f: edit_config(f, newer), r"quantization_config: format_version must be 2, got 3\."),
        (
            lambda f: edit_config(f, lambda c: c.update(num_layers=3)),
            r"must hold every tensor of T5EncoderModel, got none for \S+2\.",
        ),
        (
            lambda f: edit_config(f, lambda c: c.update(num_layers=1)),
            r"layer encoder\.block\.1\S* must exist in T5",
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), r"(complete safetensors file|header|deserializ)"),
    ],
)
def test_damaged_folder_is_refused(plain, tmp_path, damage, says):
    """transformers only warns about missing and unexpected tensors, and fills in random numbers."""
    model = plain(t5)
    dqtk.quantize(model, everything("w8a8"), progress=False)
    model.save_pretrained(tmp_path / "q")
    damage(tmp_path / "q")
    with pytest.raises(ValueError, match=rf"load: .* must be complete and readable, got: .*{says}"):
        dqtk.load(tmp_path / "q")
    with pytest.raises((ValueError, OSError), match=says):
        transformers.T5EncoderModel.from_pretrained(tmp_path / "q")
