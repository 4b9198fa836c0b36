"""Untrained embedded pipelines, one of each per session: what every test of this folder may read but not change."""

import pytest
import torch
from dqtk.pipelines.tiny.build import new_pixart, new_sdxl
from dqtk.pipelines.tiny.build_wan import new_wan
from dqtk.pipelines.tiny.train_vae import new_vae
from dqtk.pipelines.tiny.train_wan_vae import new_wan_vae


def _ready(new, seed: int, vae=new_vae):
    torch.manual_seed(seed)
    pipe = new(vae())
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipe


@pytest.fixture(scope="session")
def sdxl():
    return _ready(new_sdxl, 0)


@pytest.fixture(scope="session")
def pixart():
    return _ready(new_pixart, 1)


@pytest.fixture(scope="session")
def wan():
    return _ready(new_wan, 2, new_wan_vae)


@pytest.fixture(params=["sdxl", "pixart"])
def pipe(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def paint():
    """Function (pipe, prompts, output_type="latent") -> tensor or array of two denoising steps from a fixed seed."""

    def call(pipe, prompts, output_type="latent"):
        options = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 20}
        options = options if hasattr(pipe, "transformer") else {}
        generator = torch.Generator().manual_seed(5)
        return pipe(prompt=prompts, num_inference_steps=2, output_type=output_type, generator=generator, **options).images

    return call
