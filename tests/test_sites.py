"""Sites and roles: the published denoisers on the meta device, text encoders, and what cannot be quantized."""

import json
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from torch import nn

import dqtk
from dqtk.resolve import adapters
from dqtk.sites import ROLES, components_of, find_sites, meta

CONFIGS = Path(__file__).parent / "data" / "model_configs"
# name: (parameters in millions, sites), seen with diffusers 0.42.1
COUNTS = {
    "cogvideox-5b": (5570, 342),
    "dit-xl-2-256": (750, 255),
    "flux.1-dev": (11901, 504),
    "hunyuanvideo": (12821, 548),
    "ltx-video-2b": (1923, 287),
    "pixart-sigma-xl-2-1024-ms": (611, 287),
    "qwen-image": (20430, 846),
    "sd3.5-medium": (2243, 393),
    "sdxl-base-1.0": (2567, 794),
    "stable-diffusion-v1-5": (860, 282),
    "wan2.1-t2v-1.3b": (1419, 307),
    "wan2.1-t2v-14b": (14288, 407),
}
ATTENTION = {f"{kind}_attn.{part}": 0 for kind in ("self", "cross") for part in ("q", "k", "v", "out")}
GOLDEN_ROLES = {
    "sdxl-base-1.0": {
        **dict.fromkeys(ATTENTION, 70),
        "ff.up": 70,
        "ff.down": 70,
        "block_in": 11,
        "block_out": 11,
        "conv": 34,
        "shortcut_conv": 11,
        "downsampler": 2,
        "upsampler": 2,
        "modulation": 17,
        "time_embedding": 4,
        "patch_embedding": 1,
        "output_projection": 1,
    },
    "flux.1-dev": {
        "self_attn.q": 76,
        "self_attn.k": 76,
        "self_attn.v": 76,
        "self_attn.out": 38,
        "ff.up": 76,
        "ff.down": 76,
        "modulation": 77,
        "time_embedding": 6,
        "text_projection": 1,
        "patch_embedding": 1,
        "output_projection": 1,
    },
    "pixart-sigma-xl-2-1024-ms": {
        **dict.fromkeys(ATTENTION, 28),
        "ff.up": 28,
        "ff.down": 28,
        "modulation": 1,
        "time_embedding": 2,
        "text_projection": 2,
        "patch_embedding": 1,
        "output_projection": 1,
    },
    "wan2.1-t2v-1.3b": {
        **dict.fromkeys(ATTENTION, 30),
        "ff.up": 30,
        "ff.down": 30,
        "modulation": 1,
        "time_embedding": 2,
        "text_projection": 2,
        "patch_embedding": 1,
        "output_projection": 1,
    },
    "sd3.5-medium": {
        "self_attn.q": 61,  # 24 blocks x 2 streams + 13 second attentions, all joint or self
        "self_attn.k": 61,
        "self_attn.v": 61,
        "self_attn.out": 60,  # the last block has no text output
        "ff.up": 47,
        "ff.down": 47,
        "modulation": 49,
        "time_embedding": 4,
        "text_projection": 1,
        "patch_embedding": 1,
        "output_projection": 1,
    },
}


@pytest.fixture(scope="module")
def published():
    """Every published denoiser on the meta device, by file name."""
    found = {}
    for file in sorted(CONFIGS.glob("*.json")):
        config = json.loads(file.read_text())
        found[file.stem] = meta(getattr(diffusers, config["_class_name"]).from_config, config)
    return found


def sites_of(module):
    return find_sites(module, "model", adapters().get(type(module).__name__))


def test_all_twelve_configs_are_here(published):
    assert set(published) == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_published_denoiser_plans(published, name):
    module, (millions, num_sites) = published[name], COUNTS[name]
    sites = sites_of(module)
    assert len(sites) == num_sites
    assert round(sum(p.numel() for p in module.parameters()) / 1e6) == pytest.approx(millions, abs=1)
    assert [site.id for site in sites if site.role == "other"] == []
    assert [site.id for site in sites if site.unsupported] == []
    assert {site.role for site in sites} <= set(ROLES)
    for recipe, limit in {"w8a8": 0.53, "w4a8-rtn": 0.40, "w4a16": 0.40}.items():
        plan = dqtk.plan(module, recipe)
        assert [choice.site for choice in plan.choices] == sites
        size = plan.sizes("model")
        assert size["quantized_share"] >= 0.95, recipe
        assert size["bytes_after"] / size["bytes_before"] <= limit, recipe


@pytest.mark.parametrize("name", GOLDEN_ROLES)
def test_golden_roles(published, name):
    assert Counter(site.role for site in sites_of(published[name])) == GOLDEN_ROLES[name]


def test_every_site_sits_where_its_shape_says(published):
    module = published["sdxl-base-1.0"]
    by_path = {site.path: site for site in sites_of(module)}
    conv = by_path["up_blocks.0.resnets.0.conv_shortcut"]
    assert (conv.kind, conv.shape, conv.n, conv.k, conv.channels, conv.bias) == ("conv", (1280, 2560, 1, 1), 1280, 2560, 2560, True)
    conv = by_path["conv_in"]
    assert (conv.shape, conv.k, conv.channels, conv.num_weights) == ((320, 4, 3, 3), 36, 4, 11520)
    to_q = by_path["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert (to_q.kind, to_q.shape, to_q.bias) == ("linear", (1280, 1280), False)
    assert (to_q.component, to_q.path) == ("model", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")


@pytest.mark.parametrize(
    ("name", "path", "together"),
    [
        ("sdxl-base-1.0", "mid_block.attentions.0.transformer_blocks.0.attn1", ["to_q", "to_k", "to_v"]),
        ("sdxl-base-1.0", "mid_block.attentions.0.transformer_blocks.0.attn2", ["to_k", "to_v"]),
        ("flux.1-dev", "transformer_blocks.3.attn", ["to_q", "to_k", "to_v"]),
        ("sd3.5-medium", "transformer_blocks.0.attn2", ["to_q", "to_k", "to_v"]),
        ("wan2.1-t2v-1.3b", "blocks.7.attn2", ["to_k", "to_v"]),
    ],
)
def test_projections_that_share_their_input(published, name, path, together):
    groups: dict[str, list[str]] = {}
    for site in sites_of(published[name]):
        if site.shared_input:
            groups.setdefault(site.shared_input, []).append(site.path)
    mine = next(paths for paths in groups.values() if f"{path}.{together[-1]}" in paths)
    assert sorted(mine) == sorted(f"{path}.{part}" for part in together)


def test_text_and_image_streams_of_joint_attention_do_not_share(published):
    sites = {site.path: site.shared_input for site in sites_of(published["flux.1-dev"])}
    image, text = sites["transformer_blocks.0.attn.to_k"], sites["transformer_blocks.0.attn.add_k_proj"]
    assert None not in (image, text)
    assert image != text
    assert sites["transformer_blocks.0.attn.to_out.0"] is None


# --- text encoders ---------------------------------------------------------------------------------------------------


def clip():
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=8
    )
    return transformers.CLIPTextModelWithProjection(config)


def t5(kind=transformers.T5EncoderModel, config=transformers.T5Config):
    return kind(config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))


def umt5():
    return t5(transformers.UMT5EncoderModel, transformers.UMT5Config)


@pytest.mark.parametrize(("make", "ups"), [(clip, 1), (t5, 2), (umt5, 2)])
def test_text_encoders_have_roles(make, ups):
    sites = find_sites(meta(make), "text_encoder")
    roles = Counter(site.role for site in sites)
    expected = {f"self_attn.{part}": 2 for part in ("q", "k", "v", "out")} | {"ff.up": 2 * ups, "ff.down": 2}
    assert {role: roles[role] for role in expected} == expected
    assert set(roles) - set(expected) <= {"text_projection"}
    shared = Counter(site.shared_input for site in sites if site.shared_input)
    assert sorted(shared.values()) == sorted([3, 3] + [2, 2] * (ups == 2))  # q, k, v; gate and up


# --- what cannot be quantized ----------------------------------------------------------------------------------------


class Odd(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_unsupported_layers_are_named_with_their_reason():
    module = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "odd": Odd(8, 8),
            "grouped": nn.Conv2d(8, 8, 3, groups=4),
            "reflected": nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect"),
            "same": nn.Conv2d(8, 8, 3, padding="same"),
            "attention": nn.MultiheadAttention(8, 2),
        }
    )
    assert {site.path: site.unsupported for site in find_sites(module)} == {
        "plain": None,
        "odd": "layer class Odd has its own forward",
        "grouped": "grouped convolution (groups=4)",
        "reflected": "padding 'reflect', (1,) (only zeros, given as numbers)",
        "same": "padding 'zeros', 'same' (only zeros, given as numbers)",
        "attention.out_proj": "layer class NonDynamicallyQuantizableLinear has its own forward",
    }


def test_tied_weights_are_left_alone():
    module = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    module["head"].weight = module["embed"].weight
    module["b"].weight = module["a"].weight
    module["again"] = module["a"]
    reasons = {site.path: site.unsupported for site in find_sites(module)}
    assert reasons["head"] == "weight is tied to embed.weight"
    assert reasons["b"] == "weight is tied to a.weight"
    assert reasons["a"].startswith("weight is tied to ")


def test_the_whole_model_cannot_be_replaced():
    (site,) = find_sites(nn.Linear(64, 64))
    assert site.unsupported == "it is the whole model, which cannot be replaced in place"
    with pytest.raises(ValueError, match=r"got 1 sites: not supported: it is the whole model"):
        dqtk.plan(nn.Linear(64, 64), "w8a8")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Odd(64, 64), "layer class Odd has its own forward"),
        (nn.Conv2d(64, 64, 3, groups=2), r"grouped convolution \(groups=2\)"),
    ],
)
def test_recipes_skip_them_and_explicit_wishes_are_errors(layer, reason):
    module = nn.ModuleDict({"fine": nn.Linear(64, 64), "hard": layer})
    why = {choice.site.path: (choice.spec, choice.why) for choice in dqtk.plan(module, "w8a8").choices}
    assert why["fine"][0] is not None
    assert why["hard"][0] is None
    assert why["hard"][1].startswith("not supported: ")
    with pytest.raises(ValueError, match=rf"plan: model:hard must be an ordinary linear or convolution .*got: {reason}\. Keep it"):
        dqtk.plan(module, "w8a8", overrides={"hard": "w8a16"})
    assert dqtk.plan(module, "w8a8", overrides={"hard": None}).choices[1].why == "kept by request"


# --- components and adapters -----------------------------------------------------------------------------------------


def test_components_are_denoisers_and_text_encoders(load_tiny):
    assert list(components_of(load_tiny("sdxl"))) == ["text_encoder", "text_encoder_2", "unet"]
    layer = nn.Linear(2, 2)
    assert components_of(layer) == {"model": layer}


def test_components_of_anything_else():
    with pytest.raises(ValueError, match=r"target must be a diffusers pipeline or an nn.Module, got str\. Load it with"):
        components_of("tiny-pixart")
    pipe = type("Pipe", (), {"components": {"vae": nn.Linear(2, 2), "scheduler": 1}})()
    with pytest.raises(ValueError, match=r"pipeline must have a denoiser .*, got \['scheduler', 'vae'\]\. Pass the module itself"):
        components_of(pipe)


def test_adapter_corrects_roles_first_match_wins():
    module = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    adapter = dqtk.Adapter(classes=("ModuleDict",), roles=(("a", "ff.up"), ("*", "modulation")))
    assert [site.role for site in find_sites(module, adapter=adapter)] == ["ff.up", "modulation"]


def test_meta_builds_without_memory():
    module = meta(nn.Linear, 10**6, 10**6)
    assert module.weight.device == torch.device("meta")
