"""The public names, their arguments and the words that files are made of, frozen."""

import importlib
import inspect
import re
from pathlib import Path

import dqtk
from dqtk import checkpoint, plan
from dqtk.sites import ROLES

GOLDEN = {
    "Adapter": "(*, classes, roles, keep, reversed_time, layouts, frame_dim, cfg_layout)",
    "LayerSpec": "(*, weight, input, solver, transforms, low_rank, correct_bias)",
    "Plan": "(*, recipe, components, choices, attention)",
    "Recipe": "(*, name, rules)",
    "Rule": "(*, spec, why, pattern, roles)",
    "Site": "(*, id, kind, role, shape, bias, shared_input, unsupported)",
    "Stats": "(num_buckets, num_prompts, inputs, run, calls, times)",
    "allocate": "(pipe, prompts, candidates, budget, *, keep, groups, scores, ratio, sweep, switch, protect, around, "
    "parts, weigh, costs, stats, judged_on, call_kwargs, seed, batch_size, folder, me, progress)",
    "calibrate": "(pipe, prompts, plan, *, seed, batch_size, call_kwargs, steps_per_run, placement, keep_calls, output, progress)",
    "compare": "(reference, candidate, prompts, *, seed, seeds_per_prompt, batch_size, call_kwargs, scores, lpips_net, "
    "lpips_weights, num_trajectory, oracle, floor, reference_name, candidate_name, floor_name, reference_folder, candidate_folder, "
    "plan_summary, progress)",
    "find_sites": "(module, component, adapter)",
    "load": "(path, **kwargs)",
    "plan": "(target, recipe, *, text_encoders, overrides, policy, attention, density)",
    "quantize": "(target, plan, stats, *, prompts, call_kwargs, sequential, max_memory, correct, refine, checkpoint, progress)",
    "save": "(pipe, path)",
}


def names_only(signature):
    parts, keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        parts.append(f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name)
    return f"({', '.join(parts)})"


def test_public_names_and_arguments():
    assert sorted(dqtk.__all__) == sorted(GOLDEN)
    assert len(dqtk.__all__) <= 15
    assert {name: names_only(inspect.signature(getattr(dqtk, name))) for name in dqtk.__all__} == GOLDEN


def test_public_names_are_documented():
    for name in dqtk.__all__:
        assert len(inspect.getdoc(getattr(dqtk, name)) or "") > 40, name


def test_verbs_are_functions_although_modules_bear_their_names():
    assert all(inspect.isfunction(getattr(dqtk, verb)) for verb in ("plan", "quantize", "calibrate", "allocate", "save", "load"))


def test_version_is_that_of_the_package():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == dqtk.__version__


def test_words_that_files_are_made_of():
    """Changing one of these breaks saved plans and checkpoints: raise the format version then."""
    plan_module = importlib.import_module("dqtk.plan")
    assert inspect.isfunction(plan)
    assert (plan_module.FORMAT_VERSION, checkpoint.FORMAT_VERSION) == (1, 2)
    assert (checkpoint.METHOD, checkpoint.DIGESTS) == ("dqtk", "dqtk_digests")
    attention = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in ("q", "k", "v", "out")]
    around = ["modulation", "time_embedding", "text_projection", "patch_embedding", "output_projection", "other"]
    unet = ["block_in", "block_out", "conv", "shortcut_conv", "downsampler", "upsampler"]
    assert set(ROLES) == {*attention, "ff.up", "ff.down", *unet, *around}
