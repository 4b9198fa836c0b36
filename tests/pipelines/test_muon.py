"""Muon: orthogonal updates of matrices and convolutions, AdamW for the rest."""

import copy

import pytest
import torch
from dqtk.pipelines.tiny.muon import Muon, orthogonalize
from torch import nn


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (1, 8), (8, 1)])
def test_singular_values_become_about_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.25


def test_scale_does_not_matter_and_directions_stay():
    matrix = torch.randn(24, 12, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(matrix)
    torch.testing.assert_close(orthogonalize(1000 * matrix), result, rtol=1e-4, atol=1e-4)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ result @ v.T  # diagonal: the singular vectors are kept
    torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-3)
    assert (core.diagonal() > 0).all()


def test_zero_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(4, 3)), torch.zeros(4, 3))


def test_loss_falls_on_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 5, generator=generator)
    torch.manual_seed(0)
    layer = nn.Linear(8, 5)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(64, 1)], 1), y)
    floor = (torch.cat([x, torch.ones(64, 1)], 1) @ best.solution - y).square().mean().item()
    optimizer, losses = Muon([layer], lr=0.02), []
    for _ in range(150):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert losses[-1] < floor * 1.05


def test_convolutions_norms_and_embeddings_are_accepted():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "conv": nn.Conv2d(4, 6, 3, padding=1), "norm": nn.GroupNorm(2, 6)})
    optimizer = Muon([model], lr=0.01)
    matrices = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert matrices == {id(model["conv"].weight)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(4).view(1, 2, 2)
    out = model["norm"](model["conv"](model["embed"](tokens).permute(0, 3, 1, 2)))
    (out * torch.arange(24.0).view_as(out)).sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {"embed.weight", "conv.weight", "norm.weight", "norm.bias"} <= changed
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_what_has_no_gradient_is_left_alone():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    Muon([layer], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(layer.weight, before)


def test_weight_decay_shrinks():
    layer = nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    Muon([layer], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(layer.weight.detach(), before * 0.95)


def test_state_is_restored():
    def train(layer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = Muon([layer], lr=0.1)
    train(layer, optimizer, 3)
    other = nn.Linear(3, 2)
    other.load_state_dict(layer.state_dict())
    resumed = Muon([other], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(layer, optimizer, 2)
    train(other, resumed, 2)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
