"""Densities by measured error: blocks go to the heads that need them, and a limit takes as few as it must."""

import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqtk.attention.choose import choose, passes, place_attention
from dqtk.attention.densities import Head, shared_out
from dqtk.calibrate.replay import Call
from dqtk.numerics.block_masks import guards
from dqtk.numerics.layout import Layout
from dqtk.sites import find_attention
from dqtk.spec import Adaptive, AttentionMass, AttentionSpec, Int, OutputError, Radial, Recall, StaticBlocks


class Attention(nn.Module):
    """Three heads: one looks everywhere alike, one at keys of its like, one mostly at a few keys that hold nothing."""

    def __init__(self):
        super().__init__()
        self.heads, self.processor, self.is_cross_attention = 3, object(), False

    def forward(self, x):
        draw = torch.Generator().manual_seed(1)
        to = torch.randn(3, 3, x.shape[2], 16, generator=draw) / x.shape[2] ** 0.5
        q, k, v = (x[:, None] @ each for each in to)
        q = q * torch.tensor([0.1, 3.0, 1.0]).view(1, 3, 1, 1)
        k = torch.stack([k[:, 0], q[:, 1], k[:, 2]], dim=1)
        k[:, 2, :20, 0], q[:, 2, :, 0], v[:, 2, :20] = 6.0, 3.0, 0.01
        return F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(patch_size=1)
        self.blocks = nn.ModuleList([Attention()])

    def forward(self, hidden_states, timestep):
        return self.blocks[0](hidden_states.flatten(2).transpose(1, 2))


@pytest.fixture
def calls():
    """Tokens are like their neighbours in the grid."""
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(2, 2, 64, 5, 5, generator=draw)
    pictures = [F.interpolate(x, (16, 16), mode="bilinear") for x in low]
    return [
        Call("model", (), {"hidden_states": x, "timestep": torch.tensor([t])}, t / 1000)
        for x, t in zip(pictures, (900.0, 200.0), strict=True)
    ]


def outcome(calls, groups=1, **mask):
    """The mask, its density, and relative errors of each head's outputs of the kept calls, relative to the layer's mean head."""
    model = Denoiser()
    spec = AttentionSpec(order=Recall(), mask=StaticBlocks(groups=groups, **mask), block=(16, 16))
    (found,) = choose(model, calls, dict.fromkeys(find_attention(model), spec))
    before = torch.stack([model(**call.kwargs) for call in calls])
    place_attention(model, found)
    after = torch.stack([model(**call.kwargs) for call in calls])
    squares = (after - before).unflatten(3, (3, 16)).square().sum((0, 1, 2, 4))
    errors = (squares / (before.square().sum() / 3)).sqrt()
    assert (found.keep | ~guards(Layout(*found.spec.layout), found.spec.block)).all()
    return found.keep, float(found.keep.float().mean()), errors


@pytest.mark.parametrize("density", [0.4, 0.3, 0.2])
def test_outputs_move_less_at_the_same_density(calls, density):
    _, most, by_mass = outcome(calls, density=density, by=AttentionMass())
    _, share, by_error = outcome(calls, density=density, by=OutputError())
    assert share <= most + 0.01
    assert by_error.norm() < 0.9 * by_mass.norm()


@pytest.mark.parametrize("limit", [0.02, 0.1, 0.3])
def test_a_limit_holds_and_takes_no_more_than_it_needs(calls, limit):
    keep, share, errors = outcome(calls, density=1.0, by=OutputError(limit=limit))
    assert (errors <= limit * 1.001).all()
    assert share < 1
    looser, less, _ = outcome(calls, density=1.0, by=OutputError(limit=2 * limit))
    assert less < share
    assert (looser.float().sum((0, 2, 3)) <= keep.float().sum((0, 2, 3))).all()


def test_the_density_is_the_most(calls):
    assert outcome(calls, density=0.4, by=OutputError(limit=1e-9))[1] <= 0.4 + 1e-6
    each = outcome(calls, density=0.4, together=False, by=OutputError())[0].float().mean((0, 2, 3))
    assert (each <= 0.4 + 1e-6).all()


def test_intervals_are_measured_apart(calls):
    keep, _, _ = outcome(calls, groups=2, density=0.5, by=OutputError())
    assert keep.shape[0] == 2
    assert not torch.equal(keep[0], keep[1])


def test_shared_out_is_the_best_there_is():
    """Of convex heads, against all combinations; the limit counts as nothing."""
    counts = [2, 4, 6, 10]
    heads = [Head(counts, [float(height * (10 - count) ** 2) for count in counts]) for height in (1.0, 3.0, 0.2)]

    def total(which, limit=0.0):
        return sum(max(head.errors[i], limit**2) for head, i in zip(heads, which, strict=True))

    for budget in (6, 10, 14, 18, 22, 30):
        fits = [w for w in itertools.product(range(4), repeat=3) if sum(counts[i] for i in w) <= budget]
        found = shared_out(heads, budget, 0.0)
        assert tuple(found) in fits
        assert total(found) <= 1.01 * min(total(w) for w in fits)
    assert shared_out(heads, 30, 0.0) == [3, 3, 3]
    assert shared_out(heads, 30, 4.0) == [2, 3, 0]
    assert shared_out(heads, 0, 0.0) == [0, 0, 0]


def test_errors_that_rise_with_a_density_are_passed_over():
    assert shared_out([Head([1, 2, 3, 4], [5.0, 9.0, 1.0, 0.0])], 3, 0.0) == [2]
    assert shared_out([Head([3, 3, 4], [5.0, 5.0, 0.0])], 4, 0.0) == [2]


def test_passes_over_the_calls():
    assert passes([AttentionSpec(mask=Radial(density=0.3))]) == 2
    both = AttentionSpec(mask=StaticBlocks(density=0.3, by=OutputError()), qk=Int(bits=8), adapt=Adaptive())
    assert passes([AttentionSpec(), both]) == 4


def test_limits_are_positive():
    with pytest.raises(ValueError, match=r"OutputError: limit must be positive or None, got 0. A twentieth is 0\.05"):
        OutputError(limit=0)
