"""Layers that depend on the noise level only: found by probing, replaced by tables without changing a bit."""

import copy
import functools

import pytest
import torch

import dqtk
from dqtk.calibrate.replay import Call
from dqtk.calibrate.schedule import first_call, run_calls, run_times
from dqtk.calibrate.stub import repeating
from dqtk.correct.modulation import cache_modulation, cache_pipeline, conditioned_layers, disturbances, temporal_layers
from dqtk.nn.modulation import ModulationTable, nearest
from dqtk.recipes import recipe_named

FOUR = {"num_inference_steps": 4}
PROMPTS = ["a large red circle on a plain blue background", "two small green squares on a striped background"]
SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}


def call_of(seed, side, **kinds):
    """A call with random arguments of these shapes; ``side`` stands for "S"."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        name: [side if size == "S" else side * side if size == "T" else size for size in shape] for name, shape in kinds.items()
    }
    given = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return Call("transformer", (), {**given, "timestep": torch.full((2,), 500.0)}, None)


def sd3():
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(
        **SMALL,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
    )
    shapes = {"hidden_states": [2, 4, "S", "S"], "encoder_hidden_states": [2, 5, 16], "pooled_projections": [2, 8]}
    return module, [call_of(seed, side, **shapes) for seed, side in ((0, 8), (1, 4))]


def wan():
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(**SMALL, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32)
    shapes = {"hidden_states": [2, 4, 1, "S", "S"], "encoder_hidden_states": [2, 5, 16]}
    return module, [call_of(seed, side, **shapes) for seed, side in ((0, 8), (1, 4))]


def flux():
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(
        **SMALL,
        num_single_layers=1,
        in_channels=4,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 4),
    )
    shapes = {"hidden_states": [2, "T", 4], "encoder_hidden_states": [2, 5, 16], "pooled_projections": [2, 8]}
    calls = [call_of(seed, side, **shapes) for seed, side in ((0, 4), (1, 2))]
    for call, side in zip(calls, (4, 2), strict=True):
        ids = {"img_ids": torch.zeros(side * side, 3), "txt_ids": torch.zeros(5, 3)}
        call.kwargs.update(ids, timestep=torch.full((2,), 0.5))
    return module, calls


@pytest.mark.parametrize(
    ("family", "found"),
    [
        (
            wan,
            [
                "condition_embedder.time_embedder.linear_1",
                "condition_embedder.time_embedder.linear_2",
                "condition_embedder.time_proj",
            ],
        ),
        (sd3, ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"]),
        (flux, ["time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"]),
    ],
)
def test_where_pooled_text_enters_only_the_time_embedding_qualifies(family, found):
    torch.manual_seed(0)
    module, calls = family()
    assert temporal_layers(module.eval(), calls) == found


def test_pixart_keeps_its_bits_and_lets_go_of_its_weights(load_tiny, draw):
    pipe = load_tiny("pixart")
    expected = draw(pipe, **FOUR)
    size = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR)["transformer"]
    assert made.paths == (
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "adaln_single.linear",
    )
    assert torch.equal(draw(pipe, **FOUR), expected)
    left = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    assert size - left == made.bytes_before
    assert made.bytes_after == sum(
        layer.rows.numel() * 4 + 4 * 8 for layer in pipe.transformer.modules() if isinstance(layer, ModulationTable)
    )
    assert 0 < made.bytes_saved == made.bytes_before - made.bytes_after
    other = copy.deepcopy(pipe.transformer)
    assert other.adaln_single.linear.known is not pipe.transformer.adaln_single.linear.known
    with pytest.raises(ValueError, match="modulation: layers must have been kept to be restored, got evicted ones"):
        made.restore()
    with pytest.raises(ValueError, match="modulation: time must be one of the 4 that the tables were made for, got 666"):
        draw(pipe, num_inference_steps=3)


def test_a_model_with_tables_is_not_saved(load_tiny, draw, tmp_path):
    pipe = load_tiny("pixart")
    expected, before = draw(pipe, **FOUR), dict(pipe.transformer.state_dict())
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR, evict=False)["transformer"]
    with pytest.raises(ValueError, match=r"save: adaln_single.* must have its weights to be saved .*, got a table for a schedule"):
        dqtk.save(pipe, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    made.restore()
    after = pipe.transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(draw(pipe, **FOUR), expected)
    draw(pipe, num_inference_steps=3)  # other levels, as ever


def test_quantized_modulation_is_cached_too(load_tiny, draw):
    pipe = load_tiny("pixart", torch.bfloat16)
    dqtk.quantize(pipe, "w8a8", progress=False)
    expected = draw(pipe, **FOUR)
    assert len(cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR)["transformer"].paths) == 3
    assert torch.equal(draw(pipe, **FOUR), expected)


def test_tables_of_the_original_undo_what_quantizing_did(load_tiny, draw):
    """Temporal layers alone in 4 bits: chosen by what that did to them, and to the bit as before where all are tables."""
    original, pipe = load_tiny("pixart"), load_tiny("pixart")
    expected = draw(original, **FOUR)
    spec = recipe_named("w4a16").main_spec()
    rules = (dqtk.Rule(pattern="adaln_single*", spec=spec, why="test"), dqtk.Rule(spec=None, why="test"))
    dqtk.quantize(pipe, dqtk.plan(pipe, dqtk.Recipe(name="temporal", rules=rules)), progress=False)
    assert not torch.equal(draw(pipe, **FOUR), expected)
    call = first_call(original, PROMPTS[0], FOUR)
    times = run_times(original, PROMPTS, FOUR)
    paths = [f"adaln_single.{name}" for name in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")]
    found = disturbances(original.transformer, pipe.transformer, call, times, paths)
    assert all(1e-5 < value < 1 for value in found.values())
    assert set(disturbances(original.transformer, original.transformer, call, times, paths).values()) == {0.0}
    _, middle, most = sorted(found.values())
    how = {"call_kwargs": FOUR, "original": original, "evict": False}
    with pytest.warns(UserWarning, match="modulation: no layer qualifies, so nothing became a table"):
        assert cache_pipeline(pipe, PROMPTS, above=most, **how) == {}
    some = cache_pipeline(pipe, PROMPTS, above=middle, **how)["transformer"]
    assert [found[path] for path in some.paths] == [most]
    some.restore()
    assert cache_pipeline(pipe, PROMPTS, **how)["transformer"].paths == tuple(paths)
    assert torch.equal(draw(pipe, **FOUR), expected)
    with pytest.warns(UserWarning, match="Some are tables already"):
        assert cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR) == {}
    for above, given in ((0.1, None), (-1, original)):
        with pytest.raises(ValueError, match=f"modulation: above must be at least 0 and come with original, got {above}"):
            cache_pipeline(pipe, PROMPTS, above=above, original=given)


def test_tables_of_the_original_hold_what_quantizing_left_alone_too(load_tiny):
    original, pipe = load_tiny("pixart"), load_tiny("pixart")
    assert len(cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR, original=original)["transformer"].paths) == 3
    with pytest.warns(UserWarning, match="nothing became a table"):
        cache_pipeline(load_tiny("pixart"), PROMPTS, call_kwargs=FOUR, original=original, above=0.0)


@pytest.mark.parametrize("unit", [lambda t: t / 1000, lambda t: 1 - t / 1000])
def test_times_as_other_pipelines_give_them(load_tiny, draw, unit):
    """Flux rounds a time twice in bfloat16, Lumina begins at 0: tables hold what the denoiser is given."""
    pipe = load_tiny("pixart", torch.bfloat16)
    runs = []

    def started(module, args, kwargs):
        if runs:
            return args, {**kwargs, "timestep": unit(kwargs["timestep"].to(torch.bfloat16))}
        return None

    class Pipeline(type(pipe)):
        @functools.wraps(type(pipe).__call__)
        def __call__(self, *args, **kwargs):
            runs.append(1)
            found = super().__call__(*args, **kwargs)
            runs.clear()
            return found

    pipe.__class__ = Pipeline
    pipe.transformer.register_forward_pre_hook(started, with_kwargs=True)
    how = {"num_inference_steps": 20}
    expected = draw(pipe, **how)
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=how)["transformer"]
    assert len(made.paths) == 3
    assert "PixArt" not in str(made)
    assert torch.equal(draw(pipe, **how), expected)


def test_a_run_is_called_without_denoising(load_tiny):
    """A denoiser computes once; times and conditions are those of the run."""
    pipe = load_tiny("sdxl")
    made = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: made.append(1))
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(float(args[1])), with_kwargs=True)
    calls = run_calls(pipe, PROMPTS[0], FOUR)
    assert len(made) == 1
    assert [call.time for call in calls] == seen
    assert seen[:4] == pytest.approx(run_times(pipe, PROMPTS, FOUR))
    assert "forward" not in vars(pipe.unet)
    with pytest.raises(ValueError, match="call_kwargs must be arguments of StableDiffusionXLPipeline"):
        run_calls(pipe, PROMPTS[0], {"num_inference_step": 4})


def test_tables_are_in_the_dtype_of_the_quantized_model(load_tiny, draw):
    original, pipe = load_tiny("pixart"), load_tiny("pixart", torch.bfloat16)
    dqtk.quantize(pipe, "w4a16", progress=False)
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR, original=original)["transformer"]
    tables = [layer for layer in pipe.transformer.modules() if isinstance(layer, ModulationTable)]
    assert len(tables) == len(made.paths) == 3
    assert {table.rows.dtype for table in tables} == {torch.bfloat16}
    assert bool(torch.isfinite(draw(pipe, **FOUR)).all())


def test_sdxl_qualifies_up_to_the_time_embedding(load_tiny, draw):
    pipe = load_tiny("sdxl")
    expected = draw(pipe, **FOUR)
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR)["unet"]
    assert made.paths == ("time_embedding.linear_1", "time_embedding.linear_2")
    assert torch.equal(draw(pipe, **FOUR), expected)


MIXED = {  # behind the embeddings of time and pooled text
    sd3: ["transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm1_context.linear", "norm_out.linear"],
    flux: [
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "norm_out.linear",
    ],
}


@pytest.mark.parametrize("family", MIXED)
def test_where_pooled_text_enters_tables_are_per_prompt(family):
    """Any batch of known samples, at sizes that tables were not made with, to the bit; others are refused."""
    torch.manual_seed(0)
    module, calls = family()
    module.eval()
    calls[1].kwargs["hidden_states"] = calls[1].kwargs["hidden_states"] * 3  # other latents under other text
    paths = conditioned_layers(module, calls)
    embedders = [f"time_text_embed.{kind}_embedder.linear_{n}" for kind in ("timestep", "text") for n in (1, 2)]
    assert paths == embedders + MIXED[family]
    times = [0.5, 0.25] if family is flux else [500.0, 250.0]
    turned = calls[0].kwargs | {"pooled_projections": calls[0].kwargs["pooled_projections"].flip(0)}
    with torch.no_grad():
        expected = [
            module(**(given | {"timestep": torch.full((2,), time)})).sample for given in (calls[0].kwargs, turned) for time in times
        ]
    made = cache_modulation(module, calls, times, paths, per_prompt=True)
    assert made.known.samples == 4
    table, text = module.norm_out.linear, module.time_text_embed.text_embedder.linear_1
    assert table.rows.shape == (8, 1, table.out_features)
    assert text.rows.shape == (4, 1, text.out_features)  # of every prompt once, whatever the time
    with torch.no_grad():
        got = [
            module(**(given | {"timestep": torch.full((2,), time)})).sample for given in (calls[0].kwargs, turned) for time in times
        ]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    other = calls[0].kwargs | {"pooled_projections": calls[0].kwargs["pooled_projections"] * torch.tensor([[1.0], [1.002]])}
    with pytest.raises(ValueError, match=r"must be called with prompts .* got others in sample 1; 4 samples are known"):
        module(**other)


def test_sdxl_with_prompts_of_its_own(load_tiny, draw):
    """Modulation of all blocks goes; prompts in one batch, a new one, another size."""
    pipe = load_tiny("sdxl")
    how = {**FOUR, "output_type": "latent"}
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    expected = draw(pipe, **FOUR), pipe(PROMPTS, generator=seeds, **how).images
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR, per_prompt=True)["unet"]
    roles = {path.rsplit(".", 1)[-1] for path in made.paths}
    assert roles == {"linear_1", "linear_2", "time_emb_proj"}
    assert {path for path in made.paths if "time_emb_proj" not in path} == {
        f"{kind}_embedding.linear_{n}" for kind in ("time", "add") for n in (1, 2)
    }
    assert sum("time_emb_proj" in path for path in made.paths) == sum(
        "time_emb_proj" in p for p, _ in load_tiny("sdxl").unet.named_modules()
    )
    assert made.known.samples == 3  # two prompts and the empty one
    assert torch.equal(draw(pipe, **FOUR), expected[0])
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.allclose(pipe(PROMPTS, generator=seeds, **how).images, expected[1], atol=1e-4)  # tables are those of one prompt
    with pytest.raises(ValueError, match="got others in sample 1; 3 samples are known"):
        pipe("a star", **how)
    with pytest.raises(ValueError, match="got others in sample 0"):
        pipe(PROMPTS[0], height=64, width=96, **how)


def guided_unet():
    """A denoiser that is given its guidance scale as an embedding, as consistency models are."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    module = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        time_cond_proj_dim=16,
    )
    calls = []
    for seed, side in ((0, 8), (1, 4)):
        call = call_of(seed, side, sample=[2, 4, "S", "S"], encoder_hidden_states=[2, 5, 8])
        scale = torch.linspace(-1, 1, 16).expand(2, -1).clone()  # equal in all prompts
        calls.append(Call("unet", (), {**call.kwargs, "timestep_cond": scale}, None))
    return module.eval(), calls


def test_embedded_guidance_is_no_noise_level():
    """What sees the guidance scale too is no table by the time alone; with samples told apart it is one for known scales."""
    module, calls = guided_unet()
    assert temporal_layers(module, calls) == []
    paths = conditioned_layers(module, calls)
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} < set(paths)
    with torch.no_grad():
        expected = module(**calls[0].kwargs).sample
    cache_modulation(module, calls, [500.0], paths, per_prompt=True)
    with torch.no_grad():
        assert torch.equal(module(**calls[0].kwargs).sample, expected)
    with pytest.raises(ValueError, match=r"must be called with prompts .* got others in sample 0; 1 samples are known"):
        module(**(calls[0].kwargs | {"timestep_cond": calls[0].kwargs["timestep_cond"] + 0.01}))


def test_which_samples_are_the_same():
    """Pooled text up to the rounding of another batch, sizes and guidance exactly; of two near ones the nearer."""
    torch.manual_seed(0)
    text = torch.randn(1, 128)
    known = {"text": torch.cat([text, text * 1.0015]), "sizes": torch.tensor([[1024.0, 1024.0, 2.5]] * 2)}

    def found(scale=1.0, sizes=(1024.0, 1024.0, 2.5), dtype=torch.float32):
        return nearest({"text": (text * scale).to(dtype), "sizes": torch.tensor([sizes])}, known)[0]

    assert [found(scale) for scale in (1.0, 1.0004, 1.0011, 1.0015, 1.02)] == [0, 0, 1, 1, None]
    assert found(sizes=(1016.0, 1024.0, 2.5)) is None
    assert found(sizes=(1024.0, 1024.0, 3.0)) is None
    assert found(dtype=torch.bfloat16) is not None
    assert nearest({"text": text}, known) == [None]


def test_layers_come_back_to_where_the_model_is(load_tiny, draw):
    pipe = load_tiny("pixart")
    made = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR, evict=False)["transformer"]
    pipe.to(torch.bfloat16)
    with_tables = draw(pipe, **FOUR)
    made.restore()
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert torch.nn.functional.mse_loss(draw(pipe, **FOUR), with_tables) < 1e-3
    again = cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR)["transformer"]
    with pytest.raises(ValueError, match=r"modulation: adaln_single.* must be a layer, got a table already"):
        cache_pipeline(pipe, PROMPTS, call_kwargs=FOUR, original=load_tiny("pixart"))
    assert again.paths == made.paths


def test_a_copy_has_tables_of_its_own(load_tiny):
    """The hook of a copied denoiser tells the copy's tables which samples it is given."""
    torch.manual_seed(0)
    module, calls = sd3()
    module.eval()
    with torch.no_grad():
        expected = [module(**call.kwargs).sample for call in calls]
    cache_modulation(module, calls, [500.0], conditioned_layers(module, calls), per_prompt=True)
    other = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(other(**calls[1].kwargs).sample, expected[1])
        assert torch.equal(module(**calls[0].kwargs).sample, expected[0])


def test_answers_have_the_shape_of_the_call():
    """Of a denoiser that is called with both halves and then with one, as where guidance ends early."""
    layer = torch.nn.Linear(3, 2)
    with torch.no_grad(), repeating(layer):
        whole, half, again = layer(torch.ones(4, 3)), layer(torch.ones(2, 3)), layer(torch.zeros(4, 3))
    assert (whole.shape, half.shape) == ((4, 2), (2, 2))
    assert torch.equal(whole, again)
    assert not torch.equal(layer(torch.zeros(4, 3)), again)


def test_tables_per_prompt_know_their_batch():
    """Compiled: a graph for each batch, whatever the times and prompts; a layer that sees another batch is refused."""
    torch.manual_seed(0)
    module, calls = sd3()
    module.eval().requires_grad_(False)
    cache_modulation(module, calls, [500.0, 250.0], conditioned_layers(module, calls), per_prompt=True)
    table, graphs = module.norm_out.linear, []
    table.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    pooled = torch.cat([call.kwargs["pooled_projections"] for call in calls])
    seen = {}
    for rows in ((0, 1), (2, 3), (3, 0, 1)):
        for time in (500.0, 250.0):
            given = {"hidden_states": torch.zeros(len(rows), 4, 8, 8), "pooled_projections": pooled[list(rows)]}
            table.known.see(module, (), {**given, "timestep": torch.tensor([time])})
            for row, found in zip(rows, table(torch.zeros(len(rows), 16)), strict=True):
                assert torch.equal(seen.setdefault((row, time), found), found)
    assert len({tuple(found.tolist()) for found in seen.values()}) == len(seen) == 8
    assert len(graphs) == 2
    with pytest.raises(ValueError, match="modulation: layers must see the batch of the call, 3, got 2"):
        table.forward(torch.zeros(2, 16))
    module, calls = wan()
    with pytest.raises(ValueError, match="modulation: per_prompt must come with calls that all give the same by sample, got none"):
        cache_modulation(module, calls, [500.0], ["condition_embedder.time_proj"], per_prompt=True)


def test_compiled_once_for_all_times():
    torch.manual_seed(0)
    module, calls = wan()
    module.eval().requires_grad_(False)
    times = [900.0, 500.0, 100.0]
    cache_modulation(module, calls[:1], times, temporal_layers(module, calls))
    table = module.condition_embedder.time_proj
    graphs = []
    table.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, fullgraph=True)
    x, seen = torch.zeros(2, 16), []
    for time in times:
        table.known.see(module, (), {"timestep": torch.tensor([time])})
        seen.append(table(x))
    assert len(graphs) == 1
    assert not torch.equal(seen[0], seen[1])


def test_what_cannot_be_cached(load_tiny):
    with pytest.raises(ValueError, match="modulation: prompts must be two different ones"):
        cache_pipeline(load_tiny("pixart"), PROMPTS[:1] * 2)
    module, calls = wan()
    with pytest.raises(ValueError, match="modulation: layers, times and calls must be given, got 0, 1 and 1"):
        cache_modulation(module, calls[:1], [1.0], [])
    cache_modulation(module, calls[:1], [500.0], temporal_layers(module, calls))
    with pytest.raises(ValueError, match=r"modulation: WanTransformer3DModel must be called with one time, got \[500.0, 400.0\]"):
        module(**(calls[0].kwargs | {"timestep": torch.tensor([500.0, 400.0])}))
