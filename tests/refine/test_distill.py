"""Distillation lowers the error on calls it has not seen, or changes nothing; it goes on after an interruption to the same bits."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate.answers import exact_outputs, outputs
from dqtk.calibrate.replay import Call
from dqtk.calibrate.stats import Stats
from dqtk.checkpoint import quantized_layers
from dqtk.refine import descent
from dqtk.refine import distill as distill_module
from dqtk.refine.descent import call_at, rate_at
from dqtk.refine.distill import distill
from dqtk.refine.learning import Refined
from dqtk.resolve import call_kwargs_for
from dqtk.spec import Distill, Dynamic, FinalLatents, Int, LayerSpec, PerGroup, RankDecay, Reconstruct, TensorSpec

W3A4 = LayerSpec(
    weight=TensorSpec(format=Int(bits=3), granularity=PerGroup(size=32)),
    input=TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32), range=Dynamic()),
)
BRIEF = Distill(iterations=60)


class Denoiser(nn.Module):
    """[B, T, 32] with a norm, a table and two layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.table = nn.LayerNorm(32), nn.Parameter(torch.zeros(4, 32))
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32, bias=False))
        self.dtype = torch.float32

    def forward(self, sample, timestep):
        return (sample + self.layers(self.norm(sample) + self.table[(timestep * 3).long()]),)


def teacher():
    torch.manual_seed(0)
    return Denoiser().requires_grad_(False)


def calls(runs=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    times = [(run, time) for run in range(runs) for time in (0.2, 0.5, 0.9)]
    return [
        Call("unet", (), {"sample": torch.randn(8, 6, 32, generator=draw), "timestep": torch.tensor(t)}, t, run) for run, t in times
    ]


def student(exact_model):
    module = copy.deepcopy(exact_model)
    rule = dqtk.Rule(spec=W3A4, why="test")
    return dqtk.quantize(module, dqtk.plan(module, dqtk.Recipe(name="w3a4", rules=(rule,))), progress=False)


def case(runs=4):
    exact_model = teacher()
    given = calls(runs)
    return student(exact_model), given, exact_outputs({"unet": exact_model}, Stats(calls=given))["unet"], exact_model


def error(module, exact_model, given):
    pairs = zip(outputs(module, given), outputs(exact_model, given), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs) / len(given)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_error_falls_on_calls_that_nothing_has_seen(rank):
    module, given, exact, exact_model = case(runs=12)
    new = calls(seed=1)
    before = error(module, exact_model, new)
    found = distill(module, given, exact, replace(BRIEF, iterations=200, rank=rank), progress=False)
    assert found.kept
    assert found.after < found.before
    assert error(module, exact_model, new) < 0.9 * before
    held_out = [call for call in given if call.run in (3, 11)]
    assert error(module, exact_model, held_out) == pytest.approx(found.after, rel=1e-4)  # stored as it learned


def test_codes_scales_and_small_numbers_learn_and_matrices_stay():
    module, given, exact, _ = case()
    module.extra = nn.Embedding(3, 4)
    before = copy.deepcopy(module.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    distill(module, given, exact, BRIEF, progress=False)
    after = module.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert "extra.weight" in same
    assert (
        not {"norm.weight", "norm.bias", "table", "layers.0.qweight", "layers.0.scale", "layers.0.bias", "layers.2.qweight"} & same
    )
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {name: (t.shape, t.dtype) for name, t in after.items()}
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in module.parameters())


def test_matrices_that_are_not_quantized_learn_where_asked():
    module, given, exact, _ = case()
    module.extra, module.layers[2] = nn.Embedding(3, 4), nn.Linear(64, 32, bias=False)
    torch.nn.init.normal_(module.layers[2].weight, std=0.05)
    before = copy.deepcopy(module.state_dict())
    choice = replace(BRIEF, weight_rate=0, scale_rate=0, bias_rate=0, matrix_rate=0.01)
    found = distill(module, given, exact, choice, progress=False)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"layers.2.weight"}
    assert found.after < found.before


def test_rates_of_zero_leave_numbers_alone():
    module, given, exact, _ = case()
    before = copy.deepcopy(module.state_dict())
    distill(module, given, exact, replace(BRIEF, weight_rate=0, scale_rate=0, bias_rate=0.01), progress=False)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"norm.weight", "norm.bias", "table", "layers.0.bias"}


def test_what_unseen_calls_do_not_confirm_is_not_kept():
    module, given, exact, _ = case()
    wrong = [y + 0.5 if call.run < 3 else y for call, y in zip(given, exact, strict=True)]  # those that are learned from
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match=r"distillation of unet lowers no error on calls that it has not seen \(.* -> .*\)"):
        found = distill(module, given, wrong, replace(BRIEF, bias_rate=0.05), name="unet", progress=False)
    assert not found.kept
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def interrupted(monkeypatch, file, at):
    """A student whose learning stops at an iteration, as by Ctrl-C."""
    module, given, exact, _ = case()
    before = copy.deepcopy(module.state_dict())

    def stopping(iteration, num, seed):
        if iteration == at:
            raise KeyboardInterrupt
        return call_at(iteration, num, seed)

    with monkeypatch.context() as patch:
        patch.setattr(distill_module, "call_at", stopping)
        with pytest.raises(KeyboardInterrupt):
            distill(module, given, exact, BRIEF, file=file, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    return module, given, exact


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, given, exact, _ = case()
    distill(whole, given, exact, BRIEF, progress=False)
    file = tmp_path / "state" / "unet.safetensors"
    module, given, exact = interrupted(monkeypatch, file, at=47)
    asked = []
    monkeypatch.setattr(distill_module, "call_at", lambda i, num, seed: asked.append(i) or call_at(i, num, seed))
    distill(module, given, exact, BRIEF, file=file, progress=False)
    assert asked == list(range(45, 60))  # saved every third
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    assert [path.name for path in file.parent.iterdir()] == ["unet.safetensors"]


def test_a_file_of_another_run_is_refused(tmp_path):
    module, given, exact, _ = case()
    file = tmp_path / "state.safetensors"
    first = copy.deepcopy(module)
    distill(first, given, exact, replace(BRIEF, iterations=2), file=file, progress=False)
    for other, choice in ((module, BRIEF), (first, replace(BRIEF, iterations=2))):
        with pytest.raises(ValueError, match=r"refine: .*state.safetensors must belong to this model, these calls and this choice"):
            distill(other, given, exact, choice, file=file, progress=False)
    file.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"refine: .* must be a file of an interrupted run, got .*Remove it"):
        distill(module, given, exact, BRIEF, file=file, progress=False)


def test_what_cannot_learn_is_refused():
    module, given, exact, exact_model = case(runs=2)
    with pytest.raises(ValueError, match=r"refine: model must have quantized layers and calls of at least two .* got 0 and 2"):
        distill(exact_model, given, exact, BRIEF, progress=False)
    with pytest.raises(ValueError, match="got 2 and 1"):
        distill(module, given[:3], exact[:3], BRIEF, progress=False)
    broken = [torch.full_like(y, torch.nan) for y in exact]
    with pytest.raises(ValueError, match="refine: loss must be a number, got nan at iteration 0"):
        distill(module, given, broken, BRIEF, progress=False)
    for wrong, said in (({"iterations": 0}, "iterations must be a positive integer"), ({"scale_rate": 2}, "scale_rate must be")):
        with pytest.raises(ValueError, match=f"Distill: {said}"):
            Distill(**wrong)


def test_every_call_has_its_turn_and_rates_end_at_zero():
    for turn in range(3):
        assert sorted(call_at(turn * 7 + place, 7, seed=1) for place in range(7)) == list(range(7))
    assert [call_at(i, 7, 1) for i in range(7)] != [call_at(i, 7, 1) for i in range(7, 14)]
    rates = [rate_at(i, 100) for i in range(100)]
    assert rates.index(max(rates)) == 4
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 1e-3


# --- a pipeline ------------------------------------------------------------------------------------------------------

PROMPTS = ("a large red circle on a plain blue background", "two small green squares", "a yellow digit 7", "three blue triangles")


@pytest.mark.parametrize(
    ("name", "dtype", "choice"),
    [
        ("pixart", torch.bfloat16, Distill(iterations=6, weight_rate=0.5, judge=FinalLatents(prompts=PROMPTS[2:3]))),
        (
            "pixart",
            torch.float32,
            Distill(iterations=6, weight_rate=0.5, decay=RankDecay(rank=4), exact_start=True, guidance=4.5),
        ),
        ("sdxl", torch.float32, Reconstruct(iterations=6, weight_rate=0.5)),
    ],
)
def test_a_refined_pipeline_is_saved_and_loaded(load_tiny, draw, tmp_path, monkeypatch, name, dtype, choice):
    monkeypatch.setattr(Refined, "kept", property(lambda self: True))  # a few large steps do not help: they are kept
    monkeypatch.setattr(descent, "RISE", math.inf)
    pipe = load_tiny(name, dtype)
    component, pattern = {"pixart": ("transformer", "transformer_blocks.0.*"), "sdxl": ("unet", "mid_block.*")}[name]
    plan = dqtk.plan(pipe, dqtk.Recipe(name="w3a4", rules=(dqtk.Rule(pattern=pattern, spec=W3A4, why="test"),)))
    kwargs = call_kwargs_for(pipe) | {"num_inference_steps": 2}
    stats = dqtk.calibrate(pipe, PROMPTS[:2], plan, call_kwargs=kwargs, batch_size=1, keep_calls=True, progress=False)
    plain = dqtk.quantize(copy.deepcopy(pipe), plan, progress=False)
    dqtk.quantize(pipe, plan, stats, refine=choice, call_kwargs=kwargs, checkpoint=tmp_path / "state", progress=False)
    before, after = (quantized_layers(p.components[component]) for p in (plain, pipe))
    assert any(not torch.equal(before[path].qweight, layer.qweight) for path, layer in after.items())
    dqtk.save(pipe, tmp_path / "saved")
    assert torch.equal(draw(dqtk.load(tmp_path / "saved")), draw(pipe))
    assert all(path.name.startswith(component) for path in (tmp_path / "state").iterdir())


def test_quantize_says_what_refine_needs(bare, load_tiny):
    with pytest.raises(ValueError, match="quantize: correct and refine must be left out where no denoiser of a pipeline"):
        dqtk.quantize(bare, "w8a16", Stats(calls=calls()), refine=BRIEF, progress=False)
    with pytest.raises(
        ValueError, match="quantize: checkpoint must be left out with recipe w8a16, which learns nothing from inputs"
    ):
        dqtk.quantize(bare, "w8a16", checkpoint="here", progress=False)
    with pytest.raises(ValueError, match=r"correct and refine must be left out where .* got refine for a bare Sequential"):
        dqtk.quantize(bare, "w8a16", refine=BRIEF, progress=False)
