"""Recipes that learn from inputs, from calibration to a loaded pipeline: everything at once, on some blocks of two families."""

import copy

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model

import dqtk
from dqtk.checkpoint import digest, quantized_layers
from dqtk.plan import Recipe, Rule
from dqtk.resolve import call_kwargs_for
from dqtk.sources import load_pipeline
from dqtk.spec import (
    GPTQ,
    MSE,
    RTN,
    AdaRound,
    BestFloat,
    Dynamic,
    E4M3Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerGroup,
    PerTensor,
    PerToken,
    Smooth,
    TensorSpec,
    TwoLevel,
)

E2M1 = Float(exponent=2, mantissa=1)
INTEGERS = LayerSpec(
    weight=TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=32)),
    input=TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic()),
    transforms=(Smooth(alpha=0.5), Hadamard()),
    low_rank=LowRank(rank=4, iterations=2),
    solver=GPTQ(sweeps=1),
    correct_bias=True,
)
NVFP4 = LayerSpec(
    weight=TensorSpec(format=E2M1, granularity=E4M3Group(size=16)),
    input=TensorSpec(format=E2M1, granularity=E4M3Group(size=16), range=Dynamic()),
    transforms=(Hadamard(regular=True), Smooth(alpha=0.5)),
    low_rank=LowRank(rank=2, iterations=1),
    solver=GPTQ(sweeps=0),
)
SEARCHED = LayerSpec(
    weight=TensorSpec(format=BestFloat(bits=5), granularity=PerGroup(size=32)),
    input=TensorSpec(format=BestFloat(bits=8, signed=False), granularity=PerTensor(), range=MSE(steps=4)),
    transforms=(Smooth(alpha=1.0, power_of_two=True),),
    solver=AdaRound(iterations=20),
)
SPECS = {"integers": INTEGERS, "nvfp4": NVFP4, "searched": SEARCHED}
# Some of every kind: attention of both kinds, feed-forward, convolutions, modulation.
WHERE = {
    "pixart": ("transformer_blocks.[01].*", "adaln_single.linear"),
    "sdxl": ("down_blocks.1.attentions.0.*", "down_blocks.1.resnets.0.*", "mid_block.resnets.0.time_emb_proj"),
}
ENCODERS = {"pixart": "encoder.block.0.*", "sdxl": "*encoder.layers.0.*"}


def planned(pipe, name, spec):
    rules = tuple(Rule(pattern=pattern, spec=spec, why="learned") for pattern in WHERE[name])
    texts = Recipe(name="texts", rules=(Rule(pattern=ENCODERS[name], spec=spec, why="learned"),))
    return dqtk.plan(pipe, Recipe(name="everything", rules=rules), text_encoders=texts)


def quantized(pipe, name, spec):
    plan = planned(pipe, name, spec)
    steps = call_kwargs_for(pipe) | {"num_inference_steps": 2}
    stats = dqtk.calibrate(pipe, ["a small blue cross"], plan, call_kwargs=steps, progress=False)
    return dqtk.quantize(pipe, plan, stats, progress=False), plan


def states(pipe):
    parts = dqtk.sites.components_of(pipe)
    return {name: {key: digest(tensor) for key, tensor in part.state_dict().items()} for name, part in parts.items()}


CASES = [
    ("pixart", "integers", torch.float32),
    ("pixart", "integers", torch.bfloat16),
    ("pixart", "nvfp4", torch.float32),
    ("sdxl", "integers", torch.bfloat16),
    ("sdxl", "searched", torch.float32),
    ("pixart", "searched", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_pipeline_comes_back_bit_identical(name, kind, dtype, load_tiny, draw, tmp_path):
    pipe = load_tiny(name, dtype)
    before = draw(pipe)
    pipe, plan = quantized(pipe, name, SPECS[kind])
    expected = draw(pipe)
    assert torch.isfinite(expected).all()
    assert 0 < (expected - before).float().norm() < 0.3 * before.float().norm()
    dqtk.save(pipe, tmp_path / "out")
    for loaded in (
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=dtype),
        dqtk.load(tmp_path / "out"),
    ):
        assert states(loaded) == states(pipe)
        assert torch.equal(draw(loaded), expected)
        found = {
            f"{part}:{path}": layer.spec
            for part, module in dqtk.sites.components_of(loaded).items()
            for path, layer in quantized_layers(module).items()
        }
        assert found.keys() == {choice.site.id for choice in plan.choices if choice.spec is not None}
        assert not any(isinstance(spec.weight.format, BestFloat) for spec in found.values())
    kinds = {layer.op for part in dqtk.sites.components_of(pipe).values() for layer in quantized_layers(part).values()}
    assert kinds == ({"linear_int8", "conv_int8"} & kinds if kind == "integers" else {"emulated"})


@pytest.fixture(scope="module")
def everything(load_tiny):
    """A pixart with transforms, branch and integer inputs in its first blocks; tests copy it."""
    return quantized(load_tiny("pixart"), "pixart", INTEGERS)[0]


def test_a_checkpoint_of_one_dtype_loads_in_another(everything, tmp_path):
    """Branch, smoothing and scales keep their bits; the compute dtype is the one asked for."""
    dqtk.save(everything, tmp_path / "out")
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for path, layer in quantized_layers(everything.transformer).items():
        other = loaded.transformer.get_submodule(path)
        assert other.compute_dtype == torch.bfloat16
        for name, tensor in layer.named_buffers():
            assert digest(tensor) == digest(getattr(other, name)), name


def test_decoded_layers_are_ordinary_ones(everything):
    """``dequantize`` of diffusers: transforms undone and the branch added, so the function is nearly the same."""
    plain = copy.deepcopy(everything.transformer)
    layer = plain.transformer_blocks[0].ff.net[0].proj
    x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    plain.hf_quantizer._dequantize(plain)
    ordinary = plain.transformer_blocks[0].ff.net[0].proj
    assert type(ordinary) is torch.nn.Linear
    assert (ordinary(x) - y).norm() < 0.02 * y.norm()  # 8-bit inputs


def compile_and_compare(layer):
    assert all(tensor is not None for tensor in (layer.smooth, layer.signs, layer.down))
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_layers_compile_as_one_graph(everything):
    layer = everything.transformer.transformer_blocks[1].attn1.to_q
    assert layer.op == "linear_int8"
    compile_and_compare(layer)


def test_emulated_layers_compile_as_one_graph(load_tiny):
    pipe, _ = quantized(load_tiny("pixart"), "pixart", NVFP4)
    layer = pipe.transformer.transformer_blocks[0].attn2.to_out[0]
    assert layer.op == "emulated"
    compile_and_compare(layer)


def test_adapters_on_top(everything, draw, tmp_path):
    """A fresh LoRA changes nothing, a trained one does; merging raises, saving is refused, and it comes off again."""
    pipe = copy.deepcopy(everything)
    expected = draw(pipe)
    adapted = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q", "net.2"]))
    assert torch.equal(draw(pipe), expected)
    learned = [value for name, value in adapted.named_parameters() if "lora_B" in name]
    assert len(learned) == 3 * 6
    for value in learned:
        value.data.fill_(0.1)
    changed = draw(pipe)
    assert not torch.allclose(changed, expected, atol=1e-3)
    with pytest.raises(ValueError, match="save: model must be saved without adapters"):
        dqtk.save(pipe, tmp_path / "q")
    with pytest.raises(RuntimeError, match=r"cannot be changed in place .*Keep the adapter unmerged"):
        adapted.merge_adapter()
    assert torch.equal(draw(pipe), changed)
    adapted.unload()
    assert torch.equal(draw(pipe), expected)


def test_what_is_learned_pays(draw):
    """On the trained pipeline with 3 bits: GPTQ halves what rounding to nearest on the same grids does to the latents."""
    prompts = ["a small blue cross", "three red squares", "a yellow digit 3"]
    trained, weight, errors = load_pipeline("tiny-pixart"), TensorSpec(format=Int(bits=3), granularity=PerGroup(size=32)), []
    before = draw(trained)
    for solver in (RTN(), GPTQ(sweeps=0)):
        pipe = copy.deepcopy(trained)
        rule = Rule(pattern="transformer_blocks.[01].*", spec=LayerSpec(weight=weight, solver=solver), why="learned")
        plan = dqtk.plan(pipe, Recipe(name="some", rules=(rule,)))
        stats = dqtk.calibrate(pipe, prompts, plan, call_kwargs={"num_inference_steps": 3}, progress=False)
        dqtk.quantize(pipe, plan, stats, progress=False)
        errors.append(float((draw(pipe) - before).norm()))
    assert errors[1] < 0.75 * errors[0]
