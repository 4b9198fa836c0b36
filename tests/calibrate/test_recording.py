"""Hooks while a pipeline runs: what they see, where they put it, and that none stays."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from dqtk.calibrate import Stats
from dqtk.calibrate.levels import bucket_of, noise_level
from dqtk.calibrate.record import recording
from dqtk.sites import Site


class Denoiser(nn.Module):
    """Takes (sample, timestep) like a UNet, scales its input by the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return self.layer(sample) + self.extra(input=sample)


class Swapped(Denoiser):
    """The timestep is the third argument and has another name."""

    def forward(self, hidden_states, encoder_hidden_states, timesteps):
        return self.layer(hidden_states)


class ByList(Denoiser):
    """A list of samples and a time called t, as Z-Image has it."""

    def forward(self, x, t, cap_feats=None):
        return [self.layer(sample) for sample in x]


def site(path, component="transformer"):
    return Site(id=f"{component}:{path}", kind="linear", role="other", shape=(4, 4), bias=True)


def pipeline(denoiser=None, **components):
    denoiser = denoiser or Denoiser()
    parts = {"transformer": denoiser, **components}
    return SimpleNamespace(components=parts, scheduler=DDIMScheduler(), **parts)


def hooks(pipe):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for part in pipe.components.values() for m in part.modules())


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def branches(stats):
    return {(key.bucket, key.branch) for key in stats.inputs}


def test_keys_are_level_and_branch():
    pipe, stats, x = pipeline(), Stats(), seeded(4, 3, 4)
    with recording(pipe, [site("layer"), site("extra")], stats, num_prompts=2):
        for t in (999, 200, 0):
            pipe.transformer(x, torch.tensor(t))
    expected = {bucket_of(noise_level(pipe.scheduler, torch.tensor(t)), 20) for t in (999, 200, 0)}
    assert len(expected) == 3
    assert branches(stats) == {(bucket, branch) for bucket in expected for branch in ("uncond", "cond")}
    assert {key.site for key in stats.inputs} == {"transformer:layer", "transformer:extra"}


def test_guidance_halves_are_kept_apart_unconditional_first():
    pipe, stats = pipeline(), Stats()
    x = torch.cat([torch.full((2, 3, 4), -1.0), torch.full((2, 3, 4), 5.0)])
    with recording(pipe, [site("layer")], stats, num_prompts=2):
        pipe.transformer(x, torch.tensor(500))
    ranges = {key.branch: (float(seen.low), float(seen.high), seen.count) for key, seen in stats.inputs.items()}
    assert ranges == {"uncond": (-1.0, -1.0, 6), "cond": (5.0, 5.0, 6)}


def test_separate_calls_are_kept_apart_conditional_first():
    """Two prompts in each, as many samples as both halves of one; the last step has no second call."""
    pipe, stats = pipeline(), Stats()
    x = seeded(2, 3, 4)
    with recording(pipe, [site("layer"), site("extra")], stats, num_prompts=2):
        for t in (999, 999, 500, 500, 0):
            pipe.transformer(x, torch.tensor(t))
        assert (bucket_of(noise_level(pipe.scheduler, torch.tensor(0)), 20), "all") not in branches(stats)  # the step may go on
    buckets = [bucket_of(noise_level(pipe.scheduler, torch.tensor(t)), 20) for t in (999, 500, 0)]
    assert branches(stats) == {(b, branch) for b in buckets[:2] for branch in ("cond", "uncond")} | {(buckets[2], "all")}
    assert {seen.count for seen in stats.inputs.values()} == {6}


def test_inputs_of_separate_calls_go_to_their_half():
    pipe, stats, x = pipeline(), Stats(), seeded(2, 3, 4)
    pipe.transformer.forward = lambda sample, timestep, text: pipe.transformer.layer(sample * 0 + text)
    with recording(pipe, [site("layer")], stats, num_prompts=2):
        for text in (2.0, -3.0):
            pipe.transformer(x, torch.tensor(500), text)
    assert {key.branch: (float(seen.low), float(seen.high)) for key, seen in stats.inputs.items()} == {
        "cond": (2.0, 2.0),
        "uncond": (-3.0, -3.0),
    }


def test_without_guidance_there_is_one_branch():
    pipe, stats = pipeline(), Stats()
    with recording(pipe, [site("layer")], stats, num_prompts=2):
        pipe.transformer(seeded(2, 3, 4), torch.tensor(500))
    assert {key.branch for key in stats.inputs} == {"all"}


@pytest.mark.parametrize(
    ("denoiser", "call"),
    [
        (Denoiser, lambda m, x, t: m(x, t)),
        (Denoiser, lambda m, x, t: m(sample=x, timestep=t)),
        (Denoiser, lambda m, x, t: m(x, timestep=float(t))),
        (Swapped, lambda m, x, t: m(x, None, t.expand(4))),
        (Swapped, lambda m, x, t: m(hidden_states=x, encoder_hidden_states=None, timesteps=t)),
        (ByList, lambda m, x, t: m(list(x), t)),
    ],
)
def test_timestep_is_found_whatever_the_call_looks_like(denoiser, call):
    pipe, stats, t = pipeline(denoiser()), Stats(), torch.tensor(300)
    with recording(pipe, [site("layer")], stats, num_prompts=2):
        call(pipe.transformer, seeded(4, 2, 4), t)
    assert {bucket for bucket, _ in branches(stats)} == {bucket_of(noise_level(pipe.scheduler, t), 20)}


def test_text_encoders_have_no_level():
    encoder = nn.Sequential(nn.Linear(4, 4))
    pipe, stats = pipeline(text_encoder=encoder), Stats()
    with recording(pipe, [site("0", "text_encoder"), site("layer")], stats, num_prompts=1):
        encoder(seeded(2, 4))
        pipe.transformer(seeded(2, 3, 4), torch.tensor(500))
        encoder(seeded(2, 4, seed=1))
    assert {(key.bucket, key.branch) for key in stats.inputs if key.site == "text_encoder:0"} == {(-1, "all")}


def test_two_denoisers_have_their_own_level():
    second = Denoiser()
    pipe, stats = pipeline(transformer_2=second), Stats()
    with recording(pipe, [site("layer"), site("layer", "transformer_2")], stats, num_prompts=1):
        pipe.transformer(seeded(1, 3, 4), torch.tensor(999))
        second(seeded(1, 3, 4), torch.tensor(0))
    assert {(key.site, key.bucket) for key in stats.inputs} == {("transformer:layer", 19), ("transformer_2:layer", 0)}
    assert stats.times == {("transformer", 19): (999.0, 999.0), ("transformer_2", 0): (0.0, 0.0)}


def test_empty_inputs_are_not_seen():
    pipe, stats = pipeline(), Stats()
    with recording(pipe, [site("layer")], stats, num_prompts=1):
        pipe.transformer(torch.zeros(0, 3, 4), torch.tensor(500))
    assert not stats.inputs


def test_recording_changes_no_result():
    pipe, x = pipeline(), seeded(4, 3, 4)
    expected = pipe.transformer(x, torch.tensor(500))
    with recording(pipe, [site("layer")], Stats(), num_prompts=2):
        assert torch.equal(pipe.transformer(x, torch.tensor(500)), expected)


def test_no_hook_stays():
    pipe = pipeline()
    with recording(pipe, [site("layer")], Stats(), num_prompts=1):
        assert hooks(pipe) == 2
    assert hooks(pipe) == 0


def test_no_hook_stays_after_an_exception():
    pipe, stats = pipeline(), Stats()

    def interrupted():
        with recording(pipe, [site("layer")], stats, num_prompts=1):
            pipe.transformer(seeded(2, 3, 4), torch.tensor([1, 2]))

    with pytest.raises(ValueError, match="Per-token timesteps are not supported"):
        interrupted()
    assert hooks(pipe) == 0
    assert not stats.inputs


def test_no_hook_stays_when_a_site_does_not_exist():
    pipe = pipeline()
    with pytest.raises(AttributeError), recording(pipe, [site("layer"), site("missing")], Stats(), num_prompts=1):
        pass
    assert hooks(pipe) == 0
