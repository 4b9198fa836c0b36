"""Content and quality: the published SDXL by role, globs over roles, and one program or two."""

import json
from collections import Counter
from pathlib import Path

import diffusers
import pytest

from dqtk.allocate.groups import allocate_groups, check_globs, group_of, group_of_name
from dqtk.allocate.program import Candidate
from dqtk.resolve import adapters
from dqtk.sites import find_sites, meta

CONFIGS = Path(__file__).parents[1] / "data" / "model_configs"


@pytest.fixture(scope="module")
def sdxl():
    config = json.loads((CONFIGS / "sdxl-base-1.0.json").read_text())
    module = meta(diffusers.UNet2DConditionModel.from_config, config)
    return find_sites(module, "unet", adapters().get(type(module).__name__))


def test_sdxl_has_the_groups_of_the_paper(sdxl):
    """420 content and 374 quality layers, 69 % of the weights in content; roles say what MixDQ says by names."""
    groups = {site.path: group_of(site) for site in sdxl}
    assert Counter(groups.values()) == {"content": 420, "quality": 374}
    by_name = {site.path: "content" if "ff" in site.path or "attn2" in site.path else "quality" for site in sdxl}
    assert groups == by_name
    content = sum(site.num_weights for site in sdxl if groups[site.path] == "content")
    assert content / sum(site.num_weights for site in sdxl) == pytest.approx(0.692, abs=5e-4)


def test_globs_come_before_roles(sdxl):
    assert Counter(group_of(site, content=["unet:*attn1*"]) for site in sdxl)["content"] == 420 + 4 * 70
    assert Counter(group_of(site, quality=["*.ff.*"]) for site in sdxl)["content"] == 420 - 2 * 70
    assert {group_of(site, content=["conv_in"], quality=["*"]) for site in sdxl if site.path == "conv_in"} == {"content"}
    assert [group_of_name(name, ["*.ff.*"]) for name in ("a.ff.net", "a.attn1")] == ["content", "quality"]


def test_a_glob_that_matches_nothing(sdxl):
    check_globs(["*.ff.*", "unet:conv_in"], [site.id for site in sdxl])
    with pytest.raises(ValueError, match=r"pattern must match one of 794 layers, got '\*\.mlp\.\*'. They are named like 'unet:"):
        check_globs(["*.mlp.*"], [site.id for site in sdxl])


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
    two = allocate_groups(CANDIDATES, 6, GROUPS, 0.5, FULL)
    assert {group: found.budget for group, found in two.items()} == pytest.approx({"content": 2.0, "quality": 4.0})
    assert {group: found.allocation.chosen for group, found in two.items()} == {"content": {"ff": 0}, "quality": {"attn": 1}}
    with pytest.raises(ValueError, match=r"^allocate: of group content with ratio 0\.25, budget must be at least 2,"):
        allocate_groups(CANDIDATES, 6, GROUPS, 0.25, FULL)
