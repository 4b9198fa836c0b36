"""The command line: its flags are frozen, and the words people type do what they say, end to end on an untrained pipeline."""

import argparse
import importlib
import importlib.metadata
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import warnings

import diffusers
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import dqtk
from dqtk.calibrate import Stats
from dqtk.checkpoint import quantized_layers
from dqtk.cli import main, parser
from dqtk.costs import CostTable
from dqtk.plan import Plan

LEARNING = ["--correct", "--refine", "--iterations", "--refine-batch", "--refine-guidance", "--candidates", "--checkpoint"]
PLANNING = ["--attention", "--density", "--during", "--keep", "--recipe", "--set", "--text-encoders"]
SAMPLING = ["--batch-size", "--device", "--dtype", "--guidance", "--num-prompts", "--prompts", "--seed", "--steps"]
BENCH = ["--batch", "--height", "--num-frames", "--repeats", "--size", "--threads", "--width"]
ALLOCATION = [
    "--search",
    "--around",
    "--budget",
    "--widths",
    "--input-widths",
    "--recipes",
    "--keep",
    "--group",
    "--score",
    "--ratio",
    "--sweep",
    "--switch",
    "--parts",
    "--weigh",
    "--protect",
    "--costs",
    "--stats",
]
GOLDEN_FLAGS = {
    "explain": sorted(["MODEL", *PLANNING, "--roles", "--output"]),
    "calibrate": sorted(["MODEL", *PLANNING, *SAMPLING, "--placement", "--output"]),
    "allocate": sorted(["MODEL", *ALLOCATION, *SAMPLING, "--sensitivity", "--sizes", "--loss", "--output"]),
    "quantize": sorted(
        [
            "MODEL",
            *PLANNING,
            *SAMPLING,
            *LEARNING,
            "--placement",
            "--plan",
            "--stats",
            "--sequential",
            "--max-memory",
            "--stream",
            "--output",
        ]
    ),
    "generate": sorted(["MODEL", *SAMPLING, "--keep-decoded", "--output"]),
    "compare": sorted(["REFERENCE", "CANDIDATE", *SAMPLING, "--output", "--floor", "--lpips-weights"]),
    "bench": sorted(["MODEL", "--recipes", *BENCH, "--dtype", "--device", "--keep-decoded", "--layers", "--output"]),
    "evaluate": sorted(["A", "B", "--metrics", "--extractors", "--unpaired", "--worker", "--fps", "--output", "--fail-if"]),
    "run": sorted(["JOB", "--presets", "--fail-if"]),
}


def verbs():
    actions = parser()._subparsers._group_actions
    return actions[0].choices


def test_flags_are_frozen():
    found = {
        name: sorted(option for a in verb._actions if a.dest != "help" for option in (a.option_strings or [a.metavar]))
        for name, verb in verbs().items()
    }
    assert found == GOLDEN_FLAGS


def test_defaults_are_frozen():
    for name, verb in verbs().items():
        defaults = {action.dest: action.default for action in verb._actions}
        others = {"explain": "", "evaluate": "", "run": "", "calibrate": "stored", "quantize": "stored", "bench": "bfloat16"}
        assert defaults.get("dtype", "") == others.get(name, "float32")
        if name in ("evaluate", "run"):
            assert defaults["fail_if"] == []
        elif name == "bench":
            assert (defaults["recipes"], defaults["batch"], defaults["repeats"], defaults["threads"]) == ([], 1, 7, None)
        elif name != "explain":
            if name == "allocate":
                assert {defaults[key] for key in ("widths", "recipes", "ratio", "protect", "loss", "costs", "stats")} == {None}
            assert (defaults["seed"], defaults["steps"], defaults["guidance"]) == (0, None, None)
            assert defaults["batch_size"] == (None if name == "quantize" else 8)
        for action in verb._actions:
            if isinstance(action, argparse._StoreAction) and action.option_strings:
                assert action.help or action.dest in ("seed", "batch_size"), f"{name} {action.dest}"


@pytest.mark.parametrize("words", [["--steps", "0"], ["--batch-size", "-1"], ["--num-prompts", "many"], ["--dtype", "int8"]])
def test_numbers_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "tiny-pixart", "--prompts", "x", "--output", "out", *words])
    assert words[0] in capsys.readouterr().err


@pytest.fixture
def folder(tiny_folders, tmp_path):
    shutil.copytree(tiny_folders["pixart"], tmp_path / "tiny-pixart")
    return str(tmp_path / "tiny-pixart")


@pytest.fixture
def say(capsys):
    """Function (*words) -> what the command printed."""

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_explain_reads_no_weights(folder, say, tmp_path, load_tiny):
    for file in (tmp_path / "tiny-pixart").rglob("*.safetensors"):
        file.unlink()
    text = say("explain", folder, "--recipe", "w4a8-rtn", "--output", tmp_path / "deep" / "plan.json")
    expected = dqtk.plan(load_tiny("pixart"), "w4a8-rtn")
    assert text == expected.explain() + "\n"
    assert Plan.from_json(json.loads((tmp_path / "deep" / "plan.json").read_text())) == expected
    roles = say("explain", folder, "--recipe", "w4a8-rtn", "--roles")
    assert roles == expected.explain(sites=False) + "\n"


def test_warnings_are_lines_as_errors_are(monkeypatch, capsys):
    def warned(*words):
        warnings.warn("no step.\n  Widen it.", stacklevel=1)
        warnings.warn_explicit("gone soon", FutureWarning, "there.py", 3)

    before = warnings.formatwarning
    monkeypatch.setattr(importlib.import_module("dqtk.cli"), "_explain", warned)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *facts: sys.stderr.write(warnings.formatwarning(*facts[:4])))
        main(["explain", "a"])
    lines = ["dqtk explain: warning: no step. Widen it.", "dqtk explain: FutureWarning: gone soon (there.py:3)"]
    assert capsys.readouterr().err.splitlines() == lines
    assert warnings.formatwarning is before


def test_explain_into_a_closed_pipe(folder, monkeypatch, capsys):
    """``dqtk explain | head -1`` is no error: quiet, and the status that shells give to a closed pipe."""

    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return 99

    redirected = []
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr("os.dup2", lambda source, target: redirected.append(target))
    assert main(["explain", folder, "--recipe", "w8a8"]) == 141
    assert redirected == [99]
    assert capsys.readouterr().err == ""


def test_quantize_then_generate_then_explain(folder, say, tmp_path):
    out = tmp_path / "pixart-w4a8"
    text = say("quantize", folder, "--recipe", "w4a8-rtn", "--text-encoders", "w8a16", "--output", out)
    assert "transformer" in text
    assert "text_encoder" in text
    assert f"{out}: recipe w4a8-rtn, text encoders w8a16, plan " in text
    pipe = diffusers.DiffusionPipeline.from_pretrained(out)
    assert {layer.spec.weight.bits for layer in quantized_layers(pipe.transformer).values()} == {4, 8}

    text = say("generate", out, "--prompts", "a red circle", "two blue crosses", "--steps", 1, "--output", tmp_path / "pictures")
    assert text == f"{tmp_path / 'pictures'}: 2 pictures\n"
    tasks = [json.loads(line) for line in (tmp_path / "pictures" / "prompts.jsonl").read_text().splitlines()]
    assert [task["prompt"] for task in tasks] == ["a red circle", "two blue crosses"]
    for task in tasks:
        with Image.open(tmp_path / "pictures" / f"{task['id']}.png") as image:
            assert image.size == (64, 64)

    text = say("explain", out)
    plan = dqtk.installed.installed_plan(pipe)
    assert text == plan.explain() + "\n"
    assert plan.hash in text
    assert main(["explain", str(out), "--keep", "*"]) == 2


def test_generate_keeps_decoded_weights_and_says_so(folder, say, tmp_path):
    out, words = tmp_path / "w4a16", ["--prompts", "a red circle", "--steps", 1]
    say("quantize", folder, "--recipe", "w4a16", "--output", out)
    say("generate", out, *words, "--output", tmp_path / "decoded")
    text = say("generate", out, *words, "--keep-decoded", "1GiB", "--output", tmp_path / "kept")
    assert re.match(r"decoded weights kept: [\d.]+ MB, of \d+ layers; 0 found no room\n", text)
    pictures = [torch.tensor(list(Image.open(next((tmp_path / name).glob("*.png"))).tobytes())) for name in ("decoded", "kept")]
    assert (pictures[0].int() - pictures[1].int()).abs().max() <= 2
    assert main(["generate", str(out), *map(str, words), "--keep-decoded", "much", "--output", str(tmp_path / "no")]) == 2


def test_clips_are_quantized_generated_and_evaluated_frame_by_frame(say, tmp_path):
    from dqtk.pipelines.tiny.build_wan import new_wan
    from dqtk.pipelines.tiny.train_wan_vae import new_wan_vae

    torch.manual_seed(0)
    new_wan(new_wan_vae()).save_pretrained(tmp_path / "wan")
    say("quantize", tmp_path / "wan", "--recipe", "w8a8", "--output", tmp_path / "wan-w8a8")
    for name in ("wan", "wan-w8a8"):
        words = ["--prompts", "a small red circle", "--steps", 2, "--output", tmp_path / f"{name}-clips"]
        assert say("generate", tmp_path / name, *words) == f"{tmp_path / name}-clips: 17 pictures, frames of 1 clip\n"
    rows = [json.loads(line) for line in (tmp_path / "wan-clips" / "prompts.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"0000-0-{number:02d}" for number in range(17)]
    with Image.open(tmp_path / "wan-clips" / "0000-0-16.png") as image:
        assert image.size == (64, 64)
    folders = [tmp_path / "wan-clips", tmp_path / "wan-w8a8-clips"]
    text = say("evaluate", *folders, "--metrics", "psnr", "--output", tmp_path / "evaluated")
    assert float(re.search(r"^\| psnr\S* +\|.*\| +([\d.]+) \|$", text, re.MULTILINE)[1]) > 30


def test_keep_and_set(folder, say, tmp_path):
    words = ["--recipe", "w8a8", "--keep", "*.attn1.*", "--set", "*.ff.*=w4a16", "--keep", "*.attn2.to_q"]
    say("quantize", folder, *words, "--output", tmp_path / "out")
    layers = quantized_layers(dqtk.load(tmp_path / "out").transformer)
    assert {layer.spec.weight.bits for path, layer in layers.items() if ".ff." in path} == {4}
    assert not [path for path in layers if ".attn1." in path or path.endswith("attn2.to_q")]
    assert [path for path in layers if path.endswith("attn2.to_k")]


def contents(folder):
    """The denoiser's tensors by their digests, and its configuration."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        return tensors.metadata()["dqtk_digests"], (folder / "transformer" / "config.json").read_text()


def test_plan_file_in_place_of_a_recipe(folder, say, tmp_path):
    words = ["--recipe", "w4a16", "--keep", "*.attn1.*"]
    say("explain", folder, *words, "--output", tmp_path / "plan.json")
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert plan.hash in say("quantize", folder, "--plan", tmp_path / "plan.json", "--output", tmp_path / "a")
    say("quantize", folder, *words, "--output", tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "large", "said"), [({"avx2"}, 1, True), ({"avx2", "avx512_bf16"}, 1, False), ({"avx2"}, 10**8, False)]
)
def test_a_dtype_without_units_is_said(load_tiny, monkeypatch, capsys, flags, large, said):
    cli, library = importlib.import_module("dqtk.cli"), importlib.import_module("dqtk.native.library")
    monkeypatch.setattr(library, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(cli, "LARGE", large)
    exact, rounded = load_tiny("pixart"), load_tiny("pixart", torch.bfloat16)
    capsys.readouterr()
    cli._say_slow(exact)
    assert capsys.readouterr().err == ""
    cli._say_slow(rounded)
    assert ("--dtype float32 is faster" in capsys.readouterr().err) == said


def test_calibrate_then_quantize_is_quantize_with_prompts(folder, say, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue cross\na green square\n")
    common = [folder, "--recipe", "w8a8-static", "--steps", 1]
    sampling = ["--prompts", tmp_path / "prompts.txt", "--num-prompts", 2, "--seed", 5, "--batch-size", 1]
    text = say("calibrate", *common, *sampling, "--output", tmp_path / "stats.safetensors")
    assert re.search(r"stats\.safetensors: 2 prompts, ranges of \d+ inputs, 0 calls to learn from\n", text)
    say("quantize", *common, "--stats", tmp_path / "stats.safetensors", "--output", tmp_path / "a")
    say("quantize", *common, *sampling, "--output", tmp_path / "b")
    say("quantize", *common, *sampling, "--seed", 6, "--output", tmp_path / "c")
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c  # the seed is heard


def test_calibrate_says_when_there_is_nothing_to_do(folder, say, tmp_path):
    text = say("calibrate", folder, "--recipe", "w8a8", "--prompts", "x", "--output", tmp_path / "stats.safetensors")
    assert text == "recipe w8a8 needs no calibration; nothing was written\n"
    assert not (tmp_path / "stats.safetensors").exists()


def test_stored_dtype_is_kept(load_tiny, say, tmp_path):
    load_tiny("pixart", torch.bfloat16).save_pretrained(tmp_path / "bf16")
    say("quantize", tmp_path / "bf16", "--recipe", "w8a8", "--output", tmp_path / "q")
    loaded = dqtk.load(tmp_path / "q", dtype=torch.bfloat16)
    assert {t.dtype for t in loaded.transformer.parameters()} == {torch.bfloat16}
    say("quantize", tmp_path / "bf16", "--recipe", "w8a8", "--dtype", "float32", "--output", tmp_path / "q32")
    size = [sum(f.stat().st_size for f in (tmp_path / name / "transformer").glob("*.safetensors")) for name in ("q", "q32")]
    assert size[0] < size[1]


@pytest.mark.parametrize("verb", ["quantize", "generate"])
def test_terminated_while_writing_leaves_nothing(folder, tmp_path, verb):
    """SIGTERM (a batch system, docker stop) as Ctrl-C: the half-written folder is removed."""
    more = ["--recipe", "w8a8"] if verb == "quantize" else ["--prompts", "a circle", "--steps", "1"]
    script = f"""
import os, pathlib, signal, sys
from dqtk import checkpoint, cli
rename = pathlib.Path.rename
def kill(self, target):
    assert any(self.iterdir())
    os.kill(os.getpid(), signal.SIGTERM)
    return rename(self, target)
pathlib.Path.rename = kill
sys.exit(cli.main({[verb, folder, *more, "--output", str(tmp_path / "out")]!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert done.returncode == 143, done.stderr
    assert f"dqtk {verb}: terminated; nothing half-written was left" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-pixart"]


def test_stats_that_nothing_needs(folder, tmp_path, capsys):
    Stats(num_prompts=1).save(tmp_path / "s")
    words = ["quantize", folder, "--recipe", "w8a8", "--stats", str(tmp_path / "s"), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--stats must be left out for recipe w8a8" in capsys.readouterr().err


def test_a_floor_that_is_none_is_said(tiny_folders, tmp_path, capsys):
    """bf16 beside bf16 is no other rounding: asked for by name it is refused, and not left out without a word."""
    words = ["compare", *[str(tiny_folders["pixart"])] * 2, "--prompts", "a", "--steps", "1", "--output", str(tmp_path / "a.html")]
    assert main([*words, "--dtype", "bfloat16", "--floor", "bfloat16"]) == 2
    assert "--floor bfloat16 must come with --dtype float32, got bfloat16" in capsys.readouterr().err
    assert main([*words, "--dtype", "bfloat16"]) == 0


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"dqtk {importlib.metadata.version('dqtk')}\n"


@pytest.mark.parametrize("verb", ["explain", "calibrate", "quantize", "generate", "compare", "bench"])
def test_an_output_that_cannot_be_written_is_said_at_once(verb, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    output = str(tmp_path / "file" / "out.html")
    models = ["nowhere", "nowhere"] if verb == "compare" else ["nowhere"]
    more = [] if verb in ("explain", "quantize", "bench") else ["--prompts", "a cat"]
    assert main([verb, *models, *more, "--output", output]) == 2
    assert f"{verb}: output must be where one can write, got {output}" in capsys.readouterr().err


def test_bench_prints_a_table_and_writes_it(folder, say, tmp_path):
    words = ["bench", folder, "--recipes", "w8a8", "fp8", "--size", 32, "--repeats", 1, "--threads", 1, "--layers"]
    text = say(*words, "--output", tmp_path / "deep" / "bench.json")
    assert "PixArtTransformer2DModel" in text
    assert "height 32, width 32, bfloat16" in text
    assert "linear_int8: integer matmul" in text
    assert "fp8: not timed:" in text
    data = json.loads((tmp_path / "deep" / "bench.json").read_text())
    assert [row["name"] for row in data["rows"]] == ["bfloat16", "float32", "w8a8", "fp8"]
    assert data["rows"][2]["over_16_bit"]["median"] > 0
    assert data["rows"][3]["over_16_bit"] is None
    assert data["hardware"]["threads"] == "1"
    assert data["command"].startswith("dqtk bench ")
    costs = CostTable.load(tmp_path / "deep" / "bench.json")
    assert len({cost.shape for cost in costs.costs}) > 3
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipes", "w8a9"], "recipe: name must be one of"),
        (["--recipes", "w8a8", "--size", "32", "--width", "64"], "--size must stand without --height and --width"),
        (["--recipes", "w8a8", "--num-frames", "4"], "num_frames must be left out for PixArtSigmaPipeline"),
        (["--recipes", "w8a8", "--device", "warp:9"], "--device must be one of this machine"),
        ([], "recipes must name at least one for an unquantized model"),
    ],
)
def test_bench_errors_are_one_line(folder, capsys, words, said):
    assert main(["bench", folder, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dqtk bench: error: ")
    assert said in error


def test_bench_interrupted(folder, tmp_path, monkeypatch, capsys):
    from dqtk.bench import run

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "interleaved", interrupt)
    output = tmp_path / "bench.json"
    before = torch.get_num_threads()
    assert main(["bench", folder, "--recipes", "w8a8", "--threads", str(before + 1), "--output", str(output)]) == 130
    assert "dqtk bench: interrupted" in capsys.readouterr().err
    assert torch.get_num_threads() == before
    assert not output.exists()


def test_allocate_then_quantize(folder, say, tmp_path, capsys):
    """Measured, chosen, and taken by quantize; a second budget measures nothing again; the scores are a log of their own."""
    words = [
        "allocate",
        folder,
        "--widths",
        2,
        4,
        "--keep",
        "*.[1-9].*",
        "--keep",
        "*attn*",
        "--prompts",
        "a red circle",
        "--steps",
        1,
    ]
    text = say(*words, "--budget", "15bits", "--output", tmp_path / "plan.json")
    assert "scores rise with the bits of the weight at 2 of 2 sites" in text
    assert f"{tmp_path / 'plan.json'}: the plan" in text
    assert "What other budgets would buy" in (tmp_path / "plan-sensitivity" / "page.html").read_text()
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert plan.recipe == "allocated 15 bits"
    journal = tmp_path / "plan-sensitivity" / "done-0.jsonl"
    rows = journal.read_text()
    assert plan.hash in say("quantize", folder, "--plan", tmp_path / "plan.json", "--output", tmp_path / "out")
    layers = quantized_layers(dqtk.load(tmp_path / "out").transformer)
    assert {f"transformer:{path}": layer.spec for path, layer in layers.items()} == {
        choice.site.id: choice.spec for choice in plan.choices if choice.spec is not None
    }
    (tmp_path / "plan.json").unlink()
    say(*words, "--budget", "14.7bits", "--output", tmp_path / "plan.json")
    assert journal.read_text() == rows
    log = tmp_path / "plan-sensitivity"
    files = ["--sensitivity", log / "scores.yaml", "--sizes", log / "sizes.yaml", "--widths", 2, 4, "--loss", "noise"]
    say("allocate", *files, "--budget", "3bits", "--output", tmp_path / "choices.json")
    assert set(json.loads((tmp_path / "choices.json").read_text())["choices"].values()) == {2, 4}


def test_allocate_among_calibrated_inputs(folder, say, tmp_path):
    """Recipes with calibrated ranges are candidates: their ranges come with the kept calls, and quantize takes both."""
    words = [
        "--recipes",
        "w8a8-static",
        "w4a8-rtn",
        "--keep",
        "*.[1-9].*",
        "--keep",
        "*attn*",
        "--prompts",
        "a circle",
        "--steps",
        1,
    ]
    text = say("allocate", folder, *words, "--budget", "15.2bits", "--output", tmp_path / "plan.json")
    assert "scores rise with the bits of the weight at 2 of 2 sites" in text
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert plan.needs_stats
    stats = ["--stats", tmp_path / "plan-sensitivity.safetensors"]
    assert plan.hash in say("quantize", folder, "--plan", tmp_path / "plan.json", *stats, "--output", tmp_path / "out")


def test_every_wish_of_the_command_line_arrives(folder, tmp_path, monkeypatch):
    """What ``dqtk.allocate`` takes and the verb has a flag for is handed on: no flag is read and forgotten."""
    command = importlib.import_module("dqtk.allocate.command")
    words = [
        "allocate",
        folder,
        "--widths",
        "4",
        "--prompts",
        "a circle",
        "--budget",
        "9bits",
        "--output",
        str(tmp_path / "p.json"),
    ]
    options = parser().parse_args(words)
    flags = set(vars(options)) & set(inspect.signature(dqtk.allocate).parameters)
    seen = {}
    monkeypatch.setattr(command, "allocate", lambda pipe, prompts, candidates, **given: seen.update(given))
    more = ["--weigh", "--group", "content=*.ff.*", "--group", "content=*attn2*", "--score", "content=ssim", "--ratio", "0.5"]
    assert main([*words, *more]) == 0
    assert flags - {"prompts"} <= set(seen)
    assert seen["weigh"] is True
    assert (seen["groups"], seen["scores"], seen["ratio"]) == ({"content": ["*.ff.*", "*attn2*"]}, {"content": "ssim"}, 0.5)
    assert main([*words, "--ratio", "text=0.8", "temporal=1.2"]) == 0
    assert seen["ratio"] == {"text": 0.8, "temporal": 1.2}


def test_allocate_swept_and_switched(folder, say, tmp_path):
    """Ratios are ranked, exchanges tried; whatever comes out keeps the budget; judgements are not taken twice."""
    words = ["--widths", 2, 8, "--keep", "*.[1-9].*", "--keep", "*attn*", "--steps", 1, "--num-prompts", 1]
    words += ["--prompts", *(f"{i} circles" for i in range(8)), "--sweep", "--switch", 3, "--budget", "15bits"]
    text = say("allocate", folder, *words, "--output", tmp_path / "plan.json")
    assert re.search(r"one program +-?\d+\.\d\d dB", text)
    assert "exchanges: 3 tried" in text
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert 8 * sum(c.bytes_after for c in plan.choices) <= 15 * sum(c.site.num_weights for c in plan.choices)
    journals = {path: path.read_text() for path in tmp_path.glob("plan-sensitivity*/done-0.jsonl")}
    assert {path.parent.name.removeprefix("plan-sensitivity") for path in journals} == {"", "-search", "-confirm", "-pictures"}
    (tmp_path / "plan.json").unlink()
    assert say("allocate", folder, *words, "--output", tmp_path / "plan.json") == text
    assert {path: path.read_text() for path in journals} == journals


@pytest.mark.parametrize("verb", ["calibrate", "allocate"])
def test_what_goes_on_says_so_when_interrupted(folder, tmp_path, monkeypatch, capsys, verb):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["dqtk.calibrate.run"], "recording", interrupt)
    words = ["--recipe", "w8a8-static"] if verb == "calibrate" else ["--recipes", "w8a8", "--budget", "9bits"]
    assert main([verb, str(folder), *words, "--prompts", "a circle", "--output", str(tmp_path / "out")]) == 130
    assert f"dqtk {verb}: interrupted; run the same command again to go on" in capsys.readouterr().err


def test_two_processes_quantize_as_one(folder, tmp_path, launched):
    words = ["quantize", folder, "--recipe", "w4a8", "--keep", "*.[1-9].*", "--steps", 1, "--prompts", "a red circle"]
    words += ["--checkpoint", tmp_path / "shared"]
    assert "recipe w4a8, plan" in launched(2, *words, "--output", tmp_path / "two")
    shares = [len((tmp_path / "shared" / "solved" / f"done-{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert min(shares) >= 1
    assert abs(shares[0] - shares[1]) <= 1
    words[-1] = tmp_path / "alone"
    launched(1, *words, "--output", tmp_path / "one")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_two_processes_allocate_as_one(folder, tmp_path, launched):
    """Candidates that learn, so layers that share an input must be solved together, whoever scores them."""
    words = ["allocate", folder, "--recipes", "w4a8", "w8a8", "--keep", "*.[1-9].*", "--keep", "*ff*", "--budget", "15bits"]
    words += ["--steps", 1, "--prompts", "a red circle"]
    text = launched(1, *words, "--output", tmp_path / "one" / "plan.json")
    assert launched(2, *words, "--output", tmp_path / "two" / "plan.json") == text.replace("/one/", "/two/")
    assert (tmp_path / "two" / "plan.json").read_text() == (tmp_path / "one" / "plan.json").read_text()
    rows = [
        {row for file in (tmp_path / name / "plan-sensitivity").glob("done-*.jsonl") for row in file.read_text().splitlines()}
        for name in ("one", "two")
    ]
    assert rows[0] == rows[1]
    shares = [len(file.read_text().splitlines()) for file in (tmp_path / "two" / "plan-sensitivity").glob("done-*.jsonl")]
    assert len(shares) == 2
    assert min(shares) > 0


def test_allocate_with_pictures_for_content(folder, say, tmp_path):
    words = ["--widths", 4, "--keep", "*.[1-9].*", "--keep", "*attn*", "--prompts", "a circle", "--steps", 1, "--batch-size", 1]
    say(
        "allocate",
        folder,
        *words,
        "--score",
        "content=ssim",
        "--ratio",
        1,
        "--budget",
        "16bits",
        "--output",
        tmp_path / "plan.json",
    )
    rows = [json.loads(line) for line in (tmp_path / "plan-sensitivity" / "done-0.jsonl").read_text().splitlines()]
    scores = {row.pop("layer").partition(" ")[0]: row for row in rows}
    for site, score in scores.items():
        if ".ff." in site:
            assert 0 < score["ssim of 1 pictures"] < 1
        elif site != "floor":
            assert score["sqnr"] > 0
    assert sum(".ff." in site for site in scores) == 2
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    by_path = {choice.site.path: choice.spec for choice in plan.choices}
    assert by_path["transformer_blocks.0.ff.net.2"].weight.bits == 4  # the group of pictures is not offered 16 bits


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sizes", "a"], "--sensitivity must be given where there is no MODEL"),
        (["--sensitivity", "a", "--sizes", "a", "--keep", "x"], "--keep must come with a MODEL"),
        (["nowhere", "--loss", "noise"], "--loss must stand without a MODEL, got nowhere"),
        (["nowhere", "--recipes", "w8a8", "--widths", "4"], "--recipes must stand without --widths"),
        (["nowhere", "--stats", "s", "--prompts", "p"], "--stats must stand without --prompts"),
        (["nowhere", "--score", "content=ssim"], "score must come with ratio or sweep, got none"),
        (["nowhere", "--sweep", "--ratio", "1", "--prompts", "p"], "sweep must stand without ratio"),
        (["nowhere", "--switch", "5", "--stats", "s"], "--sweep and --switch must come with --prompts in place of --stats"),
        (["nowhere", "--switch", "5", "--prompts", "p"], "prompts must be at least 8 for sweep and switch, got 1"),
        (["--sensitivity", "a", "--sizes", "a", "--sweep"], "--sweep must come with a MODEL"),
        (["nowhere", "--parts", "2", "--around", "w8a8"], "parts and weigh must come with prompts and without around"),
        (["nowhere", "--score", "content=ssim", "--ratio", "1", "--around", "w8a8"], "score of pictures must come without around"),
        (["FOLDER", "--around", "none.json", "--prompts", "p"], "--around: file must exist, got none.json"),
        (["nowhere", "--score", "content=ssim", "--ratio", "1", "--stats", "s"], "score of pictures must come with prompts"),
        (["nowhere", "--costs", "c"], "costs must come with a budget in ms and only then, got 4 bits"),
        (["FOLDER"], "--prompts or --stats must be given for"),
        (["FOLDER", "--group", "content=*.mlp.*", "--prompts", "p"], "a group's pattern must match one of"),
        (
            ["FOLDER", "--group", "temporal=*", "--prompts", "p"],
            "a group of pictures must be one of content, quality, got 'temporal'",
        ),
        (["nowhere", "--group", "*.ff.*"], "--group must be GROUP=PATTERN, got '*.ff.*'. For example content=*.ff.*."),
        (
            ["nowhere", "--score", "content=ssim", "--score", "content=psnr"],
            "--score must be given once for a group, got ssim, psnr",
        ),
        (["nowhere", "--ratio", "text=0.8", "text=0.9"], "--ratio must be given once for a group, got 0.8, 0.9 for text"),
        (["nowhere", "--ratio", "half"], "--ratio must be a number, or GROUP=NUMBER, got 'half'"),
        (["nowhere", "--ratio", "text=half"], "--ratio must be a number, or GROUP=NUMBER, got 'text=half'"),
        (["FOLDER", "--widths", "1"], "weight bits must be from 2 to 8, got 1"),
        (["nowhere", "--search", "auto", "--widths", "4"], "--search must stand without --widths, got both"),
        (
            ["nowhere", "--search", "atuo"],
            "search must be one of auto, mixdq-w3.66a16, viditq-mp-w4a8, vq-auto, got 'atuo'. Did you mean 'auto'",
        ),
        (["--sensitivity", "a", "--sizes", "a", "--search", "auto"], "--search must come with a MODEL"),
        (["nowhere", "--input-widths", "4", "8"], "--input-widths must come with a budget in BOPs or ms, got 4 bits"),
    ],
)
def test_allocate_refuses(words, said, folder, tmp_path, capsys):
    words = [folder if word == "FOLDER" else word for word in words]
    assert main(["allocate", *words, "--budget", "4bits", "--output", str(tmp_path / "plan.json")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
