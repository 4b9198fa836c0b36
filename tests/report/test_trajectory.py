"""Recording and pairing of denoiser calls, on modules small enough to check by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dqtk.report.trajectory import Call, TrajectoryMismatch, denoisers, first_tensor, own_trajectory, recorded, same_inputs


class Scale(nn.Module):
    """A denoiser: sample times a weight, plus the timestep's and the text's sum."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight)))

    def forward(self, sample, timestep, text=None):
        shift = 0.0 if text is None else text["embeds"].sum()
        return (sample * self.weight + timestep.float().mean() + shift,)


def pipe_of(**modules):
    return SimpleNamespace(components={**modules, "scheduler": object(), "safety_checker": None})


def test_finds_denoisers_by_name():
    part = Scale(1)
    found = denoisers(pipe_of(unet=part, transformer=part, transformer_2=part, text_encoder=part, vae=part, unet_extra=part))
    assert sorted(found) == ["transformer", "transformer_2", "unet"]
    assert denoisers(pipe_of(transformer=None)) == {}


def test_records_inputs_as_they_were_and_shares_what_did_not_change():
    module = Scale(2)
    sample, text = torch.ones(2, 3), {"embeds": torch.ones(4)}
    with recorded(pipe_of(unet=module), inputs=True) as calls, torch.no_grad():
        for t in (9, 5):
            module(sample, torch.tensor(t), text=text)
            sample += 1  # a sampler that works in place
    assert [call.timestep for call in calls] == [9.0, 5.0]
    assert [float(call.args[0][0, 0]) for call in calls] == [1.0, 2.0]
    assert calls[0].kwargs["text"]["embeds"] is calls[1].kwargs["text"]["embeds"]
    assert calls[0].kwargs["text"]["embeds"] is not text["embeds"]
    assert float(calls[0].output[0, 0]) == 2 + 9 + 4
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_inputs_are_not_kept_unless_asked_for():
    module = Scale(2)
    with recorded(pipe_of(unet=module), inputs=False) as calls:
        module(torch.ones(1, 1), timestep=torch.tensor([7, 7]))
    assert (calls[0].args, calls[0].kwargs, calls[0].timestep) == ((), {}, 7.0)


def test_inference_mode_tensors_are_recorded():
    module = Scale(2)
    with torch.inference_mode(), recorded(pipe_of(unet=module), inputs=True) as calls:
        sample = torch.ones(1, 1)
        module(sample, torch.tensor(3))
        sample += 1
        module(sample, torch.tensor(2))
    assert [float(call.args[0]) for call in calls] == [1.0, 2.0]


def test_same_inputs_is_the_error_of_the_weights_alone():
    torch.manual_seed(0)
    reference, candidate = Scale(1.0), Scale(1.1)
    with recorded(pipe_of(unet=reference), inputs=True) as calls, torch.no_grad():
        for t in (0, 0.0):
            reference(torch.randn(4, 50), torch.tensor(t))
    found = same_inputs(pipe_of(unet=candidate), calls, num_images=2)
    assert len(found.sums) == 1  # one timestep, two calls: one step
    assert found.sums[0].sqnr_db().tolist() == pytest.approx([20.0, 20.0], abs=1e-4)


@pytest.mark.parametrize("timestep", [torch.full((2,), 999.0), torch.full((2, 1), 999.0)])
def test_replay_casts_to_the_candidates_dtype_but_never_the_timestep(timestep):
    """999 is 1000 in bf16. Per-token timesteps have two axes, so the number of axes alone does not tell them."""
    seen = []

    class Watching(Scale):
        def forward(self, sample, timestep, text=None):
            seen.append((sample.dtype, timestep.dtype))
            return super().forward(sample, timestep, text)

    reference = Scale(1)
    with recorded(pipe_of(unet=reference), inputs=True) as calls, torch.no_grad():
        reference(torch.ones(2, 3), timestep=timestep)
    same_inputs(pipe_of(unet=Watching(1).bfloat16()), calls, num_images=2)
    assert seen == [(torch.bfloat16, torch.float32)]


def test_two_calls_of_one_timestep_are_one_step_and_nameless_ones_are_not():
    y = torch.ones(1, 4)

    def call(timestep):
        return Call(component="unet", timestep=timestep, args=(), kwargs={}, output=y)

    calls = [call(t) for t in (9.0, 9.0, 5.0, None, None)]
    found = own_trajectory(calls, calls, num_images=1)
    assert found.timesteps == (9.0, 5.0, None, None)
    assert all(float(sums.sqnr_db()) == math.inf for sums in found.sums)


def test_what_cannot_be_paired_says_why():
    def call(component, rows):
        return Call(
            component=component, timestep=1.0, args=(torch.ones(rows, 2), torch.tensor(1)), kwargs={}, output=torch.ones(rows, 2)
        )

    with pytest.raises(TrajectoryMismatch, match=r"the reference made 1 denoiser calls and the candidate 2"):
        own_trajectory([call("unet", 2)], [call("unet", 2)] * 2, 1)
    with pytest.raises(TrajectoryMismatch, match=r"the candidate has no component 'transformer_2'"):
        same_inputs(pipe_of(unet=Scale(1)), [call("transformer_2", 2)], 1)
    with pytest.raises(TrajectoryMismatch, match=r"3 denoiser rows are not a multiple of the 2 images in the batch"):
        own_trajectory([call("unet", 3)], [call("unet", 3)], 2)


def test_prediction_in_every_kind_of_output():
    x = torch.ones(1)
    assert first_tensor(x) is x
    assert first_tensor((x, None)) is x
    assert first_tensor([x]) is x
    assert first_tensor(SimpleNamespace(sample=x)) is x
