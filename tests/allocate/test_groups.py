"""Content and quality, text, temporal and spatial: published models by role, globs over roles, and one program or several."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest

from dqtk.allocate.groups import allocate_groups, groups_of, groups_of_names, others_of, ratios_of, say_ratios
from dqtk.allocate.program import Candidate
from dqtk.resolve import adapters
from dqtk.sites import find_sites, meta

CONFIGS = Path(__file__).parents[1] / "data" / "model_configs"


def published(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    module = meta(getattr(diffusers, config["_class_name"]).from_config, config)
    return find_sites(module, "unet", adapters().get(type(module).__name__))


@pytest.fixture(scope="module")
def sdxl():
    return published("sdxl-base-1.0")


def test_sdxl_has_the_groups_of_the_paper(sdxl):
    """420 content and 374 quality layers, 69 % of the weights in content; roles say what MixDQ says by names."""
    groups = groups_of(sdxl)
    assert Counter(groups.values()) == {"content": 420, "quality": 374}
    by_name = {site.id: "content" if "ff" in site.path or "attn2" in site.path else "quality" for site in sdxl}
    assert groups == by_name
    content = sum(site.num_weights for site in sdxl if groups[site.id] == "content")
    assert content / sum(site.num_weights for site in sdxl) == pytest.approx(0.692, abs=5e-4)


def test_globs_come_before_roles(sdxl):
    assert Counter(groups_of(sdxl, {"content": ["unet:*attn1*"]}).values())["content"] == 420 + 4 * 70
    assert Counter(groups_of(sdxl, {"quality": ["*.ff.*"]}).values())["content"] == 420 - 2 * 70
    assert groups_of(sdxl, {"quality": ["*"], "content": ["conv_in"]})["unet:conv_in"] == "content"  # groups in their own order
    assert groups_of_names(["a.ff.net", "a.attn1"], {"content": ["*.ff.*"]}) == {"a.ff.net": "content", "a.attn1": "quality"}
    assert set(groups_of_names(["a.ff.net", "a.attn1"], {"temporal": ["*.attn1"]}).values()) == {"spatial", "temporal"}


def test_a_glob_that_matches_nothing(sdxl):
    with pytest.raises(ValueError, match=r"pattern must match one of 794 layers, got '\*\.mlp\.\*'. They are named like 'unet:"):
        groups_of(sdxl, {"content": ["*.ff.*"], "quality": ["*.mlp.*"]})
    with pytest.raises(
        ValueError, match=r"group of pictures must be one of content, quality, got 'contnt'\. Did you mean 'content'"
    ):
        groups_of(sdxl, {"contnt": ["*"]})
    with pytest.raises(ValueError, match="group of clips must be one of text, temporal, spatial, got 'content'"):
        groups_of(sdxl, {"content": ["*"]}, clips=True)


def test_self_attention_sees_frames_where_nothing_else_does():
    """Wan: 30 blocks of self-attention, cross-attention and a feed-forward, six layers around them."""
    sites = published("wan2.1-t2v-1.3b")
    groups = groups_of(sites, clips=True)
    assert Counter(groups.values()) == {"text": 4 * 30 + 2, "temporal": 4 * 30, "spatial": 2 * 30 + 5}
    named = {site.path: groups[site.id] for site in sites}
    assert [named[f"blocks.3.{path}"] for path in ("attn1.to_q", "attn2.to_k", "ffn.net.2")] == ["temporal", "text", "spatial"]
    moved = groups_of(sites, {"spatial": ["*attn1*"], "temporal": ["*.ffn.*"]}, clips=True)
    assert Counter(moved.values()) == {"text": 4 * 30 + 2, "temporal": 2 * 30, "spatial": 4 * 30 + 5}


def test_streams_of_the_text_are_text():
    sites = published("hunyuanvideo")
    groups = groups_of(sites, clips=True)
    named = {site.path: groups[site.id] for site in sites}
    own = ["transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.ff_context.net.2", "context_embedder.proj_in"]
    assert {named[path] for path in own} == {"text"}
    assert named["transformer_blocks.0.attn.to_q"] == named["single_transformer_blocks.0.attn.to_q"] == "temporal"
    assert named["transformer_blocks.0.ff.net.2"] == "spatial"


def test_attention_over_frames_may_be_a_module_of_its_own(sdxl):
    """As in AnimateDiff and Latte: then self-attention within a frame is none of its business."""
    sites = [site for site in sdxl if "attn1" in site.path]
    apart = [*sites, *(replace(site, id=site.id.replace("attentions", "motion_modules")) for site in sites)]
    groups = groups_of(apart, clips=True)
    assert {group for site, group in groups.items() if "motion_modules" in site} == {"temporal"}
    assert Counter(groups.values()) == {"temporal": len(sites), "spatial": len(sites)}


def test_ratios():
    three = {"a": "spatial", "b": "text", "c": "temporal"}
    assert others_of(three) == ["text", "temporal"]
    assert ratios_of(0.5, three) == {"text": 0.5, "temporal": 0.5}
    assert ratios_of({"temporal": 2, "text": 1}, three) == {"temporal": 2, "text": 1}
    assert ratios_of(None, three) is None
    assert say_ratios({"text": 0.5, "temporal": 2}) == "text 0.5, temporal 2"
    with pytest.raises(ValueError, match="ratio must have a number for each of text, temporal, got it for text"):
        ratios_of({"text": 1}, three)


CANDIDATES = {
    "ff": [Candidate(cost=2, loss=9), Candidate(cost=4, loss=1)],
    "attn": [Candidate(cost=2, loss=5), Candidate(cost=4, loss=4)],
}
GROUPS = {"ff": "content", "attn": "quality"}
FULL = {"ff": 16.0, "attn": 16.0}


def test_one_program_moves_bits_between_groups_and_two_do_not():
    (one,) = allocate_groups(CANDIDATES, 6, GROUPS, None, FULL).values()
    assert one.allocation.chosen == {"ff": 1, "attn": 0}
    assert one.allocation.loss == 6
    two = allocate_groups(CANDIDATES, 6, GROUPS, {"content": 0.5}, FULL)
    assert {group: found.budget for group, found in two.items()} == pytest.approx({"content": 2.0, "quality": 4.0})
    assert {group: found.allocation.chosen for group, found in two.items()} == {"content": {"ff": 0}, "quality": {"attn": 1}}
    with pytest.raises(ValueError, match=r"^allocate: of group content with ratio 0\.25, budget must be at least 2,"):
        allocate_groups(CANDIDATES, 6, GROUPS, {"content": 0.25}, FULL)
