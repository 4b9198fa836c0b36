"""MixDQ's static quantization of the stressed tiny-sdxl: what is found, what each transform is worth, saved and loaded."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from dqtk.pipelines.tiny.scenes import captions
from dqtk.pipelines.tiny.stress import stress

import dqtk
from dqtk.allocate.probes import OutputSQNR
from dqtk.checkpoint import quantized_layers, replace_layer
from dqtk.recipes import recipe_named
from dqtk.sources import load_pipeline
from dqtk.spec import ConstantToken, ShortcutSplit
from dqtk.streaming import quantize_folder

RUN = {"call_kwargs": {"num_inference_steps": 3}, "batch_size": 2, "progress": False, "steps_per_run": 3}


@pytest.fixture(scope="module")
def stressed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says which outliers this pipeline cannot have
        pipe = stress(load_pipeline("tiny-sdxl"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def stats(stressed):
    return dqtk.calibrate(stressed, captions(2, seed=5), dqtk.plan(stressed, "mixdq-w8a8"), **RUN)


def quantized(pipe, stats, *kinds):
    """The pipeline around a quantized copy of its denoiser, with these kinds of transforms."""
    recipe = recipe_named("mixdq-w8a8")
    kept = [tuple(t for t in rule.spec.transforms if isinstance(t, kinds)) for rule in recipe.rules]
    rules = tuple(replace(rule, spec=replace(rule.spec, transforms=t)) for rule, t in zip(recipe.rules, kept, strict=True))
    other = copy.copy(pipe)
    other.register_modules(unet=copy.deepcopy(pipe.unet))
    own = copy.copy(stats)
    own.run = {}  # of the whole recipe
    return dqtk.quantize(other, replace(recipe, rules=rules), own, progress=False)


@pytest.fixture(scope="module")
def whole(stressed, stats):
    return quantized(stressed, stats, ConstantToken, ShortcutSplit)


def specs(pipe):
    return {path: layer.spec for path, layer in quantized_layers(pipe.unet).items()}


def test_what_is_found(whole, stressed):
    """Every up-block shortcut at the channels of the half from below, every key and value of the text."""
    split = {path: t.at for path, spec in specs(whole).items() for t in spec.transforms if isinstance(t, ShortcutSplit)}
    shortcuts = [path for path in split if path.endswith("conv_shortcut")]
    resnets = [path for path, _ in stressed.unet.named_modules() if path.startswith("up_blocks") and path.endswith("conv_shortcut")]
    assert shortcuts == resnets
    for path in shortcuts:
        below = stressed.unet.get_submodule(path).in_channels - split[path][0]
        assert len(split[path]) == 1
        assert below > 0
    constant = [path for path, spec in specs(whole).items() if ConstantToken() in spec.transforms]
    assert constant == [path for path in specs(whole) if path.endswith(("attn2.to_k", "attn2.to_v"))]
    assert not any(spec.looks and ShortcutSplit() in spec.transforms for spec in specs(whole).values())


@pytest.mark.parametrize("kind", [ConstantToken, ShortcutSplit])
def test_each_transform_pays_where_it_acts(stressed, stats, whole, kind):
    """SQNR of the denoiser on captions that calibration has not seen, everything exact but the layers that have the transform."""
    unseen = dqtk.calibrate(stressed, captions(2, seed=77), dqtk.plan(stressed, "mixdq-w8a8"), seed=99, **RUN)
    probe = OutputSQNR({"unet": stressed.unet}, unseen.calls)
    theirs = [path for path, spec in specs(whole).items() if any(isinstance(t, kind) for t in spec.transforms)]
    scores = []
    for pipe in (quantized(stressed, stats), whole):
        unet = copy.deepcopy(stressed.unet)
        for path in theirs:
            replace_layer(unet, path, pipe.unet.get_submodule(path))
        scores.append(probe("unet", unet))
    assert scores[1] > scores[0] + 0.5, scores


def test_saved_and_loaded_bit_by_bit(whole, draw, tmp_path):
    dqtk.save(whole, tmp_path / "p")
    loaded = dqtk.load(tmp_path / "p", dtype=torch.float32)
    assert specs(loaded) == specs(whole)
    assert torch.equal(draw(loaded, num_inference_steps=2), draw(whole, num_inference_steps=2))


def test_it_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="a streamed plan must need no statistics of inputs, got recipe 'mixdq-w8a8', which does"):
        quantize_folder("tiny-sdxl", tmp_path / "p", "mixdq-w8a8", progress=False)


def test_explain_says_what_is_looked_for(stressed, whole):
    plan = dqtk.plan(stressed, "mixdq-w8a8")
    assert "constant token, split" in plan.explain()
    from dqtk.installed import installed_plan

    assert "constant token" in installed_plan(whole).explain()
    planned, done = (p.sizes("unet")["bytes_after"] for p in (plan, installed_plan(whole)))
    assert planned <= done < 1.01 * planned  # the second scales of what turned out to be concatenated
