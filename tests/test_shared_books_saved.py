"""Shared books from prompts to a saved pipeline: calibrated, checkpointed, loaded bit-identically."""

import importlib
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_solved import a_model, quantized, three_calls
from test_stages import state

import dqtk
from dqtk.methods.books import learned_books
from dqtk.methods.solve import rotation
from dqtk.nn import books_of
from dqtk.numerics.vector_grid import in_units, root_mean_square
from dqtk.spec import GPTQ, RTN, Hadamard, LayerSpec, PerChannel, TensorSpec, VectorCodebook

stages = importlib.import_module("dqtk.stages")

FORM = VectorCodebook(words=16, length=2, group="all")
WEIGHT = TensorSpec(format=FORM, granularity=PerChannel())
PER_ROLE = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2, group="{role}"), granularity=PerChannel()))
LEARNED = LayerSpec(weight=WEIGHT, solver=GPTQ())
RULES = (("blocks.*", LEARNED),)


def recipe(spec):
    return dqtk.Recipe(name="shared", rules=(dqtk.Rule(spec=spec, why="test"),))


@pytest.fixture
def stats():
    return three_calls()


def test_memory_limits_and_checkpoints_change_nothing(stats, tmp_path, monkeypatch):
    expected = state(quantized(stats, *RULES))
    assert state(quantized(stats, *RULES, max_memory=1)) == expected
    assert state(quantized(stats, *RULES, checkpoint=tmp_path)) == expected
    monkeypatch.setattr(importlib.import_module("dqtk.quantize"), "shared_books", lambda *args: pytest.fail("learned again"))
    assert state(quantized(stats, *RULES, checkpoint=tmp_path)) == expected  # a run that goes on reads the books


def test_an_interrupted_run_goes_on_with_the_same_books(stats, tmp_path, monkeypatch):
    expected, solve, seen = state(quantized(stats, *RULES)), stages.solve_site, []

    def stop(*args, **options):
        seen.append(args)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return solve(*args, **options)

    monkeypatch.setattr(stages, "solve_site", stop)
    model = a_model()
    with pytest.raises(KeyboardInterrupt):
        quantized(stats, *RULES, model=model, checkpoint=tmp_path)
    assert books_of(model) is None  # nothing was replaced
    monkeypatch.setattr(stages, "solve_site", solve)
    assert state(quantized(stats, *RULES, checkpoint=tmp_path)) == expected


@pytest.mark.parametrize("transforms", [(), (Hadamard(block=4, seed=3),)], ids=["plain", "rotated"])
def test_importance_is_that_of_inputs(stats, monkeypatch, transforms):
    """Of one layer alone, a shared book is what its own would be, in the basis in which the layer is stored."""
    seen = []

    def watched(x, form, importance=None, beam=8):
        seen.append(importance)
        return learned_books(x, form, importance, beam)

    shared = importlib.import_module("dqtk.methods.shared_books")
    monkeypatch.setattr(shared, "learned_books", watched)
    quantized(stats, ("entrance", replace(LEARNED, transforms=transforms)))
    weight, rows = a_model().entrance.weight, torch.cat([call.kwargs["x"].flatten(0, 1) for call in stats.calls])
    for transform in transforms:
        weight, rows = (rotation(transform, 16)(x) for x in (weight, rows))
    squares = rows.square().mean(dim=0).view(1, -1, 2).mean(dim=2)
    expected = (root_mean_square(weight, WEIGHT).square() * squares).flatten()
    found = seen[0].sort().values
    torch.testing.assert_close(found, (expected / expected.mean()).sort().values, rtol=1e-3, atol=1e-3)
    assert in_units(weight, root_mean_square(weight, WEIGHT)).shape == weight.shape


def test_rotated_layers_learn_from_prompts_too(stats):
    """The whole way: shared books in the rotated basis, swept with second moments, against nearest words of the same form."""
    rotated = replace(LEARNED, transforms=(Hadamard(),))
    swept = quantized(stats, ("blocks.*", rotated))
    nearest = quantized(stats, ("blocks.*", replace(rotated, solver=RTN())))
    original = a_model()
    errors = [
        sum(float((each(**call.kwargs) - original(**call.kwargs)).square().sum()) for call in stats.calls)
        for each in (swept, nearest)
    ]
    assert errors[0] < 0.8 * errors[1]
    assert swept.blocks[0].fc1.spec.transforms == (Hadamard(),)
    weight, stored = original.blocks[0].fc1.weight, nearest.blocks[0].fc1.weight[:]
    assert (stored - weight).square().sum() < 0.25 * weight.square().sum()  # in the layer's own basis again


def test_one_replay_says_what_all_inputs_are(stats, monkeypatch):
    """Whatever the memory; layers that learn from nothing are not watched, and of layers that share an input one is."""
    squares, replays, plain = importlib.import_module("dqtk.calibrate.squares"), [], replace(LEARNED, solver=RTN())
    replay = squares.replay

    def watched(module, calls, paths):
        replays.append(set(paths))
        replay(module, calls, paths)

    monkeypatch.setattr(squares, "replay", watched)
    quantized(stats, ("blocks.0.*", plain), ("blocks.*", LEARNED), max_memory=1)
    (paths,) = replays
    assert len(paths) == 2 * 4  # q, k and v of a block share an input
    assert not any(path.startswith("blocks.0.") for path in paths)
    quantized(stats, ("blocks.*", plain))
    assert len(replays) == 1


@pytest.fixture(scope="module")
def saved(load_tiny, draw, tmp_path_factory):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, recipe(PER_ROLE), text_encoders=recipe(LayerSpec(weight=WEIGHT)))
    dqtk.quantize(pipe, plan, progress=False)
    folder = tmp_path_factory.mktemp("shared") / "pixart"
    pipe.save_pretrained(folder)
    return pipe, plan, folder, draw(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_pipeline_is_the_same_to_the_bit(saved, draw, dtype):
    pipe, plan, folder, picture = saved
    loaded = dqtk.load(folder, dtype=dtype)
    for name in ("transformer", "text_encoder"):
        mine, theirs = (dict(books_of(each.components[name]).named_buffers()) for each in (pipe, loaded))
        assert mine.keys() == theirs.keys() == {f"book_{group}" for part, group in plan.books if part == name}
        assert all(torch.equal(mine[key], theirs[key]) and theirs[key].dtype == torch.float16 for key in mine)
    if dtype == torch.float32:
        assert torch.equal(draw(loaded), picture)
    assert len(plan.books) > 5


def test_going_back_drops_the_books(saved):
    _, _, folder, _ = saved
    loaded = dqtk.load(folder)
    for name in ("transformer", "text_encoder"):
        part = loaded.components[name]
        part.dequantize()
        assert books_of(part) is None
        assert not any("dqtk" in key for key in part.state_dict())


def test_a_damaged_book_does_not_load(saved, tmp_path):
    _, _, folder, _ = saved
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.startswith("dqtk_books."))
    tensors[name][0, 0, 0] += 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=rf"must hold {name} with digest .*, got another"):
        dqtk.load(tmp_path / "copy")
