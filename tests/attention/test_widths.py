"""Widths by measured error: heads that codes harm get more bits, the budget holds, and answers are those of each head's width."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dqtk
from dqtk.attention.choose import choose, place_attention
from dqtk.attention.widths import pairs_of
from dqtk.calibrate.replay import Call
from dqtk.installed import summary
from dqtk.kernels import block_attention
from dqtk.nn.attention import blocks_of
from dqtk.ops import EMULATED, report_of_attention
from dqtk.sites import find_attention
from dqtk.spec import (
    Adaptive,
    AttentionSpec,
    Float,
    Int,
    PerTile,
    Radial,
    Recall,
    SmoothBoth,
    SmoothKeys,
    StaticBlocks,
    describe_attention,
)

CODES = {"qk": Int(bits=8), "pv": Int(bits=8), "smooth": SmoothKeys()}


class Attention(nn.Module):
    """Four heads of which each has a larger outlier channel than the last: the harder to round."""

    def __init__(self):
        super().__init__()
        self.heads, self.processor, self.is_cross_attention = 4, object(), False

    def forward(self, x):
        draw = torch.Generator().manual_seed(1)
        to = torch.randn(3, 4, x.shape[2], 16, generator=draw) / x.shape[2] ** 0.5
        q, k, v = (x[:, None] @ each for each in to)
        far = torch.tensor([0.0, 20.0, 200.0, 4000.0]).view(1, 4, 1)
        k[..., 0] = k[..., 0] + far * x[:, None, :, 0].sign()
        q[..., 0] = q[..., 0] / (1 + far)
        return F.scaled_dot_product_attention(q, k, v, scale=0.7).transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(patch_size=1)
        self.blocks = nn.ModuleList([Attention()])

    def forward(self, hidden_states, timestep):
        return self.blocks[0](hidden_states.flatten(2).transpose(1, 2))


@pytest.fixture
def model():
    return Denoiser()


@pytest.fixture
def calls():
    draw = torch.Generator().manual_seed(0)
    return [
        Call("model", (), {"hidden_states": torch.randn(2, 64, 8, 8, generator=draw), "timestep": torch.tensor([t])}, t / 1000)
        for t in (900.0, 200.0)
    ]


def chosen(model, calls, spec):
    return choose(model, calls, dict.fromkeys(find_attention(model), spec))[0]


def error(model, call, heads=slice(None)):
    """Relative, of what the model answers with blocks in it against without."""
    found = model(**call.kwargs)
    exact = Denoiser()(**call.kwargs)
    found, exact = (y.unflatten(2, (4, 16))[:, :, heads] for y in (found, exact))
    return float((found - exact).norm() / exact.norm())


def test_pairs_come_cheapest_first_and_end_with_nothing_rounded():
    pairs = pairs_of(AttentionSpec(adapt=Adaptive(), **CODES))
    assert pairs[0] == (4, 4)
    assert pairs[-1] == (16, 16)
    assert set(pairs) == {(qk, pv) for qk in (4, 8, 16) for pv in (4, 8, 16)}
    assert pairs_of(AttentionSpec(adapt=Adaptive(), qk=Int(bits=4))) == [(4, 16), (16, 16)]


def test_heads_that_codes_harm_get_more_bits(model, calls):
    found = chosen(model, calls, AttentionSpec(adapt=Adaptive(error=0.05), **CODES)).spec
    bits = [qk + pv for qk, pv in zip(found.qk_bits, found.pv_bits, strict=True)]
    assert bits == sorted(bits)
    assert bits[0] < bits[-1]
    assert found.layout == (1, 8, 8, 0, 0)


@pytest.mark.parametrize("limit", [0.3, 0.05, 0.005])
def test_the_budget_holds_where_it_was_measured(model, calls, limit):
    spec = AttentionSpec(adapt=Adaptive(error=limit), order=Recall(), **CODES)
    place_attention(model, chosen(model, calls, spec))
    for head in range(4):
        squares = [error(model, call, slice(head, head + 1)) ** 2 for call in calls]
        assert sum(squares) / 2 <= (1.1 * limit) ** 2


def test_smaller_budgets_take_more_bits(model, calls):
    def bits(limit, **more):
        found = chosen(model, calls, AttentionSpec(adapt=Adaptive(error=limit, **more), **CODES)).spec
        return sum(found.qk_bits) + sum(found.pv_bits)

    widths = [bits(limit) for limit in (10.0, 0.1, 0.03, 1e-6)]
    assert widths == sorted(widths)
    assert widths[0] == 4 * 8
    assert widths[-1] == 4 * 32
    one = chosen(model, calls, AttentionSpec(adapt=Adaptive(error=0.05, per_head=False), **CODES)).spec
    assert len(set(zip(one.qk_bits, one.pv_bits, strict=True))) == 1


def test_every_head_is_answered_in_its_widths(model, calls):
    spec = AttentionSpec(adapt=Adaptive(error=0.05), order=Recall(), mask=StaticBlocks(density=0.6, groups=2), **CODES)
    found = chosen(model, calls, spec)
    place_attention(model, found)
    blocks = blocks_of(model)["blocks.0"]
    assert len(blocks.spec.widths()) > 1
    q, k, v = (torch.randn(2, 4, 64, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = torch.rand(2, 4, 64, 64, generator=torch.Generator().manual_seed(3)) > 0.2
    model(**calls[0].kwargs)  # which says what the sequences are
    y = blocks(q, k, v, mask, 0.3)
    order = torch.stack([blocks._layouts.layouts[64].index(each) for each in blocks.spec.orders])
    for head, bits in enumerate(zip(blocks.spec.qk_bits, blocks.spec.pv_bits, strict=True)):
        one = slice(head, head + 1)
        live = blocks.live[1][one]
        given = [t[:, one] for t in (q, k, v)]
        smooth = "none" if bits[0] == 16 else "k"
        expected = block_attention(*given, order[one], live, mask[:, one], *blocks.spec.block, 0.3, *bits, "row", smooth)
        assert torch.equal(y[:, one], expected)
    q.requires_grad_()
    blocks(q, k, v, mask, 0.3).sum().backward()
    assert q.grad is not None


def test_in_one_graph_and_saved(load_tiny, draw, tmp_path):
    pipe = load_tiny("pixart")
    spec = AttentionSpec(adapt=Adaptive(error=0.01), mask=StaticBlocks(density=0.5), **CODES | {"smooth": SmoothBoth()})
    plan = dqtk.plan(pipe, dqtk.Recipe(name="none", rules=()), attention=spec)
    assert "QK8 PV8 or less, 0.50 of 64x64 blocks" in plan.explain()
    prompts = ["a large red circle", "a small blue square on a green background"]
    dqtk.quantize(pipe, plan, prompts=prompts, call_kwargs={"num_inference_steps": 2}, progress=False)
    specs = [blocks.spec for blocks in blocks_of(pipe.transformer).values()]
    assert any(len(each.widths()) > 1 for each in specs)
    call = {"encoder_hidden_states": torch.randn(1, 5, 128), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    call |= {"hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([500.0])}
    with torch.no_grad():
        expected = pipe.transformer(**call)[0]
        compiled = torch.compile(pipe.transformer, fullgraph=True, dynamic=False, backend="eager")
        torch.testing.assert_close(compiled(**call)[0], expected, rtol=1e-3, atol=1e-4)
    drawn = draw(pipe)
    dqtk.save(pipe, tmp_path / "saved")
    again = dqtk.load(tmp_path / "saved")
    assert [blocks.spec for blocks in blocks_of(again.transformer).values()] == specs
    assert torch.equal(draw(again), drawn)


def test_said_in_words():
    mixed = AttentionSpec(adapt=Adaptive(), qk_bits=(4, 8, 16), pv_bits=(8, 8, 16), block=(64, 48), **CODES)
    assert describe_attention(mixed) == "QK4/8/16 PV8/16"
    assert mixed.widths() == {(4, 8): (0,), (8, 8): (1,), (16, 16): (2,)}
    assert AttentionSpec(qk_bits=(8, 8), pv_bits=(4, 4), **CODES).widths() == {(8, 4): ()}
    assert EMULATED in report_of_attention(mixed, "xpu")
    assert "gathered" in report_of_attention(mixed, "xpu")
    with pytest.raises(ValueError, match="qk or pv must be given with adapt, got neither"):
        AttentionSpec(adapt=Adaptive())
    with pytest.raises(ValueError, match=r"qk_bits and pv_bits must be 4, 8 or 16 for the same heads, got \(4,\) and \(\)"):
        AttentionSpec(qk_bits=(4,))
    with pytest.raises(ValueError, match=r"Adaptive: error must be positive, got 0. A twentieth is 0\.05"):
        Adaptive(error=0)


def test_reports_are_for_the_channels_that_a_head_has(monkeypatch):
    monkeypatch.setattr("dqtk.native.describe", lambda: (True, "native"))
    monkeypatch.setattr("dqtk.gpu.describe", lambda: (True, "Triton kernels"))
    integers, plain = AttentionSpec(**CODES, mask=Radial(density=0.5)), AttentionSpec(mask=Radial(density=0.5))
    for spec, device, most in ((integers, "cpu", 1024), (integers, "cuda", 256), (plain, "cuda", 256)):
        assert report_of_attention(spec, device, most).startswith("live blocks, ")
        said = report_of_attention(spec, device, most + 1)
        assert said.startswith((EMULATED, "live blocks gathered"))
        assert f"take no blocks of 64 by 64 and {most + 1} channels" in said


def test_plans_and_facts_know_the_channels(load_tiny, monkeypatch):
    pipe = load_tiny("pixart")
    (site, *_) = find_attention(pipe.transformer)
    assert (site.heads, site.channels) == (6, 32)
    seen = []
    monkeypatch.setattr("dqtk.explain.report_of_attention", lambda spec, device, channels: seen.append(channels) or "x")
    monkeypatch.setattr("dqtk.attention.facts.report_of_attention", lambda spec, device, channels: seen.append(channels) or "x")
    plan = dqtk.plan(pipe, "dense")
    plan.explain()
    dqtk.quantize(pipe, plan, progress=False)
    assert len(summary(pipe)["attention"]) == 6
    assert set(seen) == {32}


def test_probabilities_and_values_in_fp8(model, calls):
    spec = AttentionSpec(qk=Int(bits=8), pv=Float(), smooth=SmoothKeys())
    assert describe_attention(spec) == "QK8 PV in FP8"
    assert EMULATED in report_of_attention(spec, "cpu")
    place_attention(model, chosen(model, calls, AttentionSpec(pv=Float())))
    assert 1e-4 < error(model, calls[0]) < 0.05
    for wrong in ({"pv": Float(exponent=5, mantissa=2)}, {"pv": Float(), "scale": PerTile()}, {"pv": Float(), "adapt": Adaptive()}):
        with pytest.raises(ValueError, match="AttentionSpec: pv must be E4M3 with a scale per row of a block and without adapt"):
            AttentionSpec(**wrong)
