"""The noise level of a call, read through the scheduler's own tables."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dqtk import resolve
from dqtk.calibrate.levels import bucket_of, noise_level

VARIANCE_PRESERVING = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]


def levels(scheduler, num_steps, scale=1.0):
    scheduler.set_timesteps(num_steps)
    return [noise_level(scheduler, t * scale) for t in scheduler.timesteps]


@pytest.mark.parametrize("kind", VARIANCE_PRESERVING)
@pytest.mark.parametrize("num_steps", [3, 20, 50])
def test_variance_preserving(kind, num_steps):
    scheduler = kind()
    found = levels(scheduler, num_steps)
    assert all(0 <= level <= 1 for level in found)
    assert found == sorted(found, reverse=True)
    expected = [float((1 - scheduler.alphas_cumprod[int(t)]).sqrt()) for t in scheduler.timesteps.round()]
    assert found == pytest.approx(expected, abs=2e-3)


def test_fractional_timesteps_lie_between_their_neighbours():
    scheduler = EulerDiscreteScheduler()
    low, between, high = (noise_level(scheduler, torch.tensor(t)) for t in (500.0, 500.25, 501.0))
    assert low < between < high
    assert between - low < high - between


def test_timesteps_beyond_the_table_are_its_ends():
    scheduler = DDIMScheduler()
    assert noise_level(scheduler, torch.tensor(-5)) == noise_level(scheduler, torch.tensor(0))
    assert noise_level(scheduler, torch.tensor(5000)) == noise_level(scheduler, torch.tensor(999))


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_flow_matching_by_schedulers_that_know_alphas_too(kind):
    """Wan's and Sana's: they hold a table of alphas that this mode does not use."""
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    found = levels(scheduler, 8)
    assert found == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=2e-3)
    assert found[-1] < 0.5


def test_continuous_timesteps():
    """Stable Video Diffusion's: the timestep is a logarithm of sigma."""
    scheduler = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0
    )
    found = levels(scheduler, 10)
    assert found == pytest.approx([float(s / (1 + s)) for s in scheduler.sigmas[:-1]], abs=1e-6)
    assert found[0] > 0.99
    assert found[-1] < 0.01


def test_reversed_time():
    """Z-Image, Lumina 1 and 2 give their denoisers 1 - sigma."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    for sigma in scheduler.sigmas[:-1]:
        assert noise_level(scheduler, 1 - sigma, reversed_time=True) == pytest.approx(float(sigma), abs=1e-6)
    assert resolve.adapters()["ZImageTransformer2DModel"].reversed_time
    assert resolve.adapters()["Lumina2Transformer2DModel"].reversed_time
    assert resolve.adapters()["LuminaNextDiT2DModel"].reversed_time


def test_a_scheduler_that_counts_from_noise_at_zero():
    """OmniGen's: its timesteps are 1 - sigma, and are what the denoiser is given."""
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    reversed_time = resolve.adapters()["OmniGenTransformer2DModel"].reversed_time
    found = [noise_level(scheduler, t, reversed_time=reversed_time) for t in scheduler.timesteps]
    assert found == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 28, 1000])
@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["timestep", "sigma"])
def test_flow_matching(shift, num_steps, scale):
    """sigma itself, whether the denoiser is called with timesteps (SD3) or with sigmas (Flux); also at 1000 steps."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    found, expected = levels(scheduler, num_steps, scale), scheduler.sigmas[:-1].tolist()
    if shift == 1.0 and scale == 1.0 and num_steps > 1:
        assert found.pop() == 1.0  # timestep 1 of 1000, which is taken for sigma 1: both are in the table
        expected.pop()
    assert found == pytest.approx(expected, abs=1e-6)
    assert found == sorted(found, reverse=True)


def test_flow_matching_survives_rounding_to_bfloat16():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    for scale in (1.0, 1e-3):
        found = [noise_level(scheduler, (t * scale).bfloat16()) for t in scheduler.timesteps]
        assert found == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=4e-3)


def test_edm():
    """The timestep is a function of sigma; the level is sigma / (1 + sigma)."""
    scheduler = EDMEulerScheduler()
    found = levels(scheduler, 10)
    sigmas = scheduler.sigmas[:-1]
    assert found == pytest.approx((sigmas / (1 + sigmas)).tolist())
    assert found == sorted(found, reverse=True)


def test_level_does_not_depend_on_the_number_of_steps():
    scheduler = DDIMScheduler()
    found = []
    for num_steps in (10, 50):
        scheduler.set_timesteps(num_steps)
        found.append(noise_level(scheduler, torch.tensor(500)))
    assert found[0] == found[1]


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)], ids=str)
def test_equal_timesteps_of_any_shape(shape):
    scheduler = DDIMScheduler()
    assert noise_level(scheduler, torch.full(shape, 321)) == noise_level(scheduler, torch.tensor(321))


@pytest.mark.parametrize("timestep", [torch.tensor([1.0, 2.0]), torch.tensor([[5, 5], [5, 6]])], ids=["samples", "tokens"])
def test_unequal_timesteps_are_refused(timestep):
    with pytest.raises(ValueError, match=r"noise_level: timesteps must be equal within a call, got \[.*Per-token timesteps"):
        noise_level(DDIMScheduler(), timestep)


def test_buckets():
    """Equal intervals of the angle: sin(i * 9 degrees) lies at the lower end of bucket i."""
    assert [bucket_of(math.sin(math.radians(9 * i + 0.1)), 10) for i in range(10)] == list(range(10))
    assert [bucket_of(level, 10) for level in (-0.1, 0.0, 0.15, 0.5, 0.999, 1.0, 1.1)] == [0, 0, 0, 3, 9, 9, 9]
    assert bucket_of(1.0, 1) == 0
