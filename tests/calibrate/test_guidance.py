"""Which half of guidance a call holds: told by batch, time, latents and texts, and not by an even number of samples."""

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
    """What each call holds, (latents, time) or (latents, time, other arguments) each: without these all samples' texts differ."""
    halves, found = Halves(module or Denoiser(), num_prompts), []
    for number, (latents, time, *given) in enumerate(calls):
        more = given[0] if given else {"text": noise(len(latents), seed=number + 50)}
        found += halves.see({"timestep": torch.tensor(time), **more, "sample": latents})
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
    assert turned == {
        "AceStepTransformer1DModel",
        "DiTTransformer2DModel",
        "LuminaNextDiT2DModel",
        "OmniGenTransformer2DModel",
        "StableCascadeUNet",
        "ZImageTransformer2DModel",
    }
    assert {adapter.cfg_layout.separate for adapter in adapters().values()} == {("cond", "uncond")}


@pytest.mark.parametrize("num", [1, 2])
def test_the_same_texts_in_both_are_no_halves(num):
    """Perturbed attention without guidance by text; an empty prompt whose negative one is empty too."""
    a, text = noise(num), noise(num, seed=3)
    mask = torch.ones(num, 5, dtype=torch.bool)
    both, two = torch.cat([a, a]), torch.cat([text, text])
    assert held(num, (both, 9.0, {"text": two})) == [ALL]
    assert held(num, (both, 9.0, {"text": list(two)})) == [ALL]
    assert held(num, (both, 9.0, {"more": {"text": two, "mask": torch.cat([mask, mask])}})) == [ALL]
    assert held(num, (both, 9.0, {"more": {"text": two, "mask": torch.cat([mask, ~mask])}})) == [BOTH]
    assert held(num, (a, 9.0, {"text": text}), (a, 9.0, {"text": text.clone()})) == [ALL, ALL]
    assert held(num, (a, 9.0, {"text": text, "skip": None}), (a, 9.0, {"text": text, "skip": [3]})) == [ALL, ALL]
    assert held(num, (a, 9.0, {"text": text}), (a, 9.0, {"text": text[:, :3]})) == [COND, UNCOND]  # texts of other lengths
    assert held(num, (a, 9.0, {"text": text}), (a, 9.0, {"text": None})) == [COND, UNCOND]
    same = {"text": text, "pooled": text}
    assert held(num, (a, 9.0, same), (a, 9.0, same | {"pooled": -text})) == [COND, UNCOND]


def test_texts_are_compared_only_where_a_call_may_hold_a_half(monkeypatch):
    """Not of one call a step, of other batches, or of the third of a step; and no further than the first difference."""
    compared, equal = [], torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a.shape[-1]) or equal(a, b))
    text, long = torch.zeros(2, 7), torch.zeros(2, 9)  # latents have 4 numbers
    for calls in (
        [(noise(2), 9.0, {"text": text}), (noise(2, seed=1), 5.0, {"text": text})],
        [(noise(6), 9.0, {"text": text})],
        [(noise(1), 9.0, {"text": text}), (noise(1), 9.0, {"text": text})],
    ):
        held(2, *calls)
    assert 7 not in compared
    a = noise(2)
    assert held(2, *((a, 9.0, {"text": text + i, "long": long}) for i in range(3))) == [ALL] * 3
    assert (compared.count(7), compared.count(9)) == (1, 0)


def test_other_calls_of_a_step_with_both_halves_are_not_halves():
    """LTX-2: both halves in a batch, then without some blocks, then without the other modality, both of the prompts' texts."""
    a, b, cond, uncond = noise(2), noise(2, seed=1), noise(2, seed=2), noise(2, seed=3)
    texts = {"text": torch.cat([uncond, cond])}
    step = [(torch.cat([a, a]), 9.0, texts), (a, 9.0, {"text": cond}), (a.clone(), 9.0, {"text": cond})]
    following = (torch.cat([b, b]), 5.0, texts)
    assert held(2, *step, following) == [BOTH, ALL, ALL, BOTH]
    assert held(2, *step[1:], following) == [ALL, ALL, BOTH]
    assert held(2, *step[:2], (a, 9.0, {"text": uncond})) == [BOTH, ALL, ALL]
    assert held(2, (list(torch.cat([a, a])), 9.0, texts), (list(a), 9.0), (list(a), 9.0)) == [BOTH, ALL, ALL]
    assert held(2, (a, 9.0), (a, 9.0), (torch.cat([a, a]), 9.0)) == [ALL, ALL, BOTH]


def test_calls_of_a_run_say_what_they_hold():
    """Of two denoisers, each by itself; text encoders hold nothing."""
    two = (("transformer", noise(2), 9.0), ("transformer_2", noise(2, seed=1), 5.0))
    calls = [
        Call("text_encoder", (), {"sample": noise(2)}, None),
        *(
            Call(name, (), {"sample": latents, "timestep": torch.tensor(time), "text": noise(2, seed=half)}, time)
            for name, latents, time in two
            for half in (7, 8)
        ),
    ]
    parts = {"text_encoder": Denoiser(), "transformer": Denoiser(), "transformer_2": Denoiser()}
    assert [call.branches for call in branched(calls, parts, 2)] == [None, *[COND, UNCOND] * 2]
    assert [call.branches for call in branched(calls, parts, 1)] == [None, *[BOTH] * 4]


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


def steps_of(calls):
    return guided_steps("unet", Denoiser(), calls)


LAYOUTS = [(BOTH,), (("cond", "uncond"),), (COND, UNCOND), (UNCOND, COND)]


@pytest.mark.parametrize("branches", LAYOUTS)
def test_steps_with_both_halves(branches):
    calls = kept_calls(by_prompt, branches)
    num = len(branches)
    assert steps_of(calls) == [tuple(range(i, i + num)) for i in range(0, len(calls), num)]
    one = kept_calls(lambda run, half: by_prompt(0, half), branches)  # one prompt for all, which tells nothing: as declared
    assert len(steps_of(one)) == 3
    unseen = [replace(call, kwargs=call.kwargs | {"more": {}}) for call in calls]  # as are texts that are not given by tensors
    assert len(steps_of(unseen)) == 3


@pytest.mark.parametrize("branches", LAYOUTS)
def test_halves_with_the_same_texts_teach_no_guidance(branches):
    """One prompt that is the negative one, among others; nothing else of the file says so."""
    calls = kept_calls(lambda run, half: by_prompt(run, "uncond" if run == 1 else half), branches)
    with pytest.raises(
        ValueError,
        match=r"refine: guidance must be None for calls of unet that do not hold both .* got a batch of [24] with the same texts "
        r"in both at noise level 0.500. Leave it out, or calibrate again with prompts that differ from the negative one\.",
    ):
        steps_of(calls)


def test_bool_masks_are_texts_too():
    calls = kept_calls(by_prompt, (COND, UNCOND))
    for call in calls:
        call.kwargs["more"]["mask"] = torch.tensor([[True] * 4 + [False] * (1 if call.branches == COND else 3)] * 2)
    assert steps_of(calls) == [(0, 1), (2, 3), (4, 5)]
    masks = [replace(call, kwargs=call.kwargs | {"more": {"mask": call.kwargs["more"]["mask"]}}) for call in calls]
    for run, call in enumerate(masks[1::2]):
        call.kwargs["more"]["mask"] = torch.arange(7).expand(2, 7) < run + 1  # other masks in the negative half alone
    with pytest.raises(ValueError, match=r"must be the one with the same text for all prompts, got more\.mask of unet that is"):
        steps_of(masks)


# --- steps in which the pipeline leaves guidance out -----------------------------------------------------------------


def plain_call(run, size=2, time=5.0, latents=None):
    kwargs = {"sample": noise(size, seed=run + 20) if latents is None else latents, "timestep": torch.tensor(time)}
    return Call("unet", (), kwargs | {"more": {"text": torch.stack([by_prompt(run, "cond")] * size)}}, 0.25, run, ALL)


@pytest.mark.parametrize("branches", LAYOUTS)
@pytest.mark.parametrize("as_list", [False, True])
def test_a_step_without_guidance_is_a_lesson_of_its_own(branches, as_list):
    """Lumina 2's cfg_trunc_ratio, Z-Image's cfg_truncation, first or last; of a run whose other kept steps are too."""
    calls = kept_calls(by_prompt, branches, runs=2)
    num = len(branches)
    calls = [plain_call(0), *calls[:num], *calls[num:], plain_call(1), plain_call(2, size=1)]
    if as_list:
        calls = [replace(call, kwargs=call.kwargs | {"sample": list(call.kwargs["sample"])}) for call in calls]
    first, second = (tuple(range(start, start + num)) for start in (1, num + 1))
    assert steps_of(calls) == [(0,), first, second, (2 * num + 1,), (2 * num + 2,)]


def test_calls_without_halves_that_are_not_all_of_a_step_are_refused():
    calls = kept_calls(by_prompt, (BOTH,))
    one = noise(1)
    no_halves = (
        r"got a batch of \d in which no halves can be told at noise level .*, with prompts that differ from the negative one"
    )
    for wrong in (
        [*calls, plain_call(2), plain_call(2)],  # two in a step: perturbed attention, or Heun's
        [*calls, plain_call(2, time=9.0)],  # one more in a step with both halves: LTX-2's
        [
            *calls,
            plain_call(2, latents=torch.cat([one, one])),
        ],  # a batch that repeats its latents: a prompt that is the negative one
        [*calls, plain_call(2, latents=torch.cat([one] * 3))],
        [plain_call(0), plain_call(1)],  # no guidance at all
    ):
        with pytest.raises(ValueError, match=no_halves):
            steps_of(wrong)


@pytest.mark.parametrize("branches", LAYOUTS)
def test_texts_contradict_an_order(branches):
    turned = kept_calls(lambda run, half: by_prompt(run, "uncond" if half == "cond" else "cond"), branches)
    with pytest.raises(
        ValueError,
        match=r"refine: the unconditional half of guidance must be the one with the same text for all prompts, got more.text of "
        r"unet that is the same in the other half. Leave .* \(Adapter.cfg_layout\)",
    ):
        steps_of(turned)


def test_steps_must_be_whole():
    calls = kept_calls(by_prompt, (COND, UNCOND))
    for wrong in (calls[:-1], calls[1:], [calls[0], replace(calls[1], run=7)], [calls[0], replace(calls[1], branches=COND)]):
        with pytest.raises(ValueError, match=r"do not hold both halves of guidance, got a batch of 2 of one half alone at noise"):
            steps_of(wrong)


def test_files_keep_it_and_old_ones_do_not_know():
    calls = [*kept_calls(by_prompt, (COND, UNCOND), runs=1), Call("text_encoder", (), {"x": noise(1)}, None)]
    tensors, text = to_tensors(calls)
    assert [call.branches for call in from_tensors(tensors.__getitem__, text)] == [COND, UNCOND, None]
    for columns in (3, 4):
        old = json.dumps([row[:columns] for row in json.loads(text)])
        again = from_tensors(tensors.__getitem__, old)
        assert [(call.run, call.branches) for call in again] == [(0, None)] * 3
    with pytest.raises(ValueError, match=r"got a batch of 2 that may be either at noise level 0.500. Calibrate again with this"):
        steps_of(again[:2])


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


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_perturbed_attention_is_not_split(pixart, call_kwargs, guidance):
    """Without guidance by text a batch of twice the prompts, all of whose texts are the prompts'; with it of three times."""
    from diffusers import PixArtSigmaPAGPipeline

    pipe = PixArtSigmaPAGPipeline(**pixart.components, pag_applied_layers="blocks.0.")
    pipe.set_progress_bar_config(disable=True)
    plan, processors = dqtk.plan(pipe, "w8a8-static"), dict(pipe.transformer.attn_processors)
    how = call_kwargs | {"guidance_scale": guidance, "pag_scale": 3.0}
    try:
        stats = calibrate(pipe, PROMPTS, plan, batch_size=2, call_kwargs=how, keep_calls=True, progress=False)
    finally:
        pixart.transformer.set_attn_processor(processors)
    calls = [call for call in stats.calls if call.component == "transformer"]
    assert {len(call.kwargs["hidden_states"]) for call in calls} == {4 if guidance == 1.0 else 6}
    assert {call.branches for call in calls} == {ALL}
    assert {key.branch for key in stats.inputs if key.site.startswith("transformer:")} == {"all"}
    with pytest.raises(ValueError, match=r"in which no halves can be told .* guidance of other kinds \(perturbed attention"):
        guided_steps("transformer", pipe.transformer, calls)


def test_a_prompt_that_is_the_negative_one_is_not_split(pixart, call_kwargs):
    plan = dqtk.plan(pixart, "w8a8-static")
    how = call_kwargs | {"negative_prompt": "nothing"}
    stats = calibrate(pixart, ["nothing", PROMPTS[0]], plan, batch_size=1, call_kwargs=how, keep_calls=True, progress=False)
    calls = [call for call in stats.calls if call.component == "transformer"]
    assert [call.branches for call in calls] == [ALL] * 3 + [BOTH] * 3
    with pytest.raises(ValueError, match=r"a batch of 2 in which no halves .* with prompts that differ from the negative one"):
        guided_steps("transformer", pixart.transformer, calls)
    assert guided_steps("transformer", pixart.transformer, calls[3:]) == [(0,), (1,), (2,)]


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
    assert guided_steps("transformer", transformer, calls) == [(0,), (1,), (2,), (3,)]
    with pytest.raises(ValueError, match="must be the one with the same text for all prompts, got class_labels of transformer"):
        guided_steps("transformer", transformer, found["uncond", "cond"])
