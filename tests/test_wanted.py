"""What flags ask for arrives: step policies, steps to learn from, refiners, and the steps of a run that a policy is cut at."""

import importlib
import json

import pytest

import dqtk
from dqtk.calibrate.placement import Around, Evenly, Every
from dqtk.checkpoint import config_of, quantized_layers
from dqtk.cli import main, parser
from dqtk.nn.steps import step_states
from dqtk.plan import Plan
from dqtk.policy import Interval, StepPolicy, protecting
from dqtk.spec import ByLevel, Distill, Reconstruct
from dqtk.wanted import placement_of, policy_of, refiner_of

BAD_PART = (
    "--during must be BEGIN-END or BEGIN-END=RECIPE, shares of a run from 0 (most noise) to 1 (its end), got {!r}. "
    "The last tenth in w8a8 is --during 0.9-1=w8a8, with inputs in 16 bits --during 0.9-1."
)


@pytest.fixture
def folder(tiny_folders):
    return str(tiny_folders["pixart"])


def said(capsys, *words):
    """The error of a command."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err.strip().partition(": error: ")[2]


def test_parts_of_a_run():
    assert policy_of([]) is None
    assert policy_of(["0.9-1"]) == protecting([(0.9, 1)])
    assert policy_of([".9-1.0=w8a8"]) == protecting([(0.9, 1)], "w8a8")
    assert policy_of(["0.8-1", "0-.1", "0.1-0.25"]) == protecting([(0, 0.25), (0.8, 1)])
    mixed = policy_of(["0.9-1=w8a16", "0-0.1=w8a8", "0.1-0.2"])
    parts = ((0, 0.1, "w8a8"), (0.1, 0.2, None), (0.9, 1, "w8a16"))
    assert mixed == StepPolicy(intervals=tuple(Interval(begin=begin, end=end, recipe=recipe) for begin, end, recipe in parts))


@pytest.mark.parametrize("text", ["0.9", "w8a8", "0.9-1=", "1-0.9", "0.5-0.5", "0-10", "-0.1-0.5", "0-1e", "10%-20%", ""])
def test_parts_that_are_none(folder, capsys, text):
    assert said(capsys, "explain", folder, "--recipe", "w8a8", f"--during={text}") == BAD_PART.format(text)


def test_parts_that_overlap(folder, capsys):
    words = ["explain", folder, "--recipe", "w4a8-rtn", "--during", "0-0.5=w8a8", "--during", "0.4-1"]
    assert said(capsys, *words) == "--during must not overlap with another recipe, got 0-0.5=w8a8 and 0.4-1. Part them."
    assert "recipe: name must be one of" in said(capsys, "explain", folder, "--recipe", "w8a8", "--during", "0-1=w8")


@pytest.mark.parametrize(
    ("more", "start"),
    [
        (["--recipe", "w8a8", "--during", "1-0"], "--during must be BEGIN-END"),
        (["--recipe", "w8a9"], "recipe: name must be one of"),
        (["--recipe", "w8a8", "--set", "*=w9"], "recipe: name must be one of"),
        (["--recipe", "w8a8", "--text-encoders", "w9"], "recipe: name must be one of"),
        (["--recipe", "w8a8", "--during", "0-1=w9"], "recipe: name must be one of"),
        (["--recipe", "w8a8", "--during", "0-1=paro"], "--during must name a recipe of layers, got paro."),
        (["--recipe", "paro", "--text-encoders", "paro"], "--text-encoders must name a recipe of layers, got paro."),
        (["--recipe", "w8a8", "--attention", "w9"], "attention: name must be one of"),
        (["--recipe", "w8a8", "--attention", "paro", "--density", "7"], "StaticBlocks: density must be in (0, 1]"),
        (["--recipe", "paro", "--density", "7"], "StaticBlocks: density must be in (0, 1]"),
        (["--recipe", "w8a8", "--attention", "dense", "--density", "0.5"], "attention: density"),
    ],
)
@pytest.mark.parametrize("verb", ["explain", "calibrate", "quantize"])
def test_wrong_with_any_model_is_said_before_one_is_looked_for(tmp_path, capsys, verb, more, start):
    out = [] if verb == "explain" else ["--output", tmp_path / "out"]
    prompts = ["--prompts", "a"] if verb == "calibrate" else []
    assert said(capsys, verb, "no/such/model", *more, *prompts, *out).startswith(start)


@pytest.mark.parametrize(
    ("words", "start"),
    [
        (["quantize", "no/such/model", "--recipe", "w4a8", "--prompts", "a", "--placement", "bad"], "--placement must be evenly"),
        (["generate", "no/such/model", "--prompts", "a", "--keep-decoded", "2GiBs"], "keep_decoded: budget must be a number"),
        (
            ["compare", "no/such", "no/model", "--prompts", "a", "--floor", "bfloat16", "--dtype", "bfloat16"],
            "compare: --floor bfloat16",
        ),
    ],
)
def test_other_flags_are_read_first_too(tmp_path, capsys, words, start):
    assert said(capsys, *words, "--output", tmp_path / "out").startswith(start)


def cuts(pipe):
    """Edges and kinds of all policies in a denoiser."""
    return {(state.edges, state.kinds) for state in step_states(pipe.transformer)}


def test_a_policy_from_the_shell_is_that_of_the_library(folder, load_tiny, tmp_path, capsys):
    """Explained and written without weights; quantized from flags and from the file alike, at the steps that were asked for."""
    pipe, words = load_tiny("pixart"), ["--recipe", "w4a8-rtn", "--during", "0-0.25=w8a8", "--during", "0.75-1"]
    policy = StepPolicy(intervals=(Interval(begin=0, end=0.25, recipe="w8a8"), Interval(begin=0.75, end=1)))
    plan = dqtk.plan(pipe, "w4a8-rtn", policy=policy)
    assert main(["explain", folder, *words, "--output", str(tmp_path / "plan.json")]) == 0
    assert capsys.readouterr().out == plan.explain() + "\n"
    assert Plan.from_json(json.loads((tmp_path / "plan.json").read_text())) == plan
    dqtk.quantize(pipe, plan, call_kwargs={"num_inference_steps": 4}, progress=False)
    mine = cuts(pipe)
    for name, asked in (("flags", words), ("file", ["--plan", str(tmp_path / "plan.json")])):
        assert main(["quantize", folder, *asked, "--steps", "4", "--output", str(tmp_path / name)]) == 0
        assert cuts(dqtk.load(tmp_path / name)) == mine
    assert main(["quantize", folder, *words, "--steps", "20", "--output", str(tmp_path / "twenty")]) == 0
    assert not {edges for edges, _ in cuts(dqtk.load(tmp_path / "twenty"))} & {edges for edges, _ in mine}


@pytest.mark.parametrize(("steps", "first"), [(4, 1), (20, 5)])
def test_what_is_written_for_other_engines_counts_the_steps_that_were_asked_for(folder, tmp_path, steps, first):
    words = ["--recipe", "w8a8", "--during", "0-0.25", "--steps", str(steps)]
    assert main(["quantize", folder, *words, "--output", str(tmp_path / "out")]) == 0
    pipe = dqtk.load(tmp_path / "out")
    assert config_of(pipe.transformer, "")["runtime"]["diffusion_step_policy"]["first_steps"]["count"] == first
    specs = [layer.spec for layer in quantized_layers(pipe.transformer).values()]
    assert {spec.num_steps for spec in specs if isinstance(spec, ByLevel)} == {steps}


def test_policies_and_flags_that_do_not_go_together(folder, tmp_path, capsys):
    out = ["--output", tmp_path / "out"]
    during = ["--during", "0.9-1"]
    assert said(capsys, "quantize", folder, "--plan", "x", *during, *out).startswith("--plan must stand alone, got --recipe,")
    text = said(capsys, "quantize", folder, "--recipe", "w8a8", *during, "--stream", *out)
    assert text.startswith("--during must be left out with --stream, got both.")
    text = said(capsys, "quantize", folder, "--recipe", "w8a8", *during, "--refine", "distill", "--prompts", *"abcdefghi", *out)
    assert text.startswith("quantize: refine must be left out for a plan with a step policy")
    assert main(["quantize", folder, "--recipe", "w8a8", "--output", str(tmp_path / "q")]) == 0
    text = said(capsys, "explain", tmp_path / "q", *during)
    assert text.startswith("--text-encoders, --keep, --set, --during, --attention and --density must come with --recipe, got none")


def test_steps_to_learn_from():
    assert [placement_of(text) for text in (None, "evenly", "every", "around:0.4", "around:1")] == [
        Evenly(),
        Evenly(),
        Every(),
        Around(level=0.4),
        Around(level=1.0),
    ]
    for text in ("even", "every:2", "around", "around:", "around:x", "around:-1", "around:4", ""):
        with pytest.raises(ValueError, match=f"--placement must be evenly, every or around:LEVEL, a noise level .*, got '{text}'"):
            placement_of(text)


@pytest.mark.parametrize("verb", ["calibrate", "quantize"])
def test_the_placement_arrives_where_it_is_calibrated(folder, tmp_path, monkeypatch, verb):
    seen = {}

    class Seen(Exception):
        pass

    def calibrate(*args, **how):
        seen.update(how)
        raise Seen

    monkeypatch.setattr(importlib.import_module("dqtk.cli"), "run_calibrate", calibrate)
    words = [verb, folder, "--recipe", "w4a8", "--prompts", "a", "--placement", "around:0.3", "--output", str(tmp_path / "out")]
    with pytest.raises(Seen):
        main(words)
    assert seen["placement"] == Around(level=0.3)


def test_a_placement_of_no_calibration(folder, tmp_path, capsys):
    words = ["quantize", folder, "--recipe", "w4a8", "--placement", "every", "--output", tmp_path / "out"]
    for more in ([], ["--stream"], ["--stats", "s", "--prompts", "p"]):
        text = said(capsys, *words, *more)
        assert text.startswith("--placement must come with --prompts alone, got it without, or with --stats.")


def test_a_placement_where_nothing_is_learned(folder, tmp_path, capsys):
    words = ["quantize", folder, "--recipe", "w8a8", "--prompts", "a", "--placement", "every", "--output", tmp_path / "out"]
    assert said(capsys, *words).startswith("--placement must be left out for recipe w8a8, got every. It learns nothing")


def test_refiners():
    def asked(*words):
        return refiner_of(parser().parse_args(["quantize", "m", *words, "--output", "o"]))

    assert asked() is None
    assert asked("--refine", "distill") == Distill()
    more = ["--iterations", "7", "--refine-batch", "2", "--refine-guidance", "4.5"]
    assert asked("--refine", "distill", *more) == Distill(iterations=7, batch=2, guidance=4.5)
    assert asked("--refine", "blocks", "--candidates", "2") == Reconstruct(candidates=2)
    for words in (["--refine-guidance", "4.5"], ["--refine", "blocks", "--refine-guidance", "0"]):
        with pytest.raises(ValueError, match="--refine-guidance must come with --refine distill, got it without"):
            asked(*words)
    with pytest.raises(ValueError, match="Distill: guidance must be a number or None, got nan"):
        asked("--refine", "distill", "--refine-guidance", "nan")
