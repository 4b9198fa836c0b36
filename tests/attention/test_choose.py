"""Orders and masks from kept calls: heads that are local along an axis get the order that says so, budgets are kept."""

import dataclasses
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqtk.attention import masks
from dqtk.attention.choose import choose
from dqtk.attention.watch import watching
from dqtk.calibrate.replay import Call
from dqtk.numerics.layout import ORDERS, Layout
from dqtk.sites import AttentionSite, find_attention
from dqtk.spec import AttentionSpec, Incoherence, Radial, Recall, StaticBlocks, WeightedSum, describe_attention

GRID = Layout(4, 4, 4)
AXES = (0, 1, 2)  # head i sees tokens with the same place along all axes but AXES[i]


class LocalAttention(nn.Module):
    """Three heads that attend along frames, rows and columns, whatever their input; like diffusers' attention from outside."""

    def __init__(self):
        super().__init__()
        self.heads, self.processor, self.is_cross_attention = 3, object(), False

    def forward(self, x):
        where = F.one_hot(GRID.positions(0), 4).float()  # [64, 3, 4]
        same = torch.stack([torch.cat([where[:, other] for other in range(3) if other != axis], dim=1) for axis in AXES])
        q = 6 * same[None].repeat(x.shape[0], 1, 1, 1) + 0.01 * x[..., :8][:, None]
        v = x[:, None].repeat(1, 3, 1, 1)
        return F.scaled_dot_product_attention(q, q, v, None, 0.0, False, scale=1.0).mean(1)


class Denoiser(nn.Module):
    """Latents [B, C, F, H, W] as tokens through two attentions."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(patch_size=1)
        self.blocks = nn.ModuleList([LocalAttention() for _ in range(2)])

    def forward(self, hidden_states, timestep):
        x = hidden_states.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def model():
    return Denoiser()


@pytest.fixture
def calls():
    draw = torch.Generator().manual_seed(0)
    latents = [torch.randn(2, 8, 4, 4, 4, generator=draw) for _ in range(4)]
    times = (900.0, 600.0, 300.0, 100.0)
    return [
        Call("model", (), {"hidden_states": x, "timestep": torch.tensor([t])}, t / 1000)
        for x, t in zip(latents, times, strict=True)
    ]


def chosen(model, calls, spec):
    return choose(model, calls, dict.fromkeys(find_attention(model), spec))


def test_attentions_are_found_by_structure(model):
    model.blocks[1].is_cross_attention = True
    assert find_attention(model, "transformer") == [AttentionSite(id="transformer:blocks.0", heads=3)]


@pytest.mark.filterwarnings("ignore:quantize. 0.250 of the 16x16 blocks")
@pytest.mark.parametrize("selector", [Recall(), Incoherence()])
def test_heads_get_the_axis_they_see(model, calls, selector):
    spec = AttentionSpec(order=selector, mask=StaticBlocks(density=0.1, together=False, groups=1), block=(16, 16))
    for found in chosen(model, calls, spec):
        assert [ORDERS[order][0] == axis for axis, order in zip(AXES, found.spec.orders, strict=True)] == [False] * 3
        assert found.spec.layout == (4, 4, 4, 0, 0)


def test_the_published_formula_prefers_what_it_should_not(model, calls):
    """Where attention is spread evenly no block is called sparse, and the least sparsity wins: the head that sees its frames keeps
    them apart."""
    spec = AttentionSpec(order=WeightedSum(alpha=1.0, small=1e-4, share=0.95), block=(16, 16))
    assert ORDERS[chosen(model, calls, spec)[0].spec.orders[0]][0] == 0


def test_one_order_for_a_layer(model, calls):
    spec = AttentionSpec(order=Recall(), one_order=True, block=(16, 16))
    for found in chosen(model, calls, spec):
        assert len(set(found.spec.orders)) == 1


def test_masks_hold_the_attention_and_the_budget(model, calls):
    spec = AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.3, groups=2), block=(16, 16))
    found = chosen(model, calls, spec)
    assert found[0].spec.mask.edges == (450.0,)
    assert all(each.keep.shape == (2, 3, 4, 4) for each in found)
    share = sum(float(each.keep.float().mean()) for each in found) / 2
    assert abs(share - 0.3) < 0.02
    for each in found:
        assert each.keep.diagonal(dim1=-2, dim2=-1).all()  # in the order of its axis a head sees its own block only


def test_guards_that_are_more_than_the_density_are_said(model, calls):
    spec = AttentionSpec(mask=StaticBlocks(density=0.1, groups=1), block=(16, 16))
    with pytest.warns(
        UserWarning, match=r"of the 16x16 blocks of 2 attentions are computed, though 0\.1 were asked for: the diagonal"
    ):
        found = chosen(model, calls, spec)
    for each in found:
        computed = float(each.keep.float().mean())
        assert computed >= 0.25  # the diagonal alone
        assert each.spec.mask.computed == pytest.approx(computed, abs=1e-6)
        assert describe_attention(each.spec) == f"16 bit, {computed:.3f} of 16x16 blocks"


def test_attention_of_calls_is_averaged_in_half_the_bytes(model, calls):
    spec = AttentionSpec(mask=StaticBlocks(density=0.3, groups=1), block=(16, 16), layout=GRID.numbers)
    many = calls * 8
    found = masks._masses(model, many, {"blocks.0": spec}, lambda: None)["blocks.0"]
    assert found.dtype == torch.float16
    each = [masks._masses(model, [call], {"blocks.0": spec}, lambda: None)["blocks.0"].double() for call in calls]
    torch.testing.assert_close(found.double(), torch.stack(each).mean(0), rtol=3e-3, atol=1e-5)
    assert torch.allclose(found.double().mean(-1), torch.ones(1, dtype=torch.float64), atol=1e-2)


def test_each_head_keeps_its_own_share(model, calls):
    spec = AttentionSpec(mask=StaticBlocks(density=0.5, groups=1, together=False), block=(16, 16))
    for each in chosen(model, calls, spec):
        assert torch.equal(each.keep.float().mean((2, 3)), torch.full((1, 3), 0.5))


def test_fewer_times_than_groups_make_fewer_intervals(model, calls):
    spec = AttentionSpec(mask=StaticBlocks(density=0.5, groups=9), block=(16, 16))
    assert chosen(model, calls, spec)[0].spec.mask.edges == (200.0, 450.0, 750.0)


def test_what_learns_nothing_needs_no_calls(model):
    spec = AttentionSpec(mask=Radial(density=0.5))
    assert [each.spec for each in chosen(model, [], spec)] == [spec, spec]


def test_an_attention_that_is_computed_elsewhere_is_an_error(model, calls, monkeypatch):
    monkeypatch.setattr(model.blocks[1], "forward", lambda x: x)
    with pytest.raises(
        ValueError, match=r"attention: blocks\.1 must compute scaled_dot_product_attention in torch in some kept call"
    ):
        chosen(model, calls, AttentionSpec(order=Recall()))


def test_another_number_of_tokens_is_an_error(model, calls):
    longer = [dataclasses.replace(call, kwargs=call.kwargs | {"hidden_states": torch.randn(1, 8, 4, 4, 5)}) for call in calls]
    model.config.patch_size = (1, 1, 5)  # as if the rule were wrong
    with pytest.raises(RuntimeError, match="size"):
        chosen(model, longer, AttentionSpec(order=Recall()))
    model.config.patch_size = (2, 1, 1)
    with pytest.raises(ValueError, match=r"attention: blocks\.0 must be of a sequence of \[32\] tokens to itself, got 64 queries"):
        chosen(model, calls, AttentionSpec(order=Recall()))


def test_watching_changes_nothing_and_leaves_nothing(model, calls):
    arguments = calls[0].kwargs
    before, seen = model(**arguments), []
    with watching(model, ["blocks.1"], lambda path, given: seen.append((path, given.q.shape, given.scale))):
        assert torch.equal(model(**arguments), before)
    assert seen == [("blocks.1", (2, 3, 64, 8), 1.0)]
    assert not model.blocks[1]._forward_hooks
    assert not model.blocks[1]._forward_pre_hooks
