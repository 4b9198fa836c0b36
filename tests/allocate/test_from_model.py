"""``dqtk.allocate``: a pipeline in memory, the same answer as the verb gives, and a plan that quantize takes."""

import json

import pytest
import torch

import dqtk
from dqtk.allocate.budget import Budget
from dqtk.allocate.wishes import wishes_of
from dqtk.checkpoint import quantized_layers
from dqtk.journal import done
from dqtk.processes import Processes
from dqtk.recipes import recipe_named, search_named
from dqtk.spec import canonical

TWO = Processes(0, 2, torch.device("cpu"), lambda: None)
KEEP = ["*.[1-9].*", "*attn*"]
HOW = {"keep": KEEP, "call_kwargs": {"num_inference_steps": 1}, "progress": False}


@pytest.fixture
def pipe():
    return dqtk.load("tiny-pixart")


def test_a_plan_to_quantize_with(pipe, tmp_path):
    """Learned candidates: the statistics that layers were scored with are those that quantize learns from."""
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    made = dqtk.allocate(pipe, ["a red circle"], ["w4a8", "w8a8"], "15bits", folder=tmp_path / "work", **HOW)
    after = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert made.budget == Budget(amount=15.0, unit="bits")
    assert made.cost <= made.offers.total
    dqtk.quantize(pipe, made.plan, made.stats, progress=False)
    layers = quantized_layers(pipe.transformer)
    assert {f"transformer:{path}": layer.spec for path, layer in layers.items()} == {
        site: spec for site, spec in made.picked.items() if spec is not None
    }
    journal = tmp_path / "work" / "done-0.jsonl"
    rows = journal.read_text()
    sites = {json.loads(row)["layer"].split()[0] for row in rows.splitlines()}
    assert {"transformer:transformer_blocks.0.ff.net.0.proj", "transformer:transformer_blocks.0.ff.net.2", "floor"} <= sites
    again = dqtk.allocate(dqtk.load("tiny-pixart"), ["a red circle"], ["w4a8", "w8a8"], "14.7bits", folder=tmp_path / "work", **HOW)
    assert journal.read_text() == rows
    assert again.cost < made.cost


def test_statistics_in_place_of_prompts(pipe):
    """Nothing is written where no folder is given; given calls are used and given back."""
    first = dqtk.allocate(pipe, ["a red circle"], recipe_named("w4a8-rtn"), "16bits", **HOW)
    second = dqtk.allocate(pipe, None, ["w4a8-rtn"], "16bits", stats=first.stats, **HOW)
    assert second.plan == first.plan
    assert second.stats is first.stats


def test_what_a_search_brings_and_what_goes_before():
    given = {"budget": None, "scores": {}, "ratio": None, "sweep": False, "switch": None}
    assert wishes_of(search_named("auto"), **given) == given | {"budget": Budget(amount=4.5, unit="bits"), "switch": 100}
    mixdq = wishes_of(search_named("mixdq-w3.66a16"), **given)
    assert (mixdq["scores"], mixdq["sweep"], mixdq["switch"]) == ({"content": "ssim"}, True, None)
    own = {"budget": "5bits", "scores": {"content": "psnr"}, "ratio": 1.0, "sweep": False, "switch": 0}
    for name in ("auto", "mixdq-w3.66a16"):
        assert wishes_of(search_named(name), **own) == own


def test_a_search_sweeps_and_exchanges(pipe, capsys):
    """``auto`` with fewer exchanges and a sweep; quantize takes what it finds."""
    prompts = [f"{i} circles" for i in range(8)]
    made = dqtk.allocate(pipe, prompts, "auto", "15.5bits", sweep=True, switch=2, **(HOW | {"progress": True}))
    said = capsys.readouterr().out
    assert "exchanges: 2 tried" in said
    assert "psnr of 8 pictures" in said
    assert made.budget == Budget(amount=15.5, unit="bits")
    assert made.cost <= made.offers.total * (1 + 1e-9)
    dqtk.quantize(pipe, made.plan, made.stats, progress=False)


@pytest.mark.parametrize(("steps", "said"), [(2, "in 2 equal parts of a run"), (6, "in 4 equal parts of a run")])
def test_noise_counts_by_its_harm(pipe, tmp_path, capsys, steps, said):
    """Scores are those of the journal with each part of a run weighed; their sum over the noisiest plan stays."""
    how = HOW | {"call_kwargs": {"num_inference_steps": steps}, "progress": True}
    made = dqtk.allocate(pipe, ["a red circle"], ["w4a8-rtn", "w8a8"], "15.2bits", weigh=True, folder=tmp_path / "work", **how)
    assert said in capsys.readouterr().out
    rows = done(tmp_path / "work", "allocate")
    noises = {key: 10 ** (-score / 10) for key, score in made.offers.found.scores.items()}
    raw = {key: 10 ** (-rows[" ".join(key)]["sqnr"] / 10) for key in noises}
    plan = dqtk.plan(pipe, "w4a8-rtn", overrides=dict.fromkeys(KEEP))
    keys = [(c.site.id, canonical(c.spec)) for c in plan.choices if c.spec is not None]
    assert sum(noises[key] for key in keys) == pytest.approx(sum(raw[key] for key in keys), rel=1e-6)
    assert any(noises[key] != pytest.approx(raw[key], rel=1e-3) for key in noises)


def test_around_a_calibrated_recipe(pipe):
    """What the rest needs of its inputs is seen too."""
    made = dqtk.allocate(pipe, ["a red circle"], ["w4a8-rtn"], "16bits", around="w8a8-static", **HOW)
    assert made.offers.found.base


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"candidates": []}, "candidates must be at least one recipe"),
        ({"candidates": ["w8a8"], "budget": "9bits", "me": TWO}, "folder must be given where 2 processes share the work"),
        ({"candidates": ["w8a8"]}, "budget must be given where there is no search"),
        ({"candidates": "w9a9", "budget": "4bits"}, "recipe: name must be one of"),
        ({"prompts": None, "candidates": "w8a8", "budget": "9bits"}, "prompts or stats must be given, got neither"),
        ({"prompts": ["one"]}, "prompts must be at least 8 for sweep and switch, got 1"),
        ({"candidates": "w8a8", "budget": "9bits", "scores": {"content": "ssim"}}, "score must come with ratio or sweep"),
        ({"candidates": "w8a8", "budget": "9bits", "scores": {"content": "simm"}, "ratio": 1.0}, "Did you mean 'ssim'"),
        (
            {"candidates": "w8a8", "budget": "9bits", "groups": {"quality": ["*"]}, "scores": {"content": "ssim"}, "ratio": 1.0},
            "a group of this model that has layers must be one of quality, got 'content'",
        ),
        ({"candidates": "w8a8", "budget": "9ms"}, "costs must come with a budget in ms"),
        ({"candidates": "w8a8", "budget": "9 apples"}, "budget must be a number with bits"),
        ({"candidates": "w8a8", "budget": "9bits", "groups": {"content": ["*.mlp.*"]}}, "a group's pattern must match one of"),
    ],
)
def test_refuses(pipe, words, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        dqtk.allocate(pipe, **({"prompts": ["a circle"]} | words), **HOW)
