"""Calibration of a real pipeline, against watching it by hand; interrupted and continued."""

import copy
import functools
import re

import pytest
import torch

import dqtk
from dqtk.calibrate import Stats, calibrate

PROMPTS = ["a red square", "a large blue circle", "two small green triangles"]


def run(pixart, plan, call_kwargs, prompts=PROMPTS, **options):
    return calibrate(pixart, prompts, plan, call_kwargs=call_kwargs, progress=False, **options)


def same(a, b):
    assert a.num_prompts == b.num_prompts
    assert a.inputs.keys() == b.inputs.keys()
    for key, seen in a.inputs.items():
        other = b.inputs[key]
        assert seen.count == other.count
        assert torch.equal(seen.low, other.low)
        assert torch.equal(seen.high, other.high)
        assert torch.equal(seen.channel_absmax, other.channel_absmax)


@pytest.fixture(scope="module")
def stats(pixart, plan, call_kwargs):
    return run(pixart, plan, call_kwargs, batch_size=2)


def test_every_site_of_the_plan_is_seen(stats, plan):
    assert {key.site for key in stats.inputs} == {c.site.id for c in plan.choices if c.spec is not None and c.spec.needs_stats}
    assert stats.num_prompts == 3


def test_denoiser_keys_are_levels_and_branches(stats):
    keys = [key for key in stats.inputs if key.site.startswith("transformer:transformer_blocks.0.attn1.to_q")]
    assert len({key.bucket for key in keys}) == 3
    assert {key.branch for key in keys} == {"uncond", "cond"}
    assert len(keys) == 6
    assert {key.bucket for key in stats.inputs if key.site.startswith("text_encoder:")} == {-1}


def test_ranges_equal_brute_force(pixart, plan, call_kwargs, stats):
    """Least and largest of everything that goes into a layer, gathered by hand."""
    path = "transformer_blocks.0.ff.net.0.proj"
    seen = []
    handle = pixart.transformer.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for start, batch in ((0, PROMPTS[:2]), (2, PROMPTS[2:])):
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        pixart(batch, generator=generators, output_type="latent", **call_kwargs)
    handle.remove()
    low, high = stats.input_range(f"transformer:{path}")
    assert len(seen) == 6
    assert float(low) == min(float(x.min()) for x in seen)
    assert float(high) == max(float(x.max()) for x in seen)
    keys = [key for key in stats.inputs if key.site == f"transformer:{path}"]
    assert sum(stats.inputs[key].count for key in keys) == sum(x.shape[0] * x.shape[1] for x in seen)


def test_no_hook_stays(pixart, stats):
    parts = (pixart.transformer, pixart.text_encoder)
    assert not any(m._forward_pre_hooks or m._forward_hooks for part in parts for m in part.modules())


def test_prompts_in_batches_of_any_size_give_the_same_ranges(pixart, plan, call_kwargs, stats):
    """Noise comes from one seed per prompt; only rounding of other matmul shapes may differ."""
    single = run(pixart, plan, call_kwargs, batch_size=1)
    assert single.inputs.keys() == stats.inputs.keys()
    for site in ("transformer:transformer_blocks.0.attn1.to_q", "transformer:transformer_blocks.1.ff.net.2"):
        for a, b in zip(single.input_range(site), stats.input_range(site), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_interrupted_and_continued_equals_one_run(pixart, plan, call_kwargs, stats, tmp_path, monkeypatch):
    output = tmp_path / "stats.safetensors"
    calls = []
    kind = type(pixart)
    original = kind.__call__

    @functools.wraps(original)
    def interrupted(self, prompt, **kwargs):
        if calls:
            raise KeyboardInterrupt
        calls.append(prompt)
        return original(self, prompt, **kwargs)

    monkeypatch.setattr(kind, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pixart, plan, call_kwargs, batch_size=2, output=output)
    monkeypatch.undo()
    assert Stats.load(output).num_prompts == 2
    same(run(pixart, plan, call_kwargs, batch_size=2, output=output), stats)
    same(Stats.load(output), stats)


def test_finished_output_is_returned_without_running(pixart, plan, call_kwargs, stats, tmp_path, monkeypatch):
    stats.save(tmp_path / "s")
    monkeypatch.setattr(type(pixart), "__call__", lambda *args, **kwargs: pytest.fail("ran"))
    same(run(pixart, plan, call_kwargs, batch_size=2, output=tmp_path / "s"), stats)


@pytest.mark.parametrize("what", ["sites", "seed", "batch_size", "call_kwargs", "prompts", "model"])
def test_output_of_another_run_is_refused(pixart, plan, call_kwargs, stats, tmp_path, what):
    stats.save(tmp_path / "s")
    other = dqtk.plan(pixart, "w8a8-static", overrides={"transformer_blocks.0.attn1.to_q": None})
    options = {
        "sites": {"plan": other},
        "seed": {"seed": 7},
        "batch_size": {"batch_size": 1},
        "call_kwargs": {"call_kwargs": call_kwargs | {"guidance_scale": 2.0}},
        "model": {},
        "prompts": {"prompts": ["another prompt", *PROMPTS[1:]]},
    }[what]
    if what == "model":
        last = [c.site for c in plan.choices if c.spec is not None and c.spec.needs_stats][-1]
        options["pixart"] = copy.deepcopy(pixart)
        options["pixart"].components[last.component].get_submodule(last.path).weight.data.mul_(1.1)
    usual = {"pixart": pixart, "plan": plan, "call_kwargs": call_kwargs, "output": tmp_path / "s", "batch_size": 2}
    with pytest.raises(ValueError, match=rf"calibrate: {what} of .*s must be those of this run \(.*\), got .*remove it"):
        run(**(usual | options))


def test_plans_without_static_inputs_need_no_run(pixart, monkeypatch):
    monkeypatch.setattr(type(pixart), "__call__", lambda *args, **kwargs: pytest.fail("ran"))
    assert calibrate(pixart, [], dqtk.plan(pixart, "w8a8")).num_prompts == 0


def test_bad_calls(pixart, plan, call_kwargs):
    with pytest.raises(ValueError, match="calibrate: prompts must hold at least one prompt, got none"):
        run(pixart, plan, call_kwargs, prompts=[])
    bare = dqtk.plan(pixart.transformer, "w8a8-static")
    with pytest.raises(
        ValueError, match=r"calibrate: pipe must be a pipeline .*, got PixArtTransformer2DModel\. Pass the pipeline"
    ):
        calibrate(pixart.transformer, PROMPTS, bare)


def test_statistics_of_another_model_are_refused(pixart, plan, stats):
    """Also with equal shapes; the same weights in another dtype are the same model."""
    other = copy.deepcopy(pixart).to(torch.bfloat16)
    other.transformer.pos_embed.to(torch.bfloat16)
    dqtk.quantize(other, plan, stats, progress=False)
    third = copy.deepcopy(pixart)
    first = next(c.site for c in plan.choices if c.spec is not None)
    third.components[first.component].get_submodule(first.path).weight.data.neg_()
    with pytest.raises(ValueError, match=r"quantize: stats of \w+ must come from this model, got those of other weights\."):
        dqtk.quantize(third, plan, stats, progress=False)


def test_statistics_serve_another_plan_of_the_same_model(pixart, plan, stats):
    """Fewer layers than were watched: nothing is other about the model."""
    fewer = dqtk.plan(pixart, "w8a8-static", overrides={"*.attn1.to_q": None, "*.ff.*": None})
    dqtk.quantize(copy.deepcopy(pixart), fewer, stats, progress=False)


@pytest.mark.parametrize("option", ["batch_size", "steps_per_run"])
def test_numbers_that_calibrate_nothing_are_refused(pixart, plan, option):
    for value in (0, -1, 1.5):
        with pytest.raises(ValueError, match=rf"calibrate: {option} must be a positive integer, got {value}"):
            calibrate(pixart, ["a cat"], plan, **{option: value})


def test_one_text_is_no_list_of_prompts(pixart, plan):
    with pytest.raises(ValueError, match=r"calibrate: prompts must be a list of texts, got one text 'a cat'\. Put it in a list\."):
        calibrate(pixart, "a cat", plan)


def test_statistics_say_what_they_are_in_one_line(stats):
    assert re.fullmatch(r"Stats\(3 prompts, \d+ entries of \d+ sites\)", repr(stats))
