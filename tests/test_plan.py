"""Plans: which rule decides, what errors say, what survives JSON, and whether the sizes are the bytes on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import dqtk
from dqtk.decide import resolve
from dqtk.fit import fit
from dqtk.plan import Plan, Recipe, Rule
from dqtk.recipes import RECIPES, recipe_named
from dqtk.sites import Site
from dqtk.spec import (
    Dynamic,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerToken,
    Smooth,
    TensorSpec,
    TwoLevel,
    describe,
)

DATA = Path(__file__).parent / "data"
W8 = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()))
W4 = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64)))


def decisions(plan):
    return {choice.site.path: (describe(choice.spec), choice.why) for choice in plan.choices}


# --- rules -----------------------------------------------------------------------------------------------------------


def test_a_rotation_says_which_blocks_it_takes():
    w4 = recipe_named("w4a8-rtn").main_spec()
    for asked, real, why in (
        (Hadamard(block=48), 32, "64 channels have no blocks of 48"),
        (Hadamard(block=512), 64, "64 channels have no blocks of 512"),
        (Hadamard(block=8, regular=True), 4, "64 channels have no regular blocks of 8"),
    ):
        plan = dqtk.plan(
            torch.nn.Sequential(torch.nn.Linear(64, 64)),
            Recipe(name="mine", rules=(Rule(spec=replace(w4, transforms=(asked,)), why="mine"),)),
        )
        (choice,) = plan.choices
        assert choice.spec.transforms == (replace(asked, block=real),)
        assert choice.why == f"mine; rotated in blocks of {real}: {why}"
        assert describe(choice.spec).endswith(f", rotated {real}" + (" regular" if asked.regular else ""))


def test_first_matching_rule_decides(meta_pipe):
    recipe = Recipe(
        name="mine",
        rules=(
            Rule(pattern="blocks.0.*", spec=None, why="first block"),
            Rule(roles=("ff.up",), spec=W4, why="up"),
            Rule(pattern="*.ff.*", spec=W8, why="rest of ff"),
            Rule(pattern="transformer:blocks.1.a.*.to_q", roles=("self_attn.q",), spec=W8, why="q"),
        ),
    )
    plan = resolve(recipe, meta_pipe, only=["transformer"])
    got = {path: why for path, (_, why) in decisions(plan).items()}
    assert {why for path, why in got.items() if path.startswith("blocks.0.")} == {"first block"}
    assert got["blocks.1.ff.fc1"] == "up"
    assert got["blocks.1.ff.fc2"] == "rest of ff"
    assert got["blocks.1.a.self_attn.to_q"] == "q"
    assert got["blocks.1.a.self_attn.to_k"] == "no rule"
    assert decisions(plan)["blocks.1.a.self_attn.to_k"][0] == "16 bit"


def test_overrides_come_first_and_in_order(meta_pipe):
    plan = dqtk.plan(meta_pipe, "w8a8", overrides={"*.fc1": "w4a16", "*.ff.*": None, "proj_out": W8})
    got = decisions(plan)
    assert got["blocks.0.ff.fc1"] == ("W4 group 64 asym, A16", "set by request")
    assert got["blocks.0.ff.fc2"] == ("16 bit", "kept by request")
    assert got["proj_out"] == ("W8 per channel, A16", "set by request")
    assert got["proj_in"] == ("16 bit", "kept: first layer on the latents")
    assert got["blocks.0.a.self_attn.to_q"] == ("W8 per channel, A8 per token", "w8a8: default")


def test_text_encoders_are_left_unless_asked_and_overrides_reach_them(meta_pipe):
    assert [c.name for c in dqtk.plan(meta_pipe, "w8a8").components] == ["transformer"]
    plan = dqtk.plan(
        meta_pipe, "w8a8", text_encoders="w8a16", overrides={"text_encoder:*.to_v": None, "*.fc2": None, "*.to_out": "w4a16"}
    )
    assert plan.recipe == "w8a8, text encoders w8a16"
    got = {choice.site.id: (describe(choice.spec), choice.why) for choice in plan.choices}
    assert got["text_encoder:layers.0.self_attn.to_v"] == ("16 bit", "kept by request")
    assert got["text_encoder:layers.0.self_attn.to_q"] == ("W8 per channel, A16", "w8a16: default")
    assert got["transformer:blocks.0.a.self_attn.to_v"] == ("W8 per channel, A8 per token", "w8a8: default")
    assert got["transformer:blocks.0.ff.fc2"] == ("16 bit", "kept by request")
    for site in ("text_encoder:layers.0.self_attn.to_out", "transformer:blocks.0.a.self_attn.to_out"):
        assert got[site] == ("W4 group 64 asym, A16", "set by request")
    assert plan.of("text_encoder").choices == tuple(c for c in plan.choices if c.site.component == "text_encoder")


def test_adapter_keeps_come_after_overrides(meta_pipe):
    adapter = dqtk.Adapter(classes=("ModuleDict",), keep=(("*.to_q", "family says so"),))
    kwargs = {"only": ["transformer"], "adapters": {"ModuleDict": adapter}}
    assert decisions(resolve(recipe_named("w8a8"), meta_pipe, **kwargs))["blocks.0.a.self_attn.to_q"][1] == "family says so"
    asked = resolve(recipe_named("w8a8"), meta_pipe, overrides=[Rule(pattern="*.to_q", spec=W8, why="asked")], **kwargs)
    assert decisions(asked)["blocks.0.a.self_attn.to_q"][1] == "asked"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_pattern_that_matches_nothing(meta_pipe):
    with pytest.raises(
        ValueError,
        match=r"plan: pattern must match at least one of 14 sites, got '\*\.ff\.fc3'\. Did you mean 'ff\.fc\d'\?",
    ):
        dqtk.plan(meta_pipe, "w8a8", overrides={"*.ff.fc3": None})
    with pytest.raises(ValueError, match=r"got 'blocks\.0\.ff\.fc'\. Did you mean 'blocks\.0\.ff\.fc\d'\?"):
        dqtk.plan(meta_pipe, "w8a8", overrides={"blocks.0.ff.fc": None})
    with pytest.raises(ValueError, match=r"got 'zzz'\. Patterns are globs on the names that explain lists\."):
        dqtk.plan(meta_pipe, "w8a8", text_encoders="w8a8", overrides={"zzz": None})


def test_unknown_names(meta_pipe):
    with pytest.raises(ValueError, match=r"recipe: name must be one of w8a16, .*, fp8, .*, got 'w8a9'\. Did you mean 'w8a8'\?"):
        dqtk.plan(meta_pipe, "w8a9")
    with pytest.raises(ValueError, match=r"recipe: name must be one of .*, got 'W4'\."):
        dqtk.plan(meta_pipe, "w8a8", overrides={"*": "W4"})
    with pytest.raises(ValueError, match=r"Rule: roles must be among .*, got 'ff.upp'\. Did you mean 'ff.up'\?"):
        Rule(roles=("ff.upp",), spec=None, why="")
    with pytest.raises(
        ValueError, match=r"components must be among transformer, text_encoder, got 'tranformer'\. Did you mean 'transformer'\?"
    ):
        resolve(recipe_named("w8a8"), meta_pipe, only=["tranformer"])
    with pytest.raises(ValueError, match=r"text_encoders must be None for a target without text encoders, got 'w8a8'\. Leave it"):
        dqtk.plan(nn.Linear(8, 8), "w8a8", text_encoders="w8a8")


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match=r"plan: target must have something to quantize, got 0 sites: every site is kept\."):
        dqtk.plan(nn.LayerNorm(8), "w8a8")


# --- fitting a spec to a layer ---------------------------------------------------------------------------------------


def site(*shape, bias=True):
    return Site(id="m:x", kind="linear" if len(shape) == 2 else "conv", role="other", shape=shape, bias=bias)


@pytest.mark.parametrize("kind", [PerGroup, TwoLevel])
@pytest.mark.parametrize(
    ("channels", "granularity", "note"),
    [
        (128, "same", ""),
        (96, 32, "groups of 32: 64 does not divide 96 channels"),
        (48, 16, "groups of 16: 64 does not divide 48 channels"),
        (40, None, "8 bit per channel: no group of 64 or its half or quarter divides 40 channels"),
    ],
)
def test_groups_shrink_and_say_so(kind, channels, granularity, note):
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=kind(size=64)))
    for shape in ((8, channels), (8, channels, 3, 3)):
        fitted, said = fit(spec, site(*shape))
        assert said == note
        if granularity == "same":
            assert fitted == spec
        elif granularity is None:
            assert (fitted.weight.format, fitted.weight.granularity) == (Int(bits=8), PerChannel())
        else:
            assert (fitted.weight.format, fitted.weight.granularity) == (Int(bits=4), kind(size=granularity))


def test_fp8_groups_that_do_not_divide_stay_fp8():
    fitted, note = fit(LayerSpec(weight=TensorSpec(format=Float(), granularity=PerGroup(size=64))), site(8, 40))
    assert (fitted.weight.format, fitted.weight.granularity) == (Float(), PerChannel())
    assert note.startswith("8 bit per channel")


def test_a_layer_keeps_what_it_admits():
    branch = replace(recipe_named("w4a8-rtn").main_spec(), low_rank=LowRank(rank=4), correct_bias=True)
    assert fit(branch, site(8, 64, bias=True)) == (branch, "")
    fitted, note = fit(branch, site(8, 64, 3, 3, bias=False))
    assert (fitted.low_rank, fitted.correct_bias) == (None, False)
    assert note == "no low-rank branch: convolution; no bias to correct"


def test_microscaling_groups_that_do_not_divide():
    spec = LayerSpec(
        weight=TensorSpec(format=Float(exponent=2, mantissa=1), granularity=E8M0Group()),
        input=TensorSpec(format=Float(exponent=2, mantissa=1), granularity=E8M0Group(), range=Dynamic()),
    )
    fitted, note = fit(spec, site(8, 48))
    assert (fitted.weight.granularity, fitted.input.granularity) == (E8M0Group(size=16), E8M0Group(size=16))
    assert note == "groups of 16: 32 does not divide 48 channels"  # once for both
    fitted, note = fit(spec, site(8, 6))
    assert (fitted.weight.format, fitted.weight.granularity) == (Float(), PerChannel())
    assert (fitted.input.format, fitted.input.granularity) == (Float(), PerToken())
    assert "8 bit per channel: no group of 32 or its half or quarter divides 6 channels; 8 bit per token" in note


# --- JSON, hash, diff ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_json_round_trip(meta_pipe, recipe):
    plan = dqtk.plan(meta_pipe, recipe, text_encoders=recipe)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.hash == plan.hash


def test_hash_covers_specs_and_not_words(meta_pipe):
    plan = dqtk.plan(meta_pipe, "w8a8")
    data = plan.to_json()
    data["choices"][0]["why"] = "because"
    data["recipe"] = "another name"
    assert Plan.from_json(data).hash == plan.hash
    wishes = (None, {"*.fc1": None}, {"*.fc2": None}, {"*.fc2": "w4a8-rtn"})
    hashes = {dqtk.plan(meta_pipe, "w8a8", overrides=wish).hash for wish in wishes}
    assert len(hashes) == 4
    assert dqtk.plan(meta_pipe, "w8a8").hash == plan.hash


FIELDS = r"p\.json: plan must have the fields that to_json writes, got: "
HASH = r"p\.json: hash must be \w{16} for these choices, got "


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["choices"][3].update(spec=None), HASH + r"\w{16}\. The file was edited; make the plan again\."),
        (lambda d: d["choices"][3]["site"].update(shape=[1, 2]), HASH),
        (lambda d: d["specs"]["s0"]["weight"]["format"].update(bits=4), HASH),
        (lambda d: d.pop("hash"), HASH + "None"),
        (lambda d: d["specs"]["s0"]["weight"].update(format={"type": "Imt"}), r"specs\.s0.*got 'Imt'\. Did you mean 'Int'"),
        (lambda d: d["choices"][3].update(spec="s9"), r"spec of transformer:\S+ must be one of \['s0'\], got 's9'\. Make the"),
        (lambda d: d["choices"][3]["site"].update(colour="red"), FIELDS + ".*colour"),
        (lambda d: d.pop("choices"), FIELDS + "'choices'"),
        (lambda d: d.update(format_version=2), r"p\.json: format_version must be 1, got 2\. Update dqtk to read newer plans\."),
        (lambda d: d.clear(), r"p\.json: format_version must be 1, got None"),
    ],
)
def test_edited_plans_are_refused(meta_pipe, edit, says):
    data = dqtk.plan(meta_pipe, "w8a8").to_json()
    edit(data)
    with pytest.raises(ValueError, match=says):
        Plan.from_json(data, "p.json")


def test_diff_names_sites_whose_spec_differs(meta_pipe):
    a, b = dqtk.plan(meta_pipe, "w8a8"), dqtk.plan(meta_pipe, "w8a8", overrides={"blocks.1.ff.fc1": None}, text_encoders="w8a8")
    lines = a.diff(b)
    assert lines[0] == "transformer:blocks.1.ff.fc1: W8 per channel, A8 per token -> 16 bit"
    assert lines[1] == "text_encoder:layers.0.self_attn.to_q: absent -> W8 per channel, A8 per token"
    assert len(lines) == 5
    assert a.diff(a) == []


def test_golden_plan(meta_pipe):
    """Frozen: plans are files that people keep. Written by ``json.dumps(plan.to_json(), indent=1)``."""
    plan = dqtk.plan(meta_pipe, "w4a8-rtn", text_encoders="w8a16", overrides={"*.fc2": None})
    assert json.loads(json.dumps(plan.to_json())) == json.loads((DATA / "plan_w4a8.json").read_text())


# --- explain and sizes -----------------------------------------------------------------------------------------------


def test_explain_lists_every_site_and_totals(meta_pipe):
    plan = dqtk.plan(meta_pipe, "w4a8-rtn", text_encoders="w8a16", overrides={"blocks.1.ff.fc2": None})
    text = plan.explain()
    assert text.startswith(f"recipe w4a8-rtn, text encoders w8a16, plan {plan.hash}\n")
    rows = {line.split()[0]: line for line in text.splitlines() if line}
    for choice in plan.choices:
        row = rows[choice.site.path]
        assert choice.site.role in row
        assert describe(choice.spec) in row
        assert row.endswith(choice.why)
    assert "64x8 " in rows["proj_in"]
    assert "16 bit" in rows["blocks.1.ff.fc2"]
    total = rows["transformer"]
    size = plan.sizes("transformer")
    assert f"{size['bytes_after'] / size['bytes_before']:.3f}" in total
    assert f"{100 * (1 - size['quantized_share']):.1f} %" in total
    assert "text_encoder (ModuleDict): 4 sites" in text


def test_explain_by_role_counts_every_site(meta_pipe):
    plan = dqtk.plan(meta_pipe, "w8a8")
    text = plan.explain(sites=False)
    assert "blocks.0" not in text
    rows = [line.split("  ") for line in text.partition("\ndevice  ")[0].splitlines()]
    counts = [int(cell) for row in rows for cell in row[2:] if cell.strip().isdigit()]
    assert sum(counts) == len(plan.choices)


# Solvers choose codes, not what is stored: one recipe per set of tensors is enough.
SAME = ("fp4", "w4a8", "w4a4-rot", "vqdm-2bit", "vqdm-3bit", "vqdm-4bit", "trellis-2bit", "trellis-4bit")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in SAME])
def test_sizes_are_the_bytes_on_disk(load_tiny, tmp_path, recipe):
    """Exactly, tensor by tensor; the file adds its header (names, and a digest for each)."""
    pipe = load_tiny("pixart", torch.bfloat16)
    plan = dqtk.plan(pipe, recipe)
    stats = None
    if plan.needs_stats:
        from dqtk.resolve import call_kwargs_for

        kwargs = call_kwargs_for(pipe) | {"num_inference_steps": 1}
        stats = dqtk.calibrate(pipe, ["a circle"], plan, call_kwargs=kwargs, progress=False)
    dqtk.quantize(pipe, plan, stats, progress=False)
    pipe.transformer.save_pretrained(tmp_path / "t")
    (file,) = (tmp_path / "t").glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    promised = plan.sizes("transformer")["bytes_after"]
    stored = file.stat().st_size - header
    if recipe == "w8a8-levels":  # how many ranges a layer needs is found later: the plan promises the most
        assert promised - 64 * len(plan.choices) <= stored <= promised
    elif any(
        choice.spec is not None and choice.spec.looks for choice in plan.choices
    ):  # a T5 has no constant token; its place is promised
        assert 0.99 * promised <= stored <= promised
    else:
        assert stored == promised
    assert header <= 0.03 * promised
    with safe_open(file, framework="pt") as tensors:
        names = set(tensors.keys())
    assert {f"{c.site.path}.qweight" in names for c in plan.choices if c.spec} == {True}
    assert all(f"{c.site.path}.weight" in names for c in plan.choices if not c.spec)


def test_channels_that_cannot_be_rotated_are_not():
    """Of 6 channels there is no Hadamard matrix; the rest of the spec stays, and the plan says so."""
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()), transforms=(Smooth(alpha=0.5), Hadamard()))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    odd, even = dqtk.plan(model, Recipe(name="r", rules=(Rule(spec=spec, why="all"),))).choices
    assert odd.spec == replace(spec, transforms=(Smooth(alpha=0.5),))
    assert odd.why == "all; not rotated: 6 channels are no multiple of 4"
    assert even.spec == spec


def test_layers_too_wide_to_learn_are_rounded_and_say_so():
    """Their second moments would not fit; smoothing needs a sample only and stays."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"wide": nn.Linear(16448, 64), "usual": nn.Linear(64, 64)})])})
    plan = dqtk.plan(model.to("meta"), "w4a8")
    wide, usual = (next(c for c in plan.choices if c.site.path.endswith(name)) for name in ("wide", "usual"))
    assert "rounded to nearest: second moments of 16448 inputs would take 2.0 GiB" in wide.why
    assert (type(wide.spec.solver).__name__, type(usual.spec.solver).__name__) == ("RTN", "GPTQ")
    assert wide.spec.transforms == usual.spec.transforms
