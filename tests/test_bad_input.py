"""Whatever people hand in by mistake: a clear error, and nothing lost, changed or overwritten.

Damaged checkpoints have their tests in test_checkpoint.py and the backends' files, folders and hub ids in test_sources.py.
"""

import dataclasses
import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dqtk
from dqtk.checkpoint import quantized_layers
from dqtk.cli import main
from dqtk.recipes import RECIPES
from dqtk.resolve import call_kwargs_for
from dqtk.spec import Int, LayerSpec, PerGroup, TensorSpec

HOUSE_STYLE = r"^[^:]+: .* must .*, got.*[.?]$"


def unchanged(module, before):
    return quantized_layers(module) == {} and all(torch.equal(before[n], t) for n, t in module.state_dict().items())


def spoil(module, how):
    """Damage the last layer, so that a check layer by layer would come too late."""
    last = module[4]
    if how == "integer":
        last.weight = nn.Parameter(torch.zeros(16, 64, dtype=torch.int8), requires_grad=False)
    elif how == "float8":
        last.weight = nn.Parameter(last.weight.to(torch.float8_e4m3fn), requires_grad=False)
    elif how == "meta":
        last.to("meta")
    elif how == "bias":
        last.bias.data[2] = float("nan")
    elif how == "hook":
        last.register_forward_hook(lambda module, args, output: output)
    else:
        last.weight.data[3, 5] = float(how)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", r"quantize: model:4 must have finite weights, got NaN or infinity\. The checkpoint is damaged; load it again"),
        ("inf", r"quantize: model:4 must have finite weights, got NaN or infinity"),
        ("-inf", r"quantize: model:4 must have finite weights, got NaN or infinity"),
        ("integer", r"quantize: model:4 must be float32, bfloat16 or float16, got torch\.int8\. Load the unquantized model\."),
        ("float8", r"quantize: model:4 must be float32, bfloat16 or float16, got torch\.float8_e4m3fn\."),
        ("bias", r"quantize: model:4 must have a finite bias, got NaN or infinity\."),
        ("hook", r"quantize: model:4 must have no hooks, got some \(offloading, .*\)\. Quantize first"),
        ("meta", r"quantize: model:4 must have real weights, got a meta tensor\. Load the model with from_pretrained"),
    ],
)
def test_bad_weights_are_found_before_anything_changes(bare, how, says):
    spoil(bare, how)
    with pytest.raises(ValueError, match=says) as error:
        dqtk.quantize(bare, "w8a8", progress=False)
    assert re.match(HOUSE_STYLE, str(error.value))
    assert quantized_layers(bare) == {}
    assert type(bare[0]) is nn.Linear
    dqtk.quantize(bare, dqtk.plan(bare, "w8a8", overrides={"4": None}), progress=False)  # the remedy works
    assert list(quantized_layers(bare)) == ["0", "2"]


def test_a_plan_that_does_not_fit_changes_nothing(bare):
    """Made by hand or edited: its group size divides the first layer's inputs and not the second's."""
    plan = dqtk.plan(bare, "w4a16")
    odd = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerGroup(size=40)))
    wrong = dataclasses.replace(plan, choices=(plan.choices[0], *(dataclasses.replace(c, spec=odd) for c in plan.choices[1:])))
    with pytest.raises(ValueError, match="group size must divide the 96 inputs"):
        dqtk.quantize(bare, wrong, progress=False)
    assert quantized_layers(bare) == {}


def test_plan_of_another_model(bare):
    before = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    other = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False))
    with pytest.raises(ValueError, match=r"quantize: plan must fit the model at model:2: \(32, 96\), got \(64, 96\)\. Make"):
        dqtk.quantize(bare, dqtk.plan(other, "w8a8"), progress=False)
    longer = nn.Sequential(*[nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False)], nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"quantize: plan must fit the model at model:3: \(64, 64\), got None\."):
        dqtk.quantize(bare, dqtk.plan(longer, "w8a8"), progress=False)
    assert unchanged(bare, before)


def test_plan_of_another_pipeline(load_tiny, bare):
    plan = dqtk.plan(load_tiny("sdxl"), "w8a8")
    with pytest.raises(ValueError, match=r"quantize: plan must be for components \['text_encoder', 'transformer'\], got unet\."):
        dqtk.quantize(load_tiny("pixart"), plan, progress=False)
    with pytest.raises(ValueError, match=r"quantize: plan must be for components \['model'\], got unet\."):
        dqtk.quantize(bare, plan, progress=False)


def test_quantizing_twice(bare):
    plan = dqtk.plan(bare, "w8a8")
    dqtk.quantize(bare, plan, progress=False)
    codes = [layer.qweight.clone() for layer in quantized_layers(bare).values()]
    with pytest.raises(ValueError, match=r"quantize: model:0 must be unquantized, got W8 per channel, A8 per token already\."):
        dqtk.quantize(bare, plan, progress=False)
    with pytest.raises(ValueError, match=r"target must have something to quantize, got 3 sites: 3 layers are quantized already\."):
        dqtk.quantize(bare, "w4a8-rtn", progress=False)
    assert all(torch.equal(a, b.qweight) for a, b in zip(codes, quantized_layers(bare).values(), strict=True))


def test_missing_statistics(bare, load_tiny):
    before = {name: tensor.clone() for name, tensor in bare.state_dict().items()}
    with pytest.raises(ValueError, match=r"quantize: stats must be Stats or their file, got list\. Prompts are prompts=\[\.\.\.\]"):
        dqtk.quantize(load_tiny("pixart"), "w8a8-static", ["a circle"])
    with pytest.raises(
        ValueError, match=r"'w8a8-static' must have statistics .*got none\. Pass the pipeline that it is part of; where"
    ):
        dqtk.quantize(load_tiny("pixart").transformer, "w8a8-static")
    with pytest.raises(ValueError, match=r"plan: overrides must be a Mapping, got \['\*\.to_q'\]\. For example {"):
        dqtk.plan(load_tiny("pixart"), "w8a8", overrides=["*.to_q"])
    with pytest.raises(
        ValueError, match=r"quantize: call_kwargs must .* got 'num_inferece_steps'\. Did you mean 'num_inference_steps'\?"
    ):
        dqtk.quantize(load_tiny("sdxl"), "w8a8-static", prompts=["a circle"], call_kwargs={"num_inferece_steps": 3})
    with pytest.raises(
        ValueError, match=r"quantize: recipe 'w8a8-static' must have statistics .*got none\. Pass the pipeline that"
    ):
        dqtk.quantize(bare, "w8a8-static", progress=False)
    with pytest.raises(ValueError, match=r"Stats: model:0 must have been called during calibration, got no statistics\."):
        dqtk.quantize(bare, "w8a8-static", dqtk.Stats(), progress=False)
    assert unchanged(bare, before)


def test_zero_prompts(load_tiny):
    pipe = load_tiny("pixart")
    for call in (
        lambda: dqtk.quantize(pipe, "w8a8-static", prompts=[], progress=False),
        lambda: dqtk.calibrate(pipe, [], dqtk.plan(pipe, "w8a8-static"), call_kwargs=call_kwargs_for(pipe)),
    ):
        with pytest.raises(ValueError, match=r"calibrate: prompts must hold at least one prompt, got none\."):
            call()
    assert quantized_layers(pipe.transformer) == {}


def test_things_that_are_no_model(tmp_path):
    for thing in ("tiny-pixart", None, {"unet": 1}, tmp_path):
        with pytest.raises(ValueError, match=r"components_of: target must be a diffusers pipeline or an nn\.Module, got "):
            dqtk.plan(thing, "w8a8")
    with pytest.raises(ValueError, match=r"load: folder must hold model_index\.json or config\.json, got .*\. Save with"):
        dqtk.load(tmp_path)


# --- the same from the shell ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_folders, tmp_path):
    shutil.copytree(tiny_folders["pixart"], tmp_path / "pixart")
    return tmp_path / "pixart"


@pytest.fixture
def shell(capsys, tmp_path):
    """Function (*words) -> the one line of the error; nothing else was printed and no output folder exists."""

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("dqtk ")]
        assert printed.out == ""
        assert len(lines) == 1
        assert "Traceback" not in printed.err
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*partial"))
        return lines[0]

    return run


def set_weight(folder, value):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.3.attn1.to_q.weight"][0, 0] = value
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--recipe", "w8a9"], f"recipe: name must be one of {', '.join(RECIPES)}, or of attention alone dense, paro, "),
        (["--recipe", "dense", "--density", "0.5"], "attention: density must be left out for dense, got 0.5. Take paro."),
        (["--recipe", "sage", "--density", "0.5"], "attention: density must be left out for sage, got 0.5. Take paro-int8."),
        ([], f"--recipe must be one of {', '.join(RECIPES)}, got none. Add it."),
        (["--recipe", "w4a8"], "--prompts or --stats must be given for recipe w4a8, got neither. It is calibrated."),
        (["--recipe", "w8a8", "--keep", "*.attn9.*"], "plan: pattern must match at least one of 67 sites, got '*.attn9.*'."),
        (["--recipe", "w8a8", "--set", "*.attn1.*"], "--set must be PATTERN=RECIPE, got '*.attn1.*'. For example"),
        (["--recipe", "w8a8", "--set", "*.attn1.*=w3"], "recipe: name must be one of"),
        (["--recipe", "w8a8", "--text-encoders", "w9"], "recipe: name must be one of"),
        (["--recipe", "w8a8-static"], "--prompts or --stats must be given for recipe w8a8-static, got neither."),
        (["--recipe", "w8a8-static", "--prompts", "nowhere.txt"], "prompts: file must exist, got nowhere.txt."),
        (["--recipe", "w8a8-static", "--prompts", ""], "prompts: list must hold at least one prompt, got none."),
        (["--recipe", "w8a8-static", "--stats", "nowhere"], "--stats: file must exist, got nowhere. Write it with dqtk calibrate."),
        (["--plan", "nowhere.json"], "--plan: file must exist, got nowhere.json."),
        (
            ["--plan", "x", "--recipe", "w8a8"],
            "--plan must stand alone, got --recipe, --text-encoders, --keep, --set, --during",
        ),
        (["--plan", "x", "--keep", "a"], "--plan must stand alone, got --recipe, --text-encoders, --keep, --set, --during"),
        (["--recipe", "w8a8", "--density", "0.3"], "--density must come with --attention or --recipe paro-..., got it without."),
        (["--recipe", "paro", "--attention", "paro-int8"], "--attention must be left out with --recipe paro, got paro-int8."),
        (
            ["--recipe", "w8a8", "--attention", "para"],
            "attention: name must be one of dense, paro, paro-int8, paro-int4, paro-adaptive, sage, got",
        ),
        (["--recipe", "paro", "--density", "0"], "StaticBlocks: density must be in (0, 1], got 0.0. Half of the blocks is 0.5."),
        (["--recipe", "w8a8", "--refine", "distill"], "--prompts or --stats must be given for --refine, got neither."),
        (["--recipe", "w8a8", "--iterations", "5"], "--iterations must come with --refine, got it without."),
        (
            ["--recipe", "w8a8", "--refine", "blocks", "--refine-batch", "2"],
            "--refine-batch must come with --refine distill, got it",
        ),
        (["--recipe", "w8a8", "--refine", "distill", "--candidates", "2"], "--candidates must come with --refine blocks, got it"),
    ],
)
def test_words(shell, folder, tmp_path, words, says):
    assert shell("quantize", folder, *words, "--output", tmp_path / "out").startswith(f"dqtk quantize: error: {says}")


@pytest.mark.parametrize("device", ["tpu", "cuda:77", "meta:x"])
def test_devices_that_are_not_there(shell, folder, tmp_path, device):
    words = ["generate", folder, "--prompts", "x", "--device", device, "--output", tmp_path / "out"]
    said = f"dqtk generate: error: --device must be one of this machine, such as cpu or cuda:0, got {device!r}: "
    assert shell(*words).startswith(said)


def test_unknown_model_from_the_shell(shell, tmp_path):
    for verb in ("explain", "quantize"):
        line = shell(verb, "tiny_pixart!", "--recipe", "w8a8", "--output", tmp_path / "out")
        assert line.startswith(f"dqtk {verb}: error: model: MODEL must be an embedded pipeline (")
    assert "folder must hold model_index.json" in shell("explain", tmp_path, "--recipe", "w8a8")


def test_damaged_inputs_from_the_shell(shell, folder, tmp_path):
    out = ["--output", tmp_path / "out"]
    (tmp_path / "s.safetensors").write_bytes(b"x" * 50)
    line = shell("quantize", folder, "--recipe", "w8a8-static", "--stats", tmp_path / "s.safetensors", *out)
    assert "s.safetensors must be a file written by dqtk calibrate, got: " in line
    (tmp_path / "p.json").write_text("{")
    assert "--plan: " in (line := shell("quantize", folder, "--plan", tmp_path / "p.json", *out))
    assert "must be JSON" in line
    (tmp_path / "p.json").write_text('{"format_version": 2}')
    assert "format_version must be 1, got 2" in shell("quantize", folder, "--plan", tmp_path / "p.json", *out)
    set_weight(folder, float("nan"))
    line = shell("quantize", folder, "--recipe", "w8a8", *out)
    assert "transformer:transformer_blocks.3.attn1.to_q must have finite weights, got NaN or infinity." in line
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 50)
    assert "pytorch_model.safetensors must be complete and readable, got: " in shell("quantize", folder, "--recipe", "w8a8", *out)


def test_plan_of_another_model_from_the_shell(shell, folder, tiny_folders, tmp_path):
    assert main(["explain", str(tiny_folders["sdxl"]), "--recipe", "w8a8", "--output", str(tmp_path / "p.json")]) == 0
    line = shell("quantize", folder, "--plan", tmp_path / "p.json", "--output", tmp_path / "out")
    assert "quantize: plan must be for components ['text_encoder', 'transformer'], got unet." in line


@pytest.mark.parametrize("verb", ["explain", "compare"])
def test_files_that_exist_are_not_replaced(shell, folder, tmp_path, verb):
    notes = tmp_path / "notes.html"
    notes.write_text("MY NOTES")
    words = [folder, "--recipe", "w8a8"] if verb == "explain" else [folder, folder, "--prompts", "a circle"]
    said = shell(verb, *words, "--output", notes)
    assert (
        said == f"dqtk {verb}: error: {verb}: output must be a new file, got {notes}, which exists. Choose another, or remove it."
    )
    assert notes.read_text() == "MY NOTES"


def test_full_output_folder_is_untouched(shell, folder, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("p")
    for words in (["quantize", folder, "--recipe", "w8a8"], ["generate", folder, "--prompts", "x"]):
        line = shell(*words, "--output", full)
        assert f"{words[0]}: folder must be new or empty, got {full}. Nothing was changed;" in line
    assert [path.name for path in full.iterdir()] == ["precious"]


def test_interrupted_from_the_shell(folder, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["dqtk.stages"], "solve_site", interrupt)
    assert main(["quantize", str(folder), "--recipe", "w8a8", "--output", str(tmp_path / "out")]) == 130
    assert "interrupted; nothing half-written was left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pixart"]


def test_already_quantized_from_the_shell(shell, load_tiny, tmp_path):
    pipe = load_tiny("pixart")
    dqtk.quantize(pipe, "w8a8", progress=False)
    dqtk.save(pipe, tmp_path / "q")
    line = shell("quantize", tmp_path / "q", "--recipe", "w4a8-rtn", "--output", tmp_path / "out")
    assert "layers are quantized already. Load the original model." in line
    config = tmp_path / "q" / "transformer" / "config.json"
    stored = json.loads(config.read_text())
    stored["quantization_config"]["format_version"] = 3
    config.write_text(json.dumps(stored))
    assert "format_version must be 2, got 3." in shell("generate", tmp_path / "q", "--prompts", "x", "--output", tmp_path / "out")


def test_arguments_of_a_wrong_kind(bare, load_tiny):
    pipe = load_tiny("pixart")
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerGroup()))
    calls = {
        r"plan: recipe must be a name or a Recipe, got LayerSpec.* Recipe\(name=": lambda: dqtk.plan(bare, spec),
        "plan: recipe must be a name or a Recipe, got None": lambda: dqtk.plan(bare, None),
        r"plan: override of '0' must be a LayerSpec, an AttentionSpec, a recipe's name or None, got Int": lambda: dqtk.plan(
            bare, "w8a8", overrides={"0": Int(bits=4)}
        ),
        r"Recipe: rules must be a tuple, got Rule": lambda: dqtk.Recipe(name="x", rules=dqtk.Rule(spec=spec, why="x")),
        r"Rule: roles must be a tuple of names, got 'ff.up'\. A tuple of one is written": lambda: dqtk.Rule(
            spec=spec, why="x", roles="ff.up"
        ),
        "calibrate: plan must be a Plan, got 'w4a8'": lambda: dqtk.calibrate(pipe, ["a"], "w4a8"),
        "quantize: max_memory must be a positive number of bytes, got 0": lambda: dqtk.quantize(bare, "w8a8", max_memory=0),
        "calibrate: plan must be for components .* got model": lambda: dqtk.calibrate(pipe, ["a"], dqtk.plan(bare, "w8a8-static")),
    }
    for text, call in calls.items():
        with pytest.raises(ValueError, match=text):
            call()


def test_a_plan_of_another_model_is_refused_before_calibrating(load_tiny):
    plan = dqtk.plan(load_tiny("pixart"), "w4a8")
    with pytest.raises(ValueError, match=r"quantize: plan must be for components .*, got transformer\. Make a plan for this model"):
        dqtk.quantize(load_tiny("sdxl"), plan, prompts=["a circle"], progress=False)


def test_what_is_nan_is_said_before_or_while_calibrating(load_tiny):
    """A weight before anything is run; whatever else makes the denoiser's arguments NaN at the first call that was kept."""
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w4a8")
    pipe.transformer.transformer_blocks[1].ff.net[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"quantize: transformer:transformer_blocks\.1\.ff\.net\.2 must have finite weights"):
        dqtk.quantize(pipe, plan, prompts=["a circle"], progress=False)
    pipe = load_tiny("pixart")
    pipe.text_encoder.shared.weight.data[:] = torch.nan
    kwargs = call_kwargs_for(pipe) | {"num_inference_steps": 1}
    with pytest.raises(
        ValueError, match=r"calibrate: encoder_hidden_states of transformer must be numbers, got NaN at noise level"
    ):
        dqtk.calibrate(pipe, ["a circle"], plan, call_kwargs=kwargs, progress=False)


def test_statistics_of_another_dtype_and_from_a_file(load_tiny, tmp_path):
    """Kept calls are made again in the dtype of the model that is quantized; a path will do for statistics."""
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w4a8")
    kwargs = call_kwargs_for(pipe) | {"num_inference_steps": 2}
    dqtk.calibrate(pipe, ["a circle"], plan, call_kwargs=kwargs, output=tmp_path / "s", progress=False)
    for dtype in (torch.float32, torch.bfloat16):
        made = dqtk.quantize(load_tiny("pixart", dtype), plan, tmp_path / "s", progress=False)
        assert len(quantized_layers(made.transformer)) == sum(c.spec is not None for c in plan.choices)
