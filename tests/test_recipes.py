"""The generic recipes: what each name promises, and what all of them keep."""

import copy
import itertools
import re

import pytest
import torch

import dqtk
from dqtk.allocate.command import CHOICES
from dqtk.plan import Recipe, Rule
from dqtk.recipes import KEPT_ROLES, RECIPES, SEARCHES, of_width, recipe_named, search_named
from dqtk.sites import ROLES
from dqtk.spec import describe

GOLDEN = {
    "w8a16": "W8 per channel, A16",
    "w8a8": "W8 per channel, A8 per token",
    "w8a8-static": "W8 per channel, A8 per tensor asym",
    "w8a8-levels": "W8 per channel, A8 per noise level asym",
    "w4a16": "W4 group 64 asym, A16",
    "w4a8-rtn": "W4 group 64 two-level, A8 per token",
    "w4a8": "W4 group 64 two-level, A8 per token, smooth, GPTQ",
    "fp8": "WFP8 E4M3 per channel, AFP8 E4M3 per token",
    "fp8-static": "WFP8 E4M3 per channel, AFP8 E4M3 per tensor",
    "fp4": "WFP4 E2M1 group 64, AFP8 E4M3 per token, AdaRound",
    "nvfp4": "WFP4 E2M1 group 16 E4M3, AFP4 E2M1 group 16 E4M3",
    "mxfp4": "WFP4 E2M1 group 32 E8M0, AFP4 E2M1 group 32 E8M0",
    "w4a4-svd": "W4 group 64, A4 group 64, smooth, rank 32, GPTQ",
    "w4a4-rot": "W4 group 64, A4 group 64, rotated, GPTQ",
    "viditq-w4a8": "W4 per channel asym, A8 per token, smooth 0.01, rotated",
    "viditq-w4a8-video": "W4 per channel asym, A8 per token, smooth 0.4335, rotated",
    "viditq-w8a8": "W8 per channel, A8 per token",
    "mixdq-w8a8": "W8 per channel, A8 per tensor asym, split",
    "mixdq-w4a8": "W4 per channel, A8 per tensor asym, split",
    "llm-fp4": "WFP4 per channel, AFP4 per tensor, shift",
    "vqdm-2bit": "W2 2 x 256 words of 8 per channel, A16, BeamSearch",
    "vqdm-3bit": "W3 3 x 256 words of 8 per channel, A16, BeamSearch",
    "vqdm-4bit": "W4 4 x 256 words of 8 per channel, A16, BeamSearch",
    "vq4dit-2bit": "W2 256 words of 4 per tensor, A16",
    "vq4dit-3bit": "W3 64 words of 2 per tensor, A16",
    "trellis-2bit": "W2 trellis of 12 per channel, A16, rotated, GPTQ",
    "trellis-3bit": "W3 trellis of 12 per channel, A16, rotated, GPTQ",
    "trellis-4bit": "W4 trellis of 12 per channel, A16, rotated, GPTQ",
}
LEARNING = {
    "w4a8",
    "fp4",
    "w4a4-svd",
    "w4a4-rot",
    "viditq-w4a8",
    "viditq-w4a8-video",
    "llm-fp4",
    "mixdq-w8a8",
    "mixdq-w4a8",
    "vqdm-2bit",
    "vqdm-3bit",
    "vqdm-4bit",
    "trellis-2bit",
    "trellis-3bit",
    "trellis-4bit",
}  # from inputs seen on prompts
OWN_LEARNING = ("w4a8", "fp4", "w4a4-svd", "w4a4-rot", *(f"{kind}-{bits}bit" for kind in ("vqdm", "trellis") for bits in (2, 3, 4)))
EXACT_TEXT = {
    "viditq-w8a8": ("cross_attn.k", "cross_attn.v"),
    "viditq-w4a8-video": ("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.out"),
}
RANGES = {"w8a8-static", "w8a8-levels", "fp8-static", "llm-fp4", "mixdq-w8a8", "mixdq-w4a8"}


@pytest.mark.parametrize("name", GOLDEN)
def test_names_mean_what_they_say(name):
    recipe = recipe_named(name)
    assert recipe.name == name
    assert describe(recipe.main_spec()) == GOLDEN[name]
    bits = int(re.search(r"\d(?=bit)|\d", name.removeprefix("vq4dit-"))[0])
    assert recipe.main_spec().weight.bits == bits
    assert recipe.main_spec().needs_inputs == (name in LEARNING)
    assert recipe.main_spec().needs_ranges == (name in RANGES)


def test_no_other_names():
    assert set(RECIPES) == set(GOLDEN)


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith("mixdq")])
def test_same_roles_are_kept_and_modulation_keeps_its_input(name, load_tiny):
    plan = dqtk.plan(load_tiny("sdxl"), name)
    for choice in plan.choices:
        if choice.site.role in KEPT_ROLES:
            assert (choice.spec, choice.why) == (None, KEPT_ROLES[choice.site.role])
        elif choice.site.role == "modulation":
            own = "W4 group 64 asym, A16, GPTQ" if name in OWN_LEARNING else "W8 per channel, A16"
            assert describe(choice.spec) == ("16 bit" if name.startswith("viditq") else own)
        elif choice.site.role in EXACT_TEXT.get(name, ()):
            assert (choice.spec, choice.why.endswith("as in the paper")) == (None, True)
        else:
            assert choice.spec is not None, choice.site.id
    assert set(KEPT_ROLES) <= set(ROLES)


@pytest.mark.parametrize("name", ["mixdq-w8a8", "mixdq-w4a8"])
def test_mixdq_rounds_everything_but_the_inputs_of_both_ends(name, load_tiny):
    """One static range per tensor; keys and values of the text look for a constant token, everything for a concatenated input."""
    bits = int(name[7])
    for choice in dqtk.plan(load_tiny("sdxl"), name).choices:
        if choice.site.role in ("patch_embedding", "output_projection"):
            assert describe(choice.spec) == "W8 per channel, A16"
            continue
        token = "constant token, " if choice.site.role in ("cross_attn.k", "cross_attn.v") else ""
        assert describe(choice.spec) == f"W{bits} per channel, A8 per tensor asym, {token}split"


@pytest.mark.parametrize("name", OWN_LEARNING)
def test_text_keys_and_values_look_for_a_constant_token(name, load_tiny):
    for choice in dqtk.plan(load_tiny("sdxl"), name).choices:
        text = choice.site.role in ("cross_attn.k", "cross_attn.v")
        assert ("constant token" in describe(choice.spec)) == text, choice.site.id


def test_suggestion_for_an_unknown_name():
    with pytest.raises(ValueError, match=r"or of attention alone .* paro-int8, .*, got 'paro-int9'\. Did you mean 'paro-int"):
        recipe_named("paro-int9")
    with pytest.raises(ValueError, match=r"recipe: name must be one of .*, got 'w8a8static'\. Did you mean 'w8a8-static'\?"):
        recipe_named("w8a8static")


SEARCHED = {
    "auto": ["W2", "W3", "W4", "W8"],
    "mixdq-w3.66a16": ["W4", "W4", "W8"],  # of the last rule: quality
    "viditq-mp-w4a8": ["W4", "W8"],
    "vq-auto": ["W2", "W3", "W4", "W8"],
}


@pytest.mark.parametrize("name", SEARCHED)
def test_searches_are_recipes_with_a_budget(name, load_tiny):
    search = search_named(name)
    assert search.name == name
    assert [describe(candidate.main_spec()).partition(" ")[0] for candidate in search.candidates] == SEARCHED[name]
    plans = [dqtk.plan(load_tiny("sdxl"), candidate) for candidate in search.candidates]
    stored = [8 * sum(c.bytes_after for c in plan.choices) / sum(c.site.num_weights for c in plan.choices) for plan in plans]
    assert stored == sorted(stored)
    with pytest.raises(
        ValueError, match=rf"must be of a recipe without a budget, got '{name}'.*dqtk allocate MODEL --search {name}"
    ):
        recipe_named(name)


@torch.no_grad()
def test_every_bit_of_a_width_counts():
    """Also where one tap of a convolution is larger than all others: what is chosen among stands in order."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 32, 3)
    conv.weight[:, :, 1, 1] *= 6
    errors = []
    for bits in CHOICES:
        model = torch.nn.Sequential(copy.deepcopy(conv))
        dqtk.quantize(model, dqtk.plan(model, Recipe(name="all", rules=(Rule(spec=of_width(bits).main_spec(), why="all"),))))
        errors.append(float((model[0].weight.double() - conv.weight).square().sum() / conv.weight.double().square().sum()))
    assert all(wide < narrow / 2.5 for narrow, wide in itertools.pairwise(errors))  # 4 dB at least; 6 a bit on paper


def test_mixdq_gives_two_bits_to_content_only(load_tiny):
    assert set(SEARCHED) == set(SEARCHES)
    plan = dqtk.plan(load_tiny("sdxl"), search_named("mixdq-w3.66a16").candidates[0])
    narrow = {choice.site.role for choice in plan.choices if choice.spec.weight.bits == 2}
    assert narrow == {"cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.out", "ff.up", "ff.down"}
    assert {choice.spec.weight.bits for choice in plan.choices if choice.site.role not in narrow} == {4}
