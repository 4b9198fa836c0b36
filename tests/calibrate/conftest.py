"""A small untrained pipeline that really runs, and a plan of static inputs for its transformer."""

import pytest
import torch
from dqtk.pipelines.tiny.build import new_pixart
from dqtk.pipelines.tiny.train_vae import new_vae

import dqtk
from dqtk.resolve import call_kwargs_for


@pytest.fixture(scope="session")
def pixart():
    """tiny-pixart as built; tests must leave it as it is."""
    torch.manual_seed(0)
    pipe = new_pixart(new_vae())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def call_kwargs(pixart):
    """Three steps with guidance."""
    return call_kwargs_for(pixart) | {"num_inference_steps": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="session")
def plan(pixart):
    return dqtk.plan(pixart, "w8a8-static", text_encoders="w8a8-static")
