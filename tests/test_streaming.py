"""Quantizing from disk to disk: the same folder as in memory, whatever interrupts it, by one process or two, in little memory."""

import json
import os
import shutil
import sys

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile, record_function

import dqtk
from dqtk import streaming
from dqtk.checkpoint import DIGESTS, digest, verify_files
from dqtk.cli import main
from dqtk.methods import shared_books
from dqtk.methods.books import learned_books
from dqtk.plan import Recipe, Rule
from dqtk.recipes import recipe_named
from dqtk.shards import LaidOutTensors, StoredTensors
from dqtk.sites import components_of
from dqtk.sources import load_pipeline, meta_pipeline
from dqtk.spec import BestFloat, Hadamard, LayerSpec, PerChannel, TensorSpec, VectorCodebook
from dqtk.streaming import quantize_folder


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A pipeline folder of one's own, fp32; PixArt with T5."""
    return shutil.copytree(tiny_folders["pixart"], tmp_path / "pixart")


def stream(model, output, plan, **kwargs):
    return quantize_folder(model, output, plan, progress=False, **kwargs)


def tensors_of(folder):
    """Component -> name -> digest, of all safetensors files; and the metadata that belongs to them."""
    found, marks = {}, {}
    for file in sorted(folder.rglob("*.safetensors")):
        part = str(file.parent.relative_to(folder))
        found.setdefault(part, {}).update({name: digest(tensor) for name, tensor in load_file(file).items()})
        with safe_open(file, framework="pt") as tensors:
            marks[part] = json.loads((tensors.metadata() or {}).get(DIGESTS, "null"))
    return found, marks


def config_of(file):
    """Without what names the machine and the versions."""
    return {k: v for k, v in json.loads(file.read_text()).items() if k not in ("_name_or_path", "_diffusers_version")}


def state_digests(pipe):
    return {
        name: {n: digest(t) for n, t in part.state_dict().items()}
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- the same as in memory -------------------------------------------------------------------------------------------


def same_as_in_memory(source, tmp_path, recipe, text_encoders=None, dtype="stored", overrides=None):
    pipe = load_pipeline(str(source), dtype)
    plan = dqtk.plan(pipe, recipe, text_encoders=text_encoders, overrides=overrides)
    dqtk.quantize(pipe, plan, progress=False)
    dqtk.save(pipe, tmp_path / "memory")
    asked = {} if dtype == "stored" else {"dtype": getattr(torch, dtype)}
    made = stream(source, tmp_path / "disk", recipe, text_encoders=text_encoders, overrides=overrides, **asked)
    assert made.hash == plan.hash
    (mine, marks), (theirs, wanted) = tensors_of(tmp_path / "disk"), tensors_of(tmp_path / "memory")
    planned = {component.name for component in made.components}
    for name in planned:
        assert mine[name] == theirs[name]
        assert set(marks[name]) == set(wanted[name])
        assert config_of(tmp_path / "disk" / name / "config.json") == config_of(tmp_path / "memory" / name / "config.json")
        verify_files((tmp_path / "disk" / name).glob("*.safetensors"), "x")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    loaded = [dqtk.load(tmp_path / where) for where in ("memory", "disk")]
    assert state_digests(loaded[0]) == state_digests(loaded[1])
    return made


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16", "nvfp4"])
@pytest.mark.parametrize("name", ["pixart", "sdxl"])
def test_the_same_as_in_memory(tiny_folders, tmp_path, name, recipe):
    """Linear layers and convolutions, T5 with its tied embedding and CLIP under older names, with and without biases."""
    same_as_in_memory(tiny_folders[name], tmp_path, recipe, text_encoders="w8a16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_compute_dtype(tiny_folders, tmp_path, dtype):
    same_as_in_memory(tiny_folders["pixart"], tmp_path, "w4a8-rtn", "w8a8", dtype, overrides={"*.attn2.to_k": None})


def test_a_searched_format_is_found_and_stored(tiny_folders, tmp_path):
    """Splits of 8 bits lie in files under different dtypes, which the plan does not know."""
    spec = LayerSpec(weight=TensorSpec(format=BestFloat(bits=8), granularity=PerChannel()))
    recipe = Recipe(name="best8", rules=(Rule(roles=("patch_embedding",), spec=None, why="kept"), Rule(spec=spec, why="best")))
    made = same_as_in_memory(tiny_folders["pixart"], tmp_path, recipe)
    config = json.loads((tmp_path / "disk" / "transformer" / "config.json").read_text())["quantization_config"]
    found = {
        (spec["weight"]["format"].get("exponent"), spec["weight"]["format"].get("mantissa")) for spec in config["specs"].values()
    }
    assert None not in {exponent for exponent, _ in found}
    assert made.needs_stats is False


@pytest.mark.parametrize("dtype", ["stored", "bfloat16"])
def test_books_that_layers_share(tiny_folders, tmp_path, dtype):
    """One pass over the weights of each group, before the first layer is solved; rotated layers too."""
    words = VectorCodebook(words=16, length=4, group="{role}")
    spec = LayerSpec(weight=TensorSpec(format=words, granularity=PerChannel()), transforms=(Hadamard(),))
    shared = Recipe(name="shared", rules=(Rule(spec=spec, why="shared"),))
    made = same_as_in_memory(tiny_folders["pixart"], tmp_path, shared, text_encoders=shared, dtype=dtype)
    assert {name for name, _ in made.books} == {"transformer", "text_encoder"}


def test_an_interrupted_stream_goes_on_with_its_books(tiny_folders, tmp_path, monkeypatch):
    words = VectorCodebook(words=16, length=4, group="all")
    shared = Recipe(
        name="shared", rules=(Rule(spec=LayerSpec(weight=TensorSpec(format=words, granularity=PerChannel())), why="s"),)
    )
    stream(tiny_folders["pixart"], tmp_path / "whole", shared)
    solve, seen = streaming.solve_site, []

    def stop(*args, **options):
        seen.append(options["books"])
        if len(seen) == 3:
            raise KeyboardInterrupt
        return solve(*args, **options)

    monkeypatch.setattr(streaming, "solve_site", stop)
    with pytest.raises(KeyboardInterrupt):
        stream(tiny_folders["pixart"], tmp_path / "q", shared)
    file = tmp_path / ".q.streaming" / "books.transformer.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:100])
    with pytest.raises(ValueError, match=f"quantize: {file} must be complete and readable, got"):
        stream(tiny_folders["pixart"], tmp_path / "q", shared)
    file.write_bytes(kept)
    monkeypatch.setattr(streaming.SharedVectors, "books", lambda self: pytest.fail("learned again"))
    stream(tiny_folders["pixart"], tmp_path / "q", shared)
    assert tensors_of(tmp_path / "q") == tensors_of(tmp_path / "whole")


def test_parts_kept_in_float32_stay_so(tmp_path):
    """Wan keeps its noise-level embedding in float32, whatever dtype is asked for or stored."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 32}
    model = diffusers.WanTransformer3DModel(**sizes, freq_dim=32, ffn_dim=64, num_layers=1)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "wan")
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "wan", dtype=torch.bfloat16)
    everything = Recipe(name="all", rules=(Rule(spec=recipe_named("w8a16").main_spec(), why="nothing is kept"),))
    dqtk.quantize(loaded, everything, progress=False)
    loaded.save_pretrained(tmp_path / "memory")
    stream(tmp_path / "wan", tmp_path / "disk", everything)
    mine, theirs = (tensors_of(tmp_path / where)[0]["."] for where in ("disk", "memory"))
    assert mine == theirs
    assert dqtk.load(tmp_path / "disk").condition_embedder.time_embedder.linear_1.compute_dtype == torch.float32


def old_clip(folder):
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**sizes, max_position_embeddings=8, eos_token_id=2, bos_token_id=1)
    ).save_pretrained(folder)
    file = folder / "model.safetensors"
    state = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(8)[None]}, file, metadata={"format": "pt"})


def test_a_component_by_itself_under_older_names(tmp_path):
    """The published SD text encoders: another prefix, and a tensor that is no longer one of the model."""
    old_clip(tmp_path / "old")
    loaded = transformers.CLIPTextModel.from_pretrained(tmp_path / "old")
    dqtk.quantize(loaded, "w8a16", progress=False)
    loaded.save_pretrained(tmp_path / "memory")
    with pytest.warns(UserWarning, match=r"position_ids and 0 more tensors are not in CLIPTextModel and are left out"):
        stream(tmp_path / "old", tmp_path / "disk", "w8a16")
    assert tensors_of(tmp_path / "disk")[0] == tensors_of(tmp_path / "memory")[0]
    assert files_of(tmp_path / "disk") == ["config.json", "model.safetensors"]
    assert {n: digest(t) for n, t in dqtk.load(tmp_path / "disk").state_dict().items()} == {
        n: digest(t) for n, t in loaded.state_dict().items()
    }


def test_what_is_not_planned_is_copied(folder, tmp_path):
    (folder / "LICENSE.md").write_text("yours")
    (folder / "everything.safetensors").write_bytes(b"an older single file of all weights")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    (folder / "unrelated").mkdir()
    (folder / "unrelated" / "notes.txt").write_text("")
    linked = folder / "vae" / "config.json"
    linked.rename(tmp_path / "blob")
    linked.symlink_to(tmp_path / "blob")  # as in the hub's cache
    stream(folder, tmp_path / "q", "w8a8")
    dropped = {"everything.safetensors", "transformer/diffusion_pytorch_model.bin", "unrelated/notes.txt"}
    assert set(files_of(folder)) - set(files_of(tmp_path / "q")) == dropped
    assert not (tmp_path / "q" / "vae" / "config.json").is_symlink()
    for name in set(files_of(folder)) - dropped:
        if not name.startswith("transformer/"):
            assert (tmp_path / "q" / name).read_bytes() == (folder / name).read_bytes()
    assert not dqtk.checkpoint.quantized_layers(dqtk.load(tmp_path / "q").text_encoder)


def test_several_files_on_both_sides(load_tiny, tmp_path, monkeypatch):
    pipe = load_tiny("pixart", torch.bfloat16)
    pipe.save_pretrained(tmp_path / "plain", max_shard_size="200KB")
    assert len(list((tmp_path / "plain" / "transformer").glob("*.safetensors"))) > 3
    original = LaidOutTensors.__init__
    monkeypatch.setattr(LaidOutTensors, "__init__", lambda self, *args: original(self, *args, limit=150_000))
    stream(tmp_path / "plain", tmp_path / "q", "w8a8", text_encoders="w8a8")
    for name, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        files = sorted(path.name for path in (tmp_path / "q" / name).glob("*.safetensors"))
        assert files == [f"{stem}-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        assert len(files) > 2
        assert (tmp_path / "q" / name / f"{stem}.safetensors.index.json").is_file()
    dqtk.quantize(pipe, dqtk.plan(pipe, "w8a8", text_encoders="w8a8"), progress=False)
    loaded = dqtk.load(tmp_path / "q")
    for name in ("transformer", "text_encoder"):
        assert state_digests(loaded)[name] == state_digests(pipe)[name]


# --- interruptions ---------------------------------------------------------------------------------------------------


def interrupt_after(num, monkeypatch, error=KeyboardInterrupt):
    """Let the n-th layer after this fail; returns the list of what was solved."""
    module, seen = sys.modules["dqtk.streaming"], []
    solve = module.solve_site

    def watch(*args, **kwargs):
        if len(seen) == num:
            raise error
        seen.append(args)
        return solve(*args, **kwargs)

    monkeypatch.setattr(module, "solve_site", watch)
    return seen


@pytest.mark.parametrize("torn", [b"", b'{"layer": "transformer:pos', b'{"layer": "transformer:proj_out"}'])
def test_it_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, torn):
    stream(folder, tmp_path / "whole", "w4a8-rtn")
    total = len(dqtk.checkpoint.quantized_layers(dqtk.load(tmp_path / "whole" / "transformer")))
    with monkeypatch.context() as patch:
        first = interrupt_after(7, patch)
        with pytest.raises(KeyboardInterrupt):
            stream(folder, tmp_path / "q", "w4a8-rtn")
    assert not (tmp_path / "q").exists()
    work = tmp_path / ".q.streaming"
    with (work / "done-0.jsonl").open("ab") as file:
        file.write(torn)
    for file in (work / "whole" / "transformer").glob("*.safetensors"):
        assert file.read_bytes()[:8] == bytes(8)  # nothing loads it
    with monkeypatch.context() as patch:
        second = interrupt_after(total, patch)
        stream(folder, tmp_path / "q", "w4a8-rtn")
    assert (len(first), len(second)) == (7, total - 7)
    assert tensors_of(tmp_path / "q") == tensors_of(tmp_path / "whole")
    assert files_of(tmp_path / "q") == files_of(tmp_path / "whole")
    assert not work.exists()


def test_stopped_at_the_last_step(folder, tmp_path, monkeypatch):
    stream(folder, tmp_path / "whole", "w8a8")
    with monkeypatch.context() as patch:
        patch.setattr("dqtk.diffusers_backend.save_config", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stream(folder, tmp_path / "q", "w8a8")
    stream(folder, tmp_path / "q", "w8a8")
    assert tensors_of(tmp_path / "q") == tensors_of(tmp_path / "whole")


def stopped(folder, output, monkeypatch, recipe="w8a8"):
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        with pytest.raises(KeyboardInterrupt):
            stream(folder, output, recipe)


@pytest.mark.parametrize(
    ("kwargs", "different"),
    [
        ({"plan": "w4a16"}, "plan, recipe"),
        ({"plan": "w8a8", "overrides": {"*.attn2.to_k": None}}, "plan"),
        ({"plan": "w8a8", "text_encoders": "w8a8"}, "model, plan, recipe"),
        ({"plan": "w8a8", "dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_other_work_is_not_continued(folder, tmp_path, monkeypatch, kwargs, different):
    stopped(folder, tmp_path / "q", monkeypatch)
    said = rf"quantize: .*\.q\.streaming must be the unfinished work of this command, got another's \(different: {different}\)\."
    with pytest.raises(ValueError, match=f"{said} Run that command again to finish it, remove the folder, or choose another"):
        stream(folder, tmp_path / "q", **kwargs)
    stream(folder, tmp_path / "q", "w8a8")


def test_other_weights_are_another_model(folder, tmp_path, monkeypatch):
    """Same names, shapes and sizes: a fine-tuned model."""
    stopped(folder, tmp_path / "q", monkeypatch)
    change(folder, lambda state: state["proj_out.weight"].add_(1))
    with pytest.raises(ValueError, match=r"got another's \(different: model\)"):
        stream(folder, tmp_path / "q", "w8a8")


def test_damaged_work_is_not_continued(folder, tmp_path, monkeypatch):
    stopped(folder, tmp_path / "q", monkeypatch)
    work = tmp_path / ".q.streaming"
    journal = (work / "done-0.jsonl").read_bytes()
    (work / "done-0.jsonl").write_bytes(b"x" + journal)
    with pytest.raises(
        ValueError, match=r"done-0\.jsonl, line 1, must be a record of a finished layer, got: .*Remove .*begin again"
    ):
        stream(folder, tmp_path / "q", "w8a8")
    (work / "done-0.jsonl").write_bytes(journal)
    file = next((work / "whole" / "transformer").glob("*.safetensors"))
    os.truncate(file, 100)
    with pytest.raises(ValueError, match=r"must hold the files that were laid out, got other sizes\. Remove .*begin again"):
        stream(folder, tmp_path / "q", "w8a8")
    (work / "task.json").unlink()
    with pytest.raises(ValueError, match=r"must be the unfinished work of this command, got another's"):
        stream(folder, tmp_path / "q", "w8a8")
    shutil.rmtree(work)
    stream(folder, tmp_path / "q", "w8a8")


def test_ctrl_c_in_the_shell(folder, tmp_path, monkeypatch, capsys):
    words = ["quantize", str(folder), "--recipe", "w8a8", "--stream", "--output", str(tmp_path / "q")]
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert main(words) == 130
    assert "dqtk quantize: interrupted; run the same command again to go on" in capsys.readouterr().err
    assert main(words) == 0
    assert f"{tmp_path / 'q'}: recipe w8a8, plan " in capsys.readouterr().out
    dqtk.load(tmp_path / "q")


def test_two_processes_write_the_bytes_of_one(folder, tmp_path, launched):
    stream(folder, tmp_path / "one", "w4a8-rtn", text_encoders="w8a8")
    words = ["quantize", folder, "--recipe", "w4a8-rtn", "--text-encoders", "w8a8", "--stream"]
    said = launched(2, *words, "--output", tmp_path / "two")
    assert said.count(f"{tmp_path / 'two'}: recipe w4a8-rtn, text encoders w8a8") == 1
    assert tensors_of(tmp_path / "two") == tensors_of(tmp_path / "one")
    for name in ("transformer", "text_encoder"):
        files = [next((tmp_path / where / name).glob("*.safetensors")).read_bytes() for where in ("one", "two")]
        assert files[0] == files[1]


def test_two_processes_read_one_book(folder, tmp_path, launched, monkeypatch):
    words = VectorCodebook(words=16, length=4, group="all")
    spec = LayerSpec(weight=TensorSpec(format=words, granularity=PerChannel()))
    rule = Rule(pattern="transformer_blocks.[01].*", spec=spec, why="shared")
    plan = dqtk.plan(dqtk.load(folder), Recipe(name="shared", rules=(rule,)))
    monkeypatch.setattr(shared_books, "learned_books", learned_books)  # as processes that are launched learn them
    stream(folder, tmp_path / "one", plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    launched(2, "quantize", folder, "--plan", tmp_path / "plan.json", "--stream", "--output", tmp_path / "two")
    assert "dqtk_books.book_all" in tensors_of(tmp_path / "two")[0]["transformer"]
    assert tensors_of(tmp_path / "two") == tensors_of(tmp_path / "one")


def test_another_number_of_processes_goes_on(folder, tmp_path, monkeypatch):
    """What a second process has done is in a journal of its own, which every later run reads."""
    stopped(folder, tmp_path / "q", monkeypatch)
    (tmp_path / ".q.streaming" / "done-0.jsonl").rename(tmp_path / ".q.streaming" / "done-1.jsonl")
    seen = interrupt_after(1000, monkeypatch)
    stream(folder, tmp_path / "q", "w8a8")
    assert len(seen) == len(dqtk.checkpoint.quantized_layers(dqtk.load(tmp_path / "q" / "transformer"))) - 3


# --- memory ----------------------------------------------------------------------------------------------------------


LAYER = 4 * 1024 * 1024 * 2  # the largest of the models below, in bytes of bf16


def peak_above_start(num_layers, recipe, tmp_path):
    """What torch allocates at any moment, from its own allocation events.

    Weights are mapped from their files and are not among these; they go with their layer.
    """
    sizes = {"num_attention_heads": 8, "attention_head_dim": 128, "cross_attention_dim": 1024, "sample_size": 8}
    options = {"caption_channels": 64, "norm_type": "ada_norm_single", "use_additional_conditions": False, "in_channels": 4}
    model = diffusers.PixArtTransformer2DModel(**sizes, **options, num_layers=num_layers, out_channels=8).bfloat16()
    model.save_pretrained(tmp_path / "m")
    assert sum(p.numel() * 2 for p in model.parameters()) > 4 * num_layers * LAYER
    del model
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        anchor = torch.zeros(8)
        with record_function("begin"):
            stream(tmp_path / "m", tmp_path / "q", recipe)
        del anchor
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    start = next(event["ts"] for event in events if event.get("name") == "begin")
    allocated = sorted((e["ts"], e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]")
    before = max(entry for entry in allocated if entry[0] <= start)[1]
    return max(total for ts, total in allocated if ts > start) - before


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "w4a8-rtn"])
def test_memory_is_that_of_one_layer(recipe, tmp_path):
    assert 0.4 * LAYER < peak_above_start(1, recipe, tmp_path) < 2.1 * LAYER


def test_memory_does_not_grow_with_the_model(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    peaks = [peak_above_start(num, "w8a16", tmp_path / name) for name, num in (("small", 1), ("large", 4))]
    assert peaks[1] < peaks[0] + 0.01 * LAYER


# --- errors ----------------------------------------------------------------------------------------------------------


def change(folder, edit, component="transformer"):
    (file,) = (folder / component).glob("*.safetensors")
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata={"format": "pt"})


Q = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda s: s[f"{Q}.weight"].view(-1)[5:6].fill_(torch.nan),
            rf"quantize: transformer:{Q} must have finite weights, got NaN or infinity",
        ),
        (lambda s: s[f"{Q}.bias"][:1].fill_(torch.inf), rf"quantize: transformer:{Q} must have a finite bias, got NaN or"),
        (
            lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].to(torch.int8)}),
            rf"quantize: transformer:{Q} must be float32, bfloat16 or float16, got torch\.int8\. Load the unquantized model",
        ),
        (
            lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"].to(torch.float8_e4m3fn)}),
            rf"quantize: transformer:{Q} must be float32, bfloat16 or float16, got torch\.float8_e4m3fn",
        ),
        (
            lambda s: s.pop(f"{Q}.weight"),
            rf"quantize: .*transformer must hold every tensor of PixArtTransformer2DModel, got none for {Q}\.weight\.",
        ),
        (
            lambda s: s.update({f"{Q}.weight": s[f"{Q}.weight"][:, :8].clone()}),
            rf"quantize: transformer:{Q}\.weight must have shape \(\d+, \d+\), got \(\d+, 8\)\. Config and weights belong to diff",
        ),
    ],
)
def test_weights_that_cannot_be_quantized(folder, tmp_path, edit, says):
    change(folder, edit)
    with pytest.raises(ValueError, match=says):
        stream(folder, tmp_path / "q", "w8a8")
    assert not (tmp_path / "q").exists()


def test_a_plan_that_learns(folder, tmp_path, capsys):
    said = r"quantize: a streamed plan must need no statistics of inputs, got recipe 'w4a8', which does\. Choose another recipe"
    with pytest.raises(ValueError, match=said):
        stream(folder, tmp_path / "q", "w4a8")
    with pytest.raises(ValueError, match=r"plan must stand alone, got text_encoders or overrides too"):
        stream(folder, tmp_path / "q", dqtk.plan(meta_pipeline(str(folder)), "w8a8"), text_encoders="w8a8")
    words = ["quantize", str(folder), "--recipe", "w8a8", "--stream", "--output", str(tmp_path / "q")]
    assert main([*words, "--prompts", "a cat"]) == 2
    assert "--stream must stand without --prompts, --stats, --sequential, --correct and --refine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [folder]


def test_a_model_that_is_quantized(folder, tmp_path):
    stream(folder, tmp_path / "q", "w8a8", overrides={"*.attn1.*": None})
    with pytest.raises(ValueError, match=r"transformer must be unquantized to be streamed, got quant_method 'dqtk'\. Give the"):
        stream(tmp_path / "q", tmp_path / "again", "w4a16")
    overrides = {"transformer:*": None}
    stream(tmp_path / "q", tmp_path / "more", "w8a8", text_encoders="w8a8", overrides=overrides)  # a second pass adds the encoder
    counts = [len(dqtk.checkpoint.quantized_layers(part)) for part in components_of(dqtk.load(tmp_path / "more")).values()]
    assert len(counts) == 2
    assert all(counts)


def test_a_plan_for_another_model(folder, tiny_folders, tmp_path):
    with pytest.raises(ValueError, match=r"quantize: plan must be for components .*got unet\. Make a plan for this model"):
        stream(folder, tmp_path / "q", dqtk.plan(meta_pipeline(str(tiny_folders["sdxl"])), "w8a8"))


def test_files_that_cannot_be_read(folder, load_tiny, tmp_path):
    (file,) = (folder / "transformer").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"model: .*diffusion_pytorch_model\.safetensors must be complete and readable, got: "):
        stream(folder, tmp_path / "q", "w8a8")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"must hold diffusion_pytorch_model\.safetensors or .*index\.json, got .*\.bin.*Save the"):
        stream(folder, tmp_path / "q", "w8a8", dtype=torch.float32)
    load_tiny("pixart").save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    next((tmp_path / "parts" / "transformer").glob("*-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"must hold all \d+ files of .*index\.json, got none of the name .*-00002-of-"):
        stream(tmp_path / "parts", tmp_path / "q", "w8a8")


def test_a_full_disk_is_said_and_survived(folder, tmp_path, monkeypatch):
    stream(folder, tmp_path / "whole", "w8a8")

    def full(*args):
        raise OSError(28, "No space left on device")

    said = r"quantize: disk must have room for .*, got: No space left on device\. Make room and run the same command again"
    for where in ("os.posix_fallocate", "shutil.copyfile", "dqtk.shards.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(ValueError, match=said):
                stream(folder, tmp_path / "q", "w8a8")
    stream(folder, tmp_path / "q", "w8a8")
    assert tensors_of(tmp_path / "q") == tensors_of(tmp_path / "whole")


def test_an_output_that_is_there(folder, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match=r"quantize: folder must be new or empty, got .*q\. Nothing was changed"):
        stream(folder, tmp_path / "q", "w8a8")
    (tmp_path / "q" / "mine.txt").unlink()
    stream(folder, tmp_path / "q", "w8a8")
    with pytest.raises(ValueError, match=r"dtype must be float32, bfloat16 or float16, got torch\.int8"):
        stream(folder, tmp_path / "q2", "w8a8", dtype=torch.int8)


# --- files laid out before their contents ----------------------------------------------------------------------------


def test_laid_out_files_are_those_of_safetensors(tmp_path):
    """Odd sizes, empty tensors, numbers without dimensions: read by the format's own reader, aligned, without gaps."""
    state = {
        "b": torch.randn(3, 5, dtype=torch.bfloat16),
        "a": torch.arange(7, dtype=torch.int8),
        "none": torch.empty(0),
        "one": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
        "wide": torch.randn(2, dtype=torch.float64),
    }
    places = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    out = LaidOutTensors(tmp_path / "x", "model", places, {"also": "b"}, limit=40)
    out.reserve()
    assert out.is_reserved()
    for name in reversed(state):
        out.write({name: state[name]})
    out.finish({name: digest(tensor) for name, tensor in state.items()}, {})
    files = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(files) > 1
    assert sum(file.stat().st_size for file in files) == out.num_bytes
    assert set(verify_files(files, "x")) == {*state, "also"}
    read = StoredTensors(tmp_path / "x", "model")
    for name, tensor in state.items():
        assert torch.equal(read.read(name), tensor)
        assert out.places[name].start % tensor.element_size() == 0
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 40
