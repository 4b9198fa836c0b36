"""Which half of guidance a call holds: told by batch, time and latents, and not by an even number of samples."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate import calibrate
from dqtk.calibrate.guidance import ALL, Halves, branched, guided_steps
from dqtk.calibrate.replay import Call, from_tensors, to_tensors
from dqtk.resolve import adapters
from dqtk.sites import CfgLayout

PROMPTS = ["a small red circle moving left slowly", "a medium blue cross moving up quickly"]


class Denoiser(nn.Module):
    def forward(self, sample, timestep, text=None):
        return sample


class DiTTransformer2DModel(Denoiser):
    """Of a family whose pipeline puts the unconditional half last."""


def noise(size, seed=0):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def held(num_prompts, *calls, module=None):
    """What each call holds, (latents, time) each."""
    halves, found = Halves(module or Denoiser(), num_prompts), []
    for latents, time in calls:
        found += halves.see({"timestep": torch.tensor(time), "text": None, "sample": latents})
    return found + halves.end()


UNCOND, COND, BOTH = ("uncond",), ("cond",), ("uncond", "cond")


@pytest.mark.parametrize("num", [1, 2, 3])
def test_one_call_or_two(num):
    a, b = noise(num), noise(num, seed=1)
    assert held(num, (torch.cat([a, a]), 9.0), (torch.cat([b, b]), 5.0)) == [BOTH, BOTH]
    assert held(num, (a, 9.0), (a.clone(), 9.0), (b, 5.0), (b, 5.0)) == [COND, UNCOND] * 2
    assert held(num, (a, 9.0), (b, 5.0)) == [ALL, ALL]


def test_a_step_without_guidance_and_other_batches():
    """Guidance that ends early; three parts in a batch (a picture to edit, a text and neither); three calls of a step."""
    a, b = noise(2), noise(2, seed=1)
    assert held(2, (a, 9.0), (a, 9.0), (b, 5.0)) == [COND, UNCOND, ALL]
    assert held(2, (noise(6), 9.0)) == [ALL]
    assert held(2, (a, 9.0), (a, 9.0), (a, 9.0)) == [ALL] * 3
    assert held(2, (noise(1), 9.0), (noise(1), 9.0)) == [ALL, ALL]


def test_second_order_schedulers_call_twice_at_one_time():
    """Heun's: the second call is of other latents. With two calls per half there are four of one time."""
    a, b = noise(2), noise(2, seed=1)
    assert held(2, (a, 9.0), (b, 9.0)) == [ALL, ALL]
    assert held(2, (torch.cat([a, a]), 9.0), (torch.cat([b, b]), 9.0)) == [BOTH, BOTH]
    assert held(2, (a, 9.0), (a, 9.0), (b, 9.0), (b, 9.0)) == [COND, UNCOND] * 2


def test_lists_of_samples_and_calls_without_a_time():
    a = noise(2)
    assert held(2, (list(a), 9.0), (list(a.clone()), 9.0)) == [COND, UNCOND]
    assert held(1, (list(a), 9.0)) == [BOTH]
    halves = Halves(Denoiser(), 2)
    assert halves.see({"sample": a}) + halves.see({"sample": a}) + halves.end() == [ALL, ALL]


def test_families_say_which_half_comes_first():
    a = noise(2)
    assert held(1, (a, 9.0), module=DiTTransformer2DModel()) == [("cond", "uncond")]
    turned = {name for name, adapter in adapters().items() if adapter.cfg_layout.batched == ("cond", "uncond")}
    assert turned == {"DiTTransformer2DModel", "ZImageTransformer2DModel"}


def test_calls_of_a_run_say_what_they_hold():
    """Of two denoisers, each by itself; text encoders hold nothing."""
    a, b = noise(2), noise(2, seed=1)
    calls = [
        Call("text_encoder", (), {"sample": a}, None),
        *(Call(name, (), {"sample": x, "timestep": torch.tensor(t)}, t) for name, x, t in TWO for x in (x, x)),
    ]
    parts = {"text_encoder": Denoiser(), "transformer": Denoiser(), "transformer_2": Denoiser()}
    assert [call.branches for call in branched(calls, parts, 2)] == [None, *[COND, UNCOND] * 2]
    assert [call.branches for call in branched(calls, parts, 1)] == [None, *[BOTH] * 4]
    assert not torch.equal(a, b)


TWO = (("transformer", noise(2), 9.0), ("transformer_2", noise(2, seed=1), 5.0))


# --- what is learned from --------------------------------------------------------------------------------------------


def kept_calls(texts, branches, runs=3):
    """A step of every run: a call for each of ``branches``; ``texts``: (run, half) -> text of a sample."""
    found = []
    for run in range(runs):
        latents = noise(2, seed=run)
        for halves in branches:
            text = torch.stack([texts(run, half) for half in halves for _ in range(2)])
            kwargs = {"sample": torch.cat([latents] * len(halves)), "timestep": torch.tensor(9.0), "more": {"text": text}}
            found.append(Call("unet", (), kwargs, 0.5, run, halves))
    return found


def by_prompt(run, half):
    """The prompt's text, and one for all."""
    return noise(3, seed=run + 7) if half == "cond" else torch.ones(3, 4) + 1e-4 * run


LAYOUTS = [(BOTH,), (("cond", "uncond"),), (COND, UNCOND), (UNCOND, COND)]


@pytest.mark.parametrize("branches", LAYOUTS)
def test_steps_with_both_halves(branches):
    calls = kept_calls(by_prompt, branches)
    num = len(branches)
    assert guided_steps("unet", calls) == [tuple(range(i, i + num)) for i in range(0, len(calls), num)]
    alike = kept_calls(lambda run, half: torch.ones(3, 4), branches)  # one prompt for all, or none that is seen: as declared
    assert len(guided_steps("unet", alike)) == 3


@pytest.mark.parametrize("branches", LAYOUTS)
def test_texts_contradict_an_order(branches):
    turned = kept_calls(lambda run, half: by_prompt(run, "uncond" if half == "cond" else "cond"), branches)
    with pytest.raises(
        ValueError,
        match=r"refine: the unconditional half of guidance must be the one with the same text for all prompts, got more.text of "
        r"unet that is the same in the other half. Leave .* \(Adapter.cfg_layout\)",
    ):
        guided_steps("unet", turned)


def test_steps_must_be_whole():
    calls = kept_calls(by_prompt, (COND, UNCOND))
    for wrong in (calls[:-1], calls[1:], [calls[0], replace(calls[1], run=7)], [calls[0], replace(calls[1], branches=COND)]):
        with pytest.raises(ValueError, match=r"do not hold both halves of guidance, got a batch of 2 of one half alone at noise"):
            guided_steps("unet", wrong)


def test_files_keep_it_and_old_ones_do_not_know():
    calls = [*kept_calls(by_prompt, (COND, UNCOND), runs=1), Call("text_encoder", (), {"x": noise(1)}, None)]
    tensors, text = to_tensors(calls)
    assert [call.branches for call in from_tensors(tensors.__getitem__, text)] == [COND, UNCOND, None]
    for columns in (3, 4):
        old = json.dumps([row[:columns] for row in json.loads(text)])
        again = from_tensors(tensors.__getitem__, old)
        assert [(call.run, call.branches) for call in again] == [(0, None)] * 3
    with pytest.raises(ValueError, match=r"got a batch of 2 that may be either at noise level 0.500. Calibrate again with this"):
        guided_steps("unet", again[:2])


# --- a pipeline that calls once per half -----------------------------------------------------------------------------


def watched(pipe, prompts, small_clip):
    """Least and largest input of a layer that reads text, in the calls of a run one after the other."""
    seen = []
    layer = pipe.transformer.get_submodule(LAYER)
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append((float(args[0].min()), float(args[0].max()))))
    seeds = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    pipe(prompts, generator=seeds, output_type="latent", **small_clip)
    handle.remove()
    return seen


LAYER = "blocks.0.attn2.to_k"


@pytest.mark.parametrize("batch", [1, 2])
def test_wan_is_recorded_by_branch(load_wan, small_clip, batch):
    """Two prompts in a batch, or one: the conditional call of a step first, the negative prompt's second."""
    pipe = load_wan()
    plan = dqtk.plan(pipe, "w8a8-static")
    stats = calibrate(
        pipe, PROMPTS[:batch], plan, batch_size=batch, call_kwargs=small_clip, keep_calls=True, steps_per_run=2, progress=False
    )
    mine = {key: value for key, value in stats.inputs.items() if key.site == f"transformer:{LAYER}"}
    assert {key.branch for key in mine} == {"cond", "uncond"}
    seen = watched(pipe, PROMPTS[:batch], small_clip)
    for first, branch in ((0, "cond"), (1, "uncond")):
        found = [value for key, value in mine.items() if key.branch == branch]
        assert min(float(value.low) for value in found) == min(low for low, _ in seen[first::2])
        assert max(float(value.high) for value in found) == max(high for _, high in seen[first::2])
    assert seen[0] != seen[1]
    calls = [call for call in stats.calls if call.component == "transformer"]
    assert [call.branches for call in calls] == [COND, UNCOND] * 2
    negative = pipe.encode_prompt(PROMPTS[:batch], max_sequence_length=small_clip["max_sequence_length"])[1]
    assert all(torch.equal(call.kwargs["encoder_hidden_states"], negative) for call in calls[1::2])


def test_wan_without_guidance_is_not_split(load_wan, small_clip):
    pipe = load_wan()
    plan = dqtk.plan(pipe, "w8a8-static")
    how = small_clip | {"guidance_scale": 1.0}
    stats = calibrate(pipe, PROMPTS, plan, batch_size=2, call_kwargs=how, keep_calls=True, progress=False)
    assert {key.branch for key in stats.inputs if key.site.startswith("transformer:")} == {"all"}
    assert {call.branches for call in stats.calls} == {ALL}


def test_dit_has_its_unconditional_half_last(monkeypatch):
    """Class 1000. Declared the other way, its class labels contradict it."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, out_channels=8)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16)
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
    plan, found = dqtk.plan(pipe, "w8a8-static"), {}
    for layout in (adapters()["DiTTransformer2DModel"].cfg_layout, CfgLayout()):
        adapter = replace(adapters()["DiTTransformer2DModel"], cfg_layout=layout)
        monkeypatch.setitem(adapters(), "DiTTransformer2DModel", adapter)
        stats = calibrate(
            pipe, ["7", "8"], plan, batch_size=1, call_kwargs={"num_inference_steps": 2}, keep_calls=True, progress=False
        )
        found[layout.batched] = [call for call in stats.calls if call.component == "transformer"]
    calls = found["cond", "uncond"]
    assert {call.branches for call in calls} == {("cond", "uncond")}
    assert [call.kwargs["class_labels"].tolist() for call in calls[::2]] == [[7, 1000], [8, 1000]]
    assert guided_steps("transformer", calls) == [(0,), (1,), (2,), (3,)]
    with pytest.raises(ValueError, match="must be the one with the same text for all prompts, got class_labels of transformer"):
        guided_steps("transformer", found["uncond", "cond"])
