"""A two-layer-deep denoiser with calls kept: enough to measure in a second."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.allocate.groups import groups_of
from dqtk.calibrate import Stats
from dqtk.calibrate.replay import Call
from dqtk.recipes import of_width


class Denoiser(nn.Module):
    """x + f(x): ``first`` feeds ``last`` through a nonlinearity, ``faint`` adds a thousandth."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.faint = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)

    def forward(self, hidden_states, timestep):
        return (hidden_states + self.last(nn.functional.gelu(self.first(hidden_states))) + 1e-3 * self.faint(hidden_states),)


@pytest.fixture
def measured():
    """SimpleNamespace: pipe (one transformer), plans of 2, 4 and 8 bits, stats with three calls, groups."""
    torch.manual_seed(0)
    transformer = Denoiser().requires_grad_(False)
    pipe = SimpleNamespace(components={"transformer": transformer})
    calls = [
        Call("transformer", (), {"hidden_states": torch.randn(2, 6, 64), "timestep": torch.full((2,), float(t))}, t / 3)
        for t in (1, 2, 3)
    ]
    plans = [dqtk.plan(pipe, of_width(bits)) for bits in (2, 4, 8)]
    return SimpleNamespace(
        pipe=pipe,
        plans=plans,
        stats=Stats(num_prompts=2, run={"seed": "0"}, calls=calls),
        groups=groups_of([choice.site for choice in plans[0].choices], {"content": ["faint"]}),
    )
