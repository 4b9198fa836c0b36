"""The main path in memory: what is replaced and by what, calibration on the way, ordinary pipelines of other families."""

import json
import sys

import diffusers
import pytest
import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import dqtk
from dqtk.checkpoint import digest, quantized_layers
from dqtk.hosts import backend_of
from dqtk.installed import installed_plan, num_parameters, summary
from dqtk.nn import Quantized
from dqtk.recipes import RECIPES, recipe_named
from dqtk.resolve import call_kwargs_for


@pytest.mark.parametrize("recipe", ["w8a16", "w8a8", "w4a16", "w4a8-rtn", "fp8"])
def test_exactly_the_planned_layers_are_replaced(bare, recipe):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    exact = bare(x)
    plan = dqtk.plan(bare, recipe, overrides={"2": None})
    kept = bare[2]
    assert dqtk.quantize(bare, plan, progress=False) is bare
    assert list(quantized_layers(bare)) == ["0", "4"]
    assert bare[2] is kept
    for choice in plan.choices:
        layer = bare.get_submodule(choice.site.path)
        assert getattr(layer, "spec", None) == choice.spec
        assert layer.weight.shape == choice.site.shape
    error = (bare(x) - exact).norm() / exact.norm()
    assert error < (0.2 if "4" in recipe else 0.06)


def test_recipe_by_name_plans_first(bare):
    dqtk.quantize(bare, "w8a8", progress=False)
    assert len(quantized_layers(bare)) == 3


def test_mode_and_dtype_are_kept():
    model = nn.ModuleDict({"a": nn.Linear(64, 64, dtype=torch.bfloat16), "b": nn.Linear(64, 64, bias=False).eval()})
    dqtk.quantize(model, "w8a8", progress=False)
    assert (model["a"].training, model["b"].training) == (True, False)
    assert (model["a"].compute_dtype, model["b"].compute_dtype) == (torch.bfloat16, torch.float32)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_one_layer_at_a_time(bare, monkeypatch):
    """The weight of a replaced layer is gone before the next is read: the peak is one layer above the model."""
    module, seen = sys.modules["dqtk.stages"], []
    solve = module.solve_site

    def watch(*args, **kwargs):
        seen.append([isinstance(bare[i], Quantized) for i in (0, 2, 4)])
        return solve(*args, **kwargs)

    monkeypatch.setattr(module, "solve_site", watch)
    dqtk.quantize(bare, "w8a16", progress=False)
    assert seen == [[False, False, False], [True, False, False], [True, True, False]]


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "w4a8-rtn"])
def test_peak_memory_is_one_layer_above_the_model(recipe, tmp_path):
    """What torch allocates at any moment, from its own allocation events; a layer is 8 MB of bf16."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = nn.Sequential(*(nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(3)))
        with record_function("model is there"):
            dqtk.quantize(model, recipe, progress=False)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event.get("name") == "model is there")
    allocated = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
    before = max(entry for entry in allocated if entry[0] <= start)[1]
    layer = 2048 * 2048 * 2
    assert 0.4 * layer < max(total for ts, total in allocated if ts > start) - before < 1.1 * layer


def test_prompts_calibrate_on_the_way(load_tiny, draw):
    kwargs = {"num_inference_steps": 1}
    first, second = load_tiny("pixart"), load_tiny("pixart")
    plan = dqtk.plan(first, "w8a8-static")
    options = call_kwargs_for(first) | kwargs
    dqtk.quantize(first, plan, prompts=["a red circle"], call_kwargs=options, progress=False)
    stats = dqtk.calibrate(second, ["a red circle"], plan, call_kwargs=options, progress=False)
    dqtk.quantize(second, plan, stats, progress=False)
    one, two = ({n: digest(t) for n, t in pipe.transformer.state_dict().items()} for pipe in (first, second))
    assert one == two
    assert torch.equal(draw(first), draw(second))


def test_two_passes_add_up(load_tiny, tmp_path):
    """Denoiser first, text encoder later; or one more layer later: the second plan concerns what is left."""
    pipe = load_tiny("pixart")
    dqtk.quantize(pipe, dqtk.plan(pipe, "w8a8", overrides={"*.attn1.*": None}), progress=False)
    before = set(quantized_layers(pipe.transformer))
    dqtk.quantize(pipe, dqtk.plan(pipe, "w4a16", text_encoders="w8a16"), progress=False)
    after = quantized_layers(pipe.transformer)
    assert before < set(after)
    assert {layer.spec.weight.bits for path, layer in after.items() if ".attn1." in path} == {4}
    dqtk.save(pipe, tmp_path / "q")
    loaded = dqtk.load(tmp_path / "q")
    assert {path: layer.spec for path, layer in quantized_layers(loaded.transformer).items()} == {
        p: v.spec for p, v in after.items()
    }


def test_installed_plan_is_what_the_layers_are(load_tiny):
    pipe = load_tiny("sdxl")
    assert summary(pipe) is None
    assert installed_plan(pipe).components == ()
    counts = {name: num_parameters(part) for name, part in dqtk.sites.components_of(pipe).items()}
    plan = dqtk.plan(pipe, "w4a8-rtn", text_encoders="w8a16")
    dqtk.quantize(pipe, plan, progress=False)
    found = installed_plan(pipe)
    assert found.recipe == plan.recipe
    assert {c.site.id: c.spec for c in found.choices} == {c.site.id: c.spec for c in plan.choices}
    assert {c.name: c.num_parameters for c in found.components} == counts
    for name in counts:
        assert found.sizes(name) == plan.sizes(name)
    data = summary(pipe)
    assert sum(data["kernels"].values()) == sum(c.spec is not None for c in plan.choices)
    assert len(data["sites"]) == len(plan.choices)
    assert {site["weight_bits"] for site in data["sites"]} == {None, 4, 8}


def test_backend_is_that_of_the_class(load_tiny, bare):
    pipe = load_tiny("pixart")
    assert backend_of(pipe.transformer).__name__ == "dqtk.diffusers_backend"
    assert backend_of(pipe.text_encoder).__name__ == "dqtk.transformers_backend"
    assert backend_of(bare) is None


# --- pipelines of one's own, as a new user would try ------------------------------------------------------------------


def vae():
    return diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=32)


def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, sample_size=8, num_embeds_ada_norm=1000, out_channels=8
    )
    return diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=diffusers.DDIMScheduler())


def stable_diffusion():
    from dqtk.pipelines.tiny.build import clip_tokenizer

    tokenizer = clip_tokenizer("<|endoftext|>")
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), max_position_embeddings=20, eos_token_id=tokenizer.eos_token_id, **config
        )
    )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(params=[dit, stable_diffusion], ids=["DiT", "StableDiffusion"])
def other(request, tmp_path):
    """(folder of a pipeline with random weights, its prompt)."""
    torch.manual_seed(0)
    pipe = request.param()
    pipe.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain", [3] if request.param is dit else "a red circle"


def paint(pipe, prompt):
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8-rtn", "w4a16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_other_pipelines(other, recipe, dtype, tmp_path):
    folder, prompt = other
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    encoders = recipe if hasattr(pipe, "text_encoder") else None
    plan = dqtk.plan(pipe, recipe, text_encoders=encoders)
    assert not [choice.site.id for choice in plan.choices if choice.site.role == "other"]
    dqtk.quantize(pipe, plan, progress=False)
    dqtk.save(pipe, tmp_path / "q")
    expected = paint(pipe, prompt)
    loaded = dqtk.load(tmp_path / "q", dtype=dtype)
    assert type(loaded) is type(pipe)
    for name, part in dqtk.sites.components_of(loaded).items():
        assert {n: digest(t) for n, t in part.state_dict().items()} == {
            n: digest(t) for n, t in getattr(pipe, name).state_dict().items()
        }
    assert paint(loaded, prompt) == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not recipe_named(name).main_spec().needs_stats])
def test_convolutions_of_every_dimension(recipe):
    torch.manual_seed(0)
    module = nn.ModuleDict({f"conv{d}": kind(16, 8, 3, padding=1) for d, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d))})
    inputs = [torch.randn(2, 16, *[5] * d) for d in (1, 2, 3)]
    with torch.no_grad():
        exact = [module[f"conv{d}"](inputs[d - 1]) for d in (1, 2, 3)]
        dqtk.quantize(module, recipe, progress=False)
        for d in (1, 2, 3):
            got = module[f"conv{d}"](inputs[d - 1])
            limit = 0.5 if "bit" in recipe else 0.25 if "fp4" in recipe else 0.15 if "4" in recipe else 0.06
            assert ((got - exact[d - 1]).norm() / exact[d - 1].norm()) < limit


def test_class_labels_calibrate_too(tmp_path):
    """Static inputs of a class-conditional pipeline; its prompts are numbers or label names."""
    torch.manual_seed(0)
    pipe = dit()
    pipe.set_progress_bar_config(disable=True)
    plan = dqtk.plan(pipe, "w8a8-static")
    dqtk.quantize(pipe, plan, prompts=["0", "3"], call_kwargs={"num_inference_steps": 2}, progress=False)
    assert len(quantized_layers(pipe.transformer)) == sum(choice.spec is not None for choice in plan.choices)


def test_calibrate_knows_what_the_family_needs(load_tiny):
    """The README's line, without arguments: a small PixArt cannot be called without them."""
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w8a8-static")
    stats = dqtk.calibrate(pipe, ["a red circle"], plan, call_kwargs={"num_inference_steps": 1}, progress=False)
    assert stats.num_prompts == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_takes_the_stored_dtype_for_all_parts(load_tiny, draw, dtype, tmp_path):
    """diffusers alone would mix float32 denoisers with bf16 text encoders, which then do not fit together."""
    pipe = load_tiny("sdxl", dtype)
    dqtk.quantize(pipe, "w4a8-rtn", progress=False)
    dqtk.save(pipe, tmp_path / "q")
    loaded = dqtk.load(tmp_path / "q")
    assert loaded.unet.dtype == loaded.text_encoder.dtype == loaded.vae.dtype == dtype
    draw(loaded)
    assert dqtk.load(tmp_path / "q" / "unet").dtype == dtype
