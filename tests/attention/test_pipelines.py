"""Attention in blocks in whole pipelines: nothing changes where nothing is left out, and everything is saved."""

import copy
import json
import math
import pickle

import accelerate
import diffusers
import pytest
import torch
import torch.nn.functional as F

import dqtk
from dqtk.bench import bench_model
from dqtk.bench.variants import quantized, unpacked
from dqtk.checkpoint import quantized_layers
from dqtk.cli import main
from dqtk.installed import installed_plan
from dqtk.nn.attention import blocks_of
from dqtk.numerics.block_masks import unpack
from dqtk.numerics.layout import Layout
from dqtk.policy import Interval, StepPolicy
from dqtk.recipes import attention_named
from dqtk.sources import meta_pipeline
from dqtk.spec import AttentionSpec, Int, PooledBlocks, Radial, Recall, SkipSoftmax, SlidingTile, SmoothKeys, StaticBlocks

PROMPTS = ["a large red circle", "a small blue square on a green background"]
INT8 = {"qk": Int(bits=8), "pv": Int(bits=8), "smooth": SmoothKeys()}
ORDERED = AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.5, groups=2), **INT8)


def with_attention(pipe, spec, recipe="w8a8", prompts=PROMPTS, **options):
    plan = dqtk.plan(pipe, dqtk.Recipe(name="none", rules=()) if recipe is None else recipe, attention=spec)
    steps = {"num_inference_steps": 2}
    return dqtk.quantize(pipe, plan, prompts=prompts, call_kwargs=steps, progress=False, **options)


def step_of(pipe, **sizes):
    """What the denoiser answers in float32, without the chaos of a whole run: a list of outputs."""
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    draw = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "output_type": "latent", "use_resolution_binning": False, "clean_caption": False}
    pipe("a circle", generator=draw, max_sequence_length=20, **options, **sizes)
    handle.remove()
    return torch.cat(seen)


@pytest.fixture
def pipe(load_tiny):
    return load_tiny("pixart")


def test_nothing_left_out_and_nothing_rounded_is_the_same(pipe):
    before = step_of(pipe)
    with_attention(pipe, AttentionSpec(order=Recall(), mask=StaticBlocks(density=1.0)), recipe=None)
    found = blocks_of(pipe.transformer)
    assert len(found) == 6
    assert any(any(blocks.spec.orders) for blocks in found.values())
    torch.testing.assert_close(step_of(pipe), before, rtol=1e-4, atol=1e-5)


def test_fewer_blocks_are_worse_and_reported(pipe, load_tiny):
    before, errors = step_of(pipe), []
    for density in (0.7, 0.4, 0.2):
        sparse = with_attention(load_tiny("pixart"), AttentionSpec(mask=StaticBlocks(density=density)), recipe=None)
        errors.append(float((step_of(sparse) - before).norm()))
        densities = [blocks.density() for blocks in blocks_of(sparse.transformer).values()]
        assert abs(sum(densities) / len(densities) - density) < 0.01
        assert len(set(densities)) > 1  # one budget for all
    assert errors == sorted(errors)
    assert "density 0.1" in installed_plan(sparse).explain() or "density 0.2" in installed_plan(sparse).explain()


RULES = [AttentionSpec(mask=kind(density=0.4)) for kind in (SlidingTile, Radial, PooledBlocks)]
RULES.append(AttentionSpec(mask=SkipSoftmax(threshold=1e-2)))


@pytest.mark.parametrize("density", [0.3, 0.2])
def test_blocks_that_calls_choose_keep_their_density(pipe, density):
    with_attention(pipe, AttentionSpec(mask=PooledBlocks(density=density), block=(16, 16)), recipe=None)
    found = list(blocks_of(pipe.transformer).values())
    assert [blocks.density() for blocks in found] == [density] * 6  # a wish, before any call
    seen = []
    for blocks in found:
        plain = blocks.live_blocks
        blocks.live_blocks = lambda *given, plain=plain: seen.append(plain(*given)) or seen[-1]
    step_of(pipe)
    counted = [float(unpack(live, 16).float().mean()) for live in seen]
    assert len(counted) == 6
    assert [blocks.density() for blocks in found] == pytest.approx(counted, abs=1e-6)
    assert counted == pytest.approx([density] * 6, abs=0.5 / (6 * 16 * 16))  # to a block of all heads


def test_what_rules_and_thresholds_compute_is_known_after_a_call(load_tiny):
    for mask, before in ((SkipSoftmax(threshold=0.9), math.nan), (Radial(density=0.05), 0.05), (PooledBlocks(density=0.05), 0.05)):
        pipe = with_attention(load_tiny("pixart"), AttentionSpec(mask=mask, block=(16, 16)), recipe=None)
        blocks = blocks_of(pipe.transformer)["transformer_blocks.0.attn1"]
        assert blocks.density() == pytest.approx(before, nan_ok=True)
        step_of(pipe)
        assert blocks.density() >= 1 / 16  # guards alone: the diagonal
        assert blocks.density() < 1


@pytest.mark.parametrize("spec", [ORDERED, *RULES], ids=["calibrated", "tile", "radial", "pooled", "threshold"])
def test_saved_and_loaded_by_diffusers(load_tiny, draw, tmp_path, spec):
    pipe = with_attention(load_tiny("pixart", torch.bfloat16), spec)
    expected = draw(pipe)
    dqtk.save(pipe, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "transformer" / "config.json").read_text())["quantization_config"]
    assert sorted(config["attention"]) == [f"transformer_blocks.{i}.attn1" for i in range(6)]
    unread = installed_plan(meta_pipeline(str(tmp_path / "saved")))  # from the configuration alone
    assert [choice.spec for choice in unread.attention] == [b.spec for b in blocks_of(pipe.transformer).values()]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert torch.equal(draw(again), expected)
    assert {path: blocks.spec for path, blocks in blocks_of(again.transformer).items()} == {
        path: blocks.spec for path, blocks in blocks_of(pipe.transformer).items()
    }


def test_a_pickled_and_a_deep_copy_answer_the_same(pipe):
    with_attention(pipe, ORDERED)
    expected, original = step_of(pipe), pipe.transformer
    for copied in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
        pipe.transformer = copied
        assert type(copied) is type(original)
        assert blocks_of(copied).keys() == blocks_of(original).keys()
        assert all(blocks_of(copied)[path] is not blocks for path, blocks in blocks_of(original).items())
        assert torch.equal(step_of(pipe), expected)


def test_an_edited_configuration_is_refused(load_tiny, tmp_path):
    dqtk.save(with_attention(load_tiny("pixart"), AttentionSpec(mask=Radial(density=0.4))), tmp_path / "saved")
    file = tmp_path / "saved" / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"density": 0.4', '"density": 0.9'))
    with pytest.raises(ValueError, match="hash must be"):
        dqtk.load(tmp_path / "saved")


def test_plain_again_after_dequantizing(pipe):
    before = step_of(pipe)
    with_attention(pipe, AttentionSpec(mask=Radial(density=0.2)), recipe=None)
    assert not torch.allclose(step_of(pipe), before, atol=1e-2)
    pipe.transformer.dequantize()
    assert not blocks_of(pipe.transformer)
    assert not pipe.transformer._forward_pre_hooks
    assert type(pipe.transformer.transformer_blocks[0].attn1) is diffusers.models.attention_processor.Attention
    assert torch.equal(step_of(pipe), before)


def test_another_resolution_takes_the_masks_along(load_tiny):
    pipe = with_attention(load_tiny("pixart"), AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.4)), recipe=None)
    plain = load_tiny("pixart")
    for sizes in ({"height": 96, "width": 64}, {"height": 64, "width": 128}):
        dense, sparse = step_of(plain, **sizes), step_of(pipe, **sizes)
        assert sparse.shape == dense.shape
        assert 0 < float((sparse - dense).norm() / dense.norm()) < 1


def test_masks_change_with_the_noise_level(pipe):
    with_attention(pipe, AttentionSpec(mask=StaticBlocks(density=0.3, groups=2)), recipe=None)
    blocks = blocks_of(pipe.transformer)["transformer_blocks.0.attn1"]
    assert blocks.live.shape[0] == 2
    assert not torch.equal(blocks.live[0], blocks.live[1])
    call = {"encoder_hidden_states": torch.randn(1, 5, 128), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def answer(time):
        return pipe.transformer(x, timestep=torch.tensor([time]), **call)[0]

    early = answer(900.0)
    blocks.live[1] = 255
    assert not torch.equal(answer(900.0), early)
    late = answer(10.0)
    blocks.live[1] = 0
    assert torch.equal(answer(10.0), late)


def test_another_backend_is_an_error(pipe, monkeypatch):
    with_attention(pipe, AttentionSpec(mask=Radial(density=0.5)), recipe=None)
    plain = F.scaled_dot_product_attention

    class Elsewhere:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states

    pipe.transformer.transformer_blocks[1].attn1.set_processor(Elsewhere())
    with pytest.raises(ValueError, match="attention: Attention must compute scaled_dot_product_attention in torch, got none"):
        step_of(pipe)
    assert F.scaled_dot_product_attention is plain


def test_one_graph(load_tiny):
    pipe = with_attention(load_tiny("pixart"), AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.4, groups=2)), recipe=None)
    call = {"encoder_hidden_states": torch.randn(1, 5, 128), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    x, times = torch.randn(1, 4, 16, 16), [torch.tensor([900.0]), torch.tensor([10.0])]
    with torch.no_grad():
        expected = [pipe.transformer(x, timestep=time, **call)[0] for time in times]
        compiled = torch.compile(pipe.transformer, fullgraph=True, dynamic=False)
        for time, wanted in zip(times, expected, strict=True):
            torch.testing.assert_close(compiled(x, timestep=time, **call)[0], wanted, rtol=1e-3, atol=1e-4)


def test_plans_say_it(pipe):
    plan = dqtk.plan(pipe, "w8a8", attention="paro-int8", overrides={"transformer_blocks.0.attn1": None})
    assert plan.attention[0].spec is None
    assert plan.attention[1].spec == attention_named("paro-int8")
    assert plan.needs_stats
    text = plan.explain(sites=False)
    assert "5 of them" in text
    assert "QK8 PV8 reordered, 0.50 of 64x64 blocks" in text
    assert dqtk.Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    plain = dqtk.plan(pipe, "w8a8")
    assert plan.hash != plain.hash
    assert plain.diff(plan)[-1] == "transformer:transformer_blocks.5.attn1: absent -> QK8 PV8 reordered, 0.50 of 64x64 blocks"


def test_attention_of_text_encoders_is_left(pipe):
    plan = dqtk.plan(pipe, "w8a8", text_encoders="w8a8", attention="paro")
    assert {choice.site.component for choice in plan.attention} == {"transformer"}
    with pytest.raises(ValueError, match=r"plan: pattern must match at least one of 6 attentions, got '\*\.attn3'"):
        dqtk.plan(pipe, "w8a8", overrides={"*.attn3": attention_named("paro")})


def test_the_command_says_what_was_made_and_not_what_was_asked(tiny_folders, tmp_path, capsys):
    """Blocks of 64 became ones of 16, and guards alone are more than a fiftieth of them."""
    words = [
        "quantize",
        tiny_folders["pixart"],
        "--recipe",
        "paro-int8",
        "--density",
        "0.02",
        "--prompts",
        "a circle",
        "--steps",
        "2",
    ]
    with pytest.warns(UserWarning, match=r"16x16 blocks of 6 attentions are computed, though 0\.02 were asked for"):
        assert main([str(word) for word in [*words, "--output", tmp_path / "made"]]) == 0
    said = capsys.readouterr().out
    found = [blocks.density() for blocks in blocks_of(dqtk.load(tmp_path / "made").transformer).values()]
    mean, least, most = (f"{share:.3f}" for share in (sum(found) / 6, min(found), max(found)))
    wanted = f"attention: 6 as QK8 PV8 reordered, 0.02 of 16x16 blocks; {mean} computed ({least} to {most})"
    assert wanted in said.splitlines()
    assert "64x64" not in said
    assert main(["explain", str(tmp_path / "made")]) == 0  # reads no masks
    said = capsys.readouterr().out
    assert wanted in said.splitlines()
    for share in found:
        assert f"QK8 PV8 reordered, {share:.3f} of 16x16 blocks  density {share:.3f}, 0.02 asked for" in said


def test_a_resolution_is_taken_along_by_place(load_tiny):
    """At twice the size nearly as much attention is computed as where the masks were made, and far more than by chance."""
    pipe = with_attention(load_tiny("pixart"), AttentionSpec(mask=StaticBlocks(density=0.4, groups=1)), recipe=None)
    blocks = blocks_of(pipe.transformer)["transformer_blocks.3.attn1"]
    larger = Layout(1, 32, 32)
    assert 0.2 < blocks.density(larger) < 0.7


def test_gradients_go_through_the_same_blocks(pipe):
    with_attention(pipe, AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.4, groups=2)), recipe=None)
    call = {"encoder_hidden_states": torch.randn(1, 5, 128), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe.transformer(x, timestep=torch.tensor([500.0]), **call)[0]
    x.requires_grad_()
    found = pipe.transformer(x, timestep=torch.tensor([500.0]), **call)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    assert float(x.grad.abs().sum()) > 0


def test_offloaded_with_its_masks(load_tiny):
    pipe = with_attention(load_tiny("pixart"), AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.4)), recipe=None)
    expected = step_of(pipe)
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    assert next(iter(blocks_of(pipe.transformer).values())).live.is_meta
    assert torch.equal(step_of(pipe), expected)


def test_hooks_and_blocks_are_found_before_anything_changes(pipe):
    plan = dqtk.plan(pipe, "w8a8", attention="dense")
    accelerate.hooks.add_hook_to_module(pipe.transformer.transformer_blocks[2].attn1, accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match=r"attention of transformer:transformer_blocks\.2\.attn1 must have no hooks, got some"):
        dqtk.quantize(pipe, plan, progress=False)
    assert not quantized_layers(pipe.transformer)
    assert not blocks_of(pipe.transformer)
    accelerate.hooks.remove_hook_from_module(pipe.transformer.transformer_blocks[2].attn1)
    dqtk.quantize(pipe, plan, progress=False)
    with pytest.raises(ValueError, match="must be dense, got blocks already"):
        dqtk.quantize(pipe, dqtk.plan(pipe, dqtk.Recipe(name="none", rules=()), attention="dense"), progress=False)


def test_a_model_without_attention_has_none_to_plan(bare):
    with pytest.raises(ValueError, match="plan: attention must be left out for a model that has none with a processor"):
        dqtk.plan(bare, "w8a8", attention="paro")


def test_bench_times_the_attention_that_it_names(pipe):
    with pytest.raises(ValueError, match=r"bench: attention of .*attn1 must need no calibration, got 16 bit reordered, 0\.50 of"):
        bench_model(pipe, ["paro"], repeats=1, progress=False)
    made = quantized(pipe.transformer, (), dqtk.plan(pipe, "dense").attention)
    assert len(blocks_of(made)) == 6
    assert not blocks_of(pipe.transformer)
    with_attention(pipe, AttentionSpec(mask=Radial(density=0.5)), recipe=None)
    assert not blocks_of(unpacked(pipe.transformer))
    assert len(blocks_of(pipe.transformer)) == 6
    assert "the model's own codes" in bench_model(pipe, repeats=1, progress=False).table()


def test_intervals_of_a_policy_leave_attention(pipe):
    policy = StepPolicy(intervals=(Interval(begin=0, end=0.5, recipe="paro"),))
    with pytest.raises(ValueError, match="policy: recipes of intervals must leave attention alone"):
        dqtk.plan(pipe, "w8a8", policy=policy)


def test_a_density_is_of_the_attention_that_is_named(pipe):
    alone = dqtk.plan(pipe, "paro-int8", density=0.3)
    beside = dqtk.plan(pipe, "w8a8", attention="paro-int8", density=0.3)
    wanted = {attention_named("paro-int8", 0.3)}
    assert {choice.spec for choice in alone.attention} == {choice.spec for choice in beside.attention} == wanted
    assert alone.recipe == "paro-int8"
    assert not any(choice.spec for choice in alone.choices)
    assert beside.choices == dqtk.plan(pipe, "w8a8").choices
    assert {choice.spec.mask.density for choice in dqtk.plan(pipe, "w8a8", attention="paro-int8").attention} == {0.5}
    one = dqtk.plan(pipe, "w8a8", overrides={"*blocks.0.attn1": attention_named("paro", 0.9)}, attention="paro", density=0.3)
    assert [choice.spec.mask.density for choice in one.attention if choice.spec] == [0.9] + 5 * [0.3]


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (
            {"recipe": "w8a8"},
            r"plan: density must come with attention or recipe 'paro-\.\.\.', got it without\. It is of their blocks",
        ),
        (
            {"recipe": "w8a8", "attention": AttentionSpec(mask=Radial(density=0.5))},
            r"plan: density must come with the name of an attention, got 0\.3 with an AttentionSpec\. Write it into its mask",
        ),
        ({"recipe": "paro", "attention": "paro-int8"}, r"plan: attention must be left out with recipe 'paro', got 'paro-int8'\."),
        ({"recipe": "w8a8", "attention": "dense"}, r"attention: density must be left out for dense, got 0\.3\. Take paro\."),
        ({"recipe": "w8a8", "attention": 3}, r"plan: attention must be an AttentionSpec, a name or None, got 3\."),
        ({"recipe": "paro", "density": 30}, r"StaticBlocks: density must be in \(0, 1\], got 30\."),
        ({"recipe": "paro", "density": "0.3"}, r"plan: density must be a number in \(0, 1\], got '0\.3'\."),
    ],
)
def test_a_density_of_nothing_is_an_error(pipe, wish, says):
    with pytest.raises(ValueError, match=says):
        dqtk.plan(pipe, **{"density": 0.3} | wish)


def test_a_recipe_of_attention_stands_without_another(pipe):
    with pytest.raises(ValueError, match=r"attention must be left out with recipe 'dense', got 'paro'\. It is one already"):
        dqtk.plan(pipe, "dense", attention="paro")
