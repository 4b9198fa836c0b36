"""Pictures of attention say what is computed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import dqtk
from dqtk.attention.facts import mask_of
from dqtk.calibrate.gather import calls_of
from dqtk.installed import summary
from dqtk.nn.attention import blocks_of
from dqtk.numerics.layout import Layout
from dqtk.report.attention import densities, map_picture, maps, mask_picture, masks_of
from dqtk.report.attention_section import attention_section
from dqtk.spec import Adaptive, AttentionSpec, Int, Radial, Recall, StaticBlocks

SPEC = AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.4, groups=2))
PATH = "transformer_blocks.0.attn1"


def test_maps_masks_and_densities_of_a_pipeline(load_tiny):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, dqtk.Recipe(name="none", rules=()), attention=SPEC)
    stats = dqtk.calibrate(pipe, ["a red circle"], plan, call_kwargs={"num_inference_steps": 2}, progress=False)
    call = calls_of(stats.calls, "transformer")[0]
    layout, attention = maps(pipe.transformer, call, PATH)
    assert layout == Layout(1, 16, 16)
    assert attention.shape == (6, 256, 256)
    torch.testing.assert_close(attention.sum(-1), torch.ones(6, 256))
    dqtk.quantize(pipe, plan, stats, progress=False)
    blocks = blocks_of(pipe.transformer)[PATH]
    keep = masks_of(blocks)
    assert keep.shape == (2, 6, 16, 16)
    assert densities(pipe.transformer)[PATH] == keep.float().mean((1, 2, 3)).tolist()
    picture = np.asarray(mask_picture(blocks, group=1, cell=2))
    assert picture.shape == (32, 6 * 36 - 4, 3)
    assert (picture[::2, :32:2, 0] == 52).sum() == int(keep[1, 0].sum())


def test_a_map_is_read_in_its_order():
    layout = Layout(1, 4, 4)
    along = layout.positions(0)[:, 2]
    attention = (along[:, None] == along[None]).float() / 4  # columns see themselves
    plain, turned = (np.asarray(map_picture(attention, layout, order, side=16)).mean(-1) for order in (0, 1))
    assert (turned[:4, :4] < 60).all()  # one dark block on the diagonal
    assert (turned[:4, 4:] > 200).all()
    assert not (plain[:4, :4] < 60).all()
    keep = torch.eye(4, dtype=torch.bool)
    tinted = np.asarray(map_picture(attention, layout, 1, keep, side=16))
    assert (tinted[0, 8] != tinted[0, 0]).any()
    assert tinted[0, 8, 0] > tinted[0, 8, 2] + 50  # reddish where nothing is computed


def test_what_has_no_static_blocks_is_not_drawn(load_tiny):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, dqtk.Recipe(name="none", rules=()), attention=AttentionSpec(mask=Radial(density=0.5)))
    dqtk.quantize(pipe, plan, progress=False)
    with pytest.raises(ValueError, match="masks_of: blocks must be static to be drawn, got none"):
        mask_picture(blocks_of(pipe.transformer)[PATH])
    assert densities(pipe.transformer) == {}


def test_a_page_shows_heads_levels_and_masks(load_tiny):
    pipe = load_tiny("pixart")
    plan = dqtk.plan(pipe, "w8a8", attention=replace(SPEC, qk=Int(bits=8), pv=Int(bits=8), adapt=Adaptive(error=0.01)))
    dqtk.quantize(pipe, plan, prompts=["a red circle"], call_kwargs={"num_inference_steps": 2}, progress=False)
    facts = summary(pipe)
    assert json.loads(json.dumps(facts)) == facts
    rows = facts["attention"]
    assert [("mask" in row) for row in rows] == [True, False, False, True, False, True]
    blocks = blocks_of(pipe.transformer)[PATH]
    assert torch.equal(mask_of(rows[0]["mask"]), masks_of(blocks)[0])
    assert torch.tensor(rows[0]["densities"]) == pytest.approx(masks_of(blocks).float().mean((2, 3)), abs=1e-4)
    assert sum(rows[0]["widths"].values()) == len(rows[0]["orders"]) == 6
    text = attention_section(facts)
    assert text.count('class="slot"') == 36
    assert text.count("data:image/png;base64,") == 3
    assert "6 attentions in blocks. Runs as: " in text
    assert "40.0 % of the blocks are computed" in text
    assert "<svg" in text
    assert "transformer_blocks.5.attn1</th>" in text


def test_a_page_without_blocks_has_no_section(load_tiny):
    assert (
        attention_section(None) == attention_section({"attention": [{"id": "a", "heads": 2, "spec": "16 bit", "why": "x"}]}) == ""
    )
    pipe = load_tiny("pixart")
    dqtk.quantize(pipe, dqtk.plan(pipe, "w8a8", attention=AttentionSpec(mask=Radial(density=0.5))), progress=False)
    text = attention_section(summary(pipe))
    assert "slot" not in text
    assert "0.50 of 64x64 blocks" in text
