"""Weights of vectors as choices: bits, names, what is refused with which words, what plans make of layers they do not fit."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.numerics.trellis import TILE
from dqtk.spec import (
    GPTQ,
    MSE,
    RTN,
    AdaRound,
    BeamSearch,
    ByLevel,
    ConstantToken,
    Dynamic,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Smooth,
    TensorSpec,
    Trellis,
    VectorCodebook,
    canonical,
    describe,
)

WORDS = TensorSpec(format=VectorCodebook(books=3), granularity=PerChannel())
SHARED = replace(WORDS, format=VectorCodebook(words=4096, length=6, group="{role}"))


@pytest.mark.parametrize(
    ("form", "bits", "name"),
    [
        (VectorCodebook(words=256, length=4), 2, "W2 256 words of 4 per channel"),
        (VectorCodebook(words=64, length=2), 3, "W3 64 words of 2 per channel"),
        (VectorCodebook(), 1, "W1 256 words of 8 per channel"),
        (VectorCodebook(books=4), 4, "W4 4 x 256 words of 8 per channel"),
        (VectorCodebook(words=16, length=1), 4, "W4 16 words of 1 per channel"),
        (VectorCodebook(words=4096, length=6), 2, "W2 4096 words of 6 per channel"),
        (VectorCodebook(words=65536, length=8), 2, "W2 65536 words of 8 per channel"),
        (VectorCodebook(words=4096, length=6, group="all"), 2, "W2 4096 words of 6 shared by all per channel"),
        (Trellis(bits=3), 3, "W3 trellis of 12 per channel"),
    ],
)
def test_bits_and_names(form, bits, name):
    assert form.bits == bits
    assert describe(LayerSpec(weight=replace(WORDS, format=form))) == f"{name}, A16"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"words": 100},
            r"VectorCodebook: words must be 4, 8, 16 \.\.\. 65536, got 100\. Codes have 2 to 16 bits; take more books",
        ),
        ({"words": 131072}, "words must be 4, 8"),
        ({"length": 5}, r"VectorCodebook: length must be 1, 2, 3, 4, 6, 8, 12 or 16, got 5\."),
        ({"words": 512, "length": 4}, r"whole number of bits from 1 to 8, got 9 / 4\."),
        ({"books": 0}, r"VectorCodebook: books must be an integer from 1 to 8, got 0\."),
        ({"words": 64}, r"whole number of bits from 1 to 8, got 6 / 8\. For example"),
        (
            {"group": "ff.up"},
            r"VectorCodebook: group must be letters, digits and underscores, with {role} in it or not, got 'ff.up'",
        ),
        ({"group": ""}, "group must be letters"),
        ({"length": 1, "books": 2}, r"whole number of bits from 1 to 8, got 16 / 1\."),
    ],
)
def test_formats_refuse(arguments, text):
    with pytest.raises(ValueError, match=text):
        VectorCodebook(**arguments)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"weight": replace(WORDS, granularity=PerGroup())},
            "weight of VectorCodebook must be PerTensor or PerChannel without a range",
        ),
        (
            {"weight": TensorSpec(format=Trellis(), granularity=PerTensor())},
            r"weight of Trellis must be PerChannel without a range, got PerTensor\(\)",
        ),
        (
            {"weight": TensorSpec(format=Trellis(), granularity=PerChannel()), "solver": BeamSearch()},
            r"solver must be RTN or GPTQ for Trellis, got BeamSearch\(",
        ),
        ({"weight": replace(WORDS, range=MSE())}, "PerTensor or PerChannel without a range, got .* with MSE"),
        ({"solver": AdaRound()}, r"solver must be RTN or GPTQ or BeamSearch for VectorCodebook, got AdaRound\(.*no up and down"),
        ({"low_rank": LowRank()}, r"low_rank must be None for VectorCodebook, got LowRank\(.*Take more bits"),
        ({"transforms": (Smooth(),)}, "Smooth must have an alpha for VectorCodebook, got None"),
        (
            {"weight": SHARED, "transforms": (Smooth(alpha=0.5),)},
            r"must be Hadamard or none where layers share books, got Smooth\(",
        ),
        ({"weight": SHARED, "transforms": (ConstantToken(),)}, r"must be Hadamard or none .*group=None"),
        ({"input": replace(WORDS, range=Dynamic())}, "input must be Int, Float or Codebook, got VectorCodebook"),
        (
            {"weight": TensorSpec(format=Int(bits=4), granularity=PerChannel()), "solver": BeamSearch()},
            "BeamSearch is for VectorCodebook",
        ),
    ],
)
def test_layers_refuse(fields, text):
    with pytest.raises(ValueError, match=text):
        LayerSpec(**({"weight": WORDS} | fields))


@pytest.mark.parametrize("arguments", [{"beam": 0}, {"rounds": 0}, {"tolerance": 1.0}, {"damping": 0.0}, {"beam": 1.5}])
def test_beam_search_refuses(arguments):
    with pytest.raises(ValueError, match=r"BeamSearch: .* must be .*, got .*\. Use BeamSearch\(\)"):
        BeamSearch(**arguments)


def test_what_composes():
    a8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
    spec = LayerSpec(weight=WORDS, input=a8, solver=BeamSearch(), transforms=(Smooth(alpha=0.5), Hadamard()), correct_bias=True)
    assert spec.needs_moments
    assert not LayerSpec(weight=replace(WORDS, granularity=PerTensor())).needs_stats


def recipe(spec):
    return dqtk.Recipe(name="vectors", rules=(dqtk.Rule(spec=spec, why="test"),))


def test_layers_whose_channels_vectors_do_not_divide_get_eight_bits_and_say_so():
    model = nn.Sequential(nn.Linear(24, 8), nn.Linear(20, 8), nn.Conv2d(12, 8, 2), nn.Conv2d(16, 8, 3))
    for solver in (RTN(), GPTQ(), BeamSearch()):
        plan = dqtk.plan(model, recipe(LayerSpec(weight=WORDS, solver=solver)))
        kinds = {choice.site.path: (describe(choice.spec), choice.why) for choice in plan.choices}
        assert kinds["1"] == ("W8 per channel, A16", "test; 8 bit per channel: vectors of 8 do not divide 20 channels")
        assert kinds["2"] == ("W8 per channel, A16", "test; 8 bit per channel: vectors of 8 do not divide 12 channels")
        assert all("x 256 words of 8" in kinds[path][0] for path in ("0", "3"))


def test_trellis_codes_want_four_columns():
    model = nn.Sequential(nn.Linear(22, 8), nn.Linear(20, 8))
    plan = dqtk.plan(model, recipe(LayerSpec(weight=TensorSpec(format=Trellis(), granularity=PerChannel()))))
    assert [describe(choice.spec) for choice in plan.choices] == ["W8 per channel, A16", "W2 trellis of 12 per channel, A16"]
    assert plan.choices[0].why == f"test; 8 bit per channel: vectors of {TILE[1]} do not divide 22 channels"
    rings = -(-8 // TILE[0]) * (20 // TILE[1])
    assert plan.choices[1].bytes_after == rings * TILE[0] * TILE[1] * 2 // 8 + 8 * 4


def test_a_layer_that_its_own_words_would_outweigh_gets_eight_bits_and_says_so():
    form = VectorCodebook(words=4096, length=6)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(192, 192), nn.Linear(1152, 1152))
    small, large = dqtk.plan(model, recipe(LayerSpec(weight=replace(WORDS, format=form)))).choices
    assert (describe(small.spec), small.why) == (
        "W8 per channel, A16",
        "test; 8 bit per channel: with its own 4096 words of 6 the layer would take more",
    )
    assert describe(large.spec) == "W2 4096 words of 6 per channel, A16"
    assert large.bytes_after == 1152 * 1152 * 2 // 8 + 4096 * 6 * 2 + 1152 * 4  # a code takes 12 bits


def test_planned_bytes_count_codes_books_and_scales():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 32))
    (choice,) = dqtk.plan(model, recipe(LayerSpec(weight=WORDS))).choices
    assert choice.bytes_after == 32 * 64 * 3 // 8 + 3 * 256 * 8 * 2 + 32 * 4


def test_a_group_per_role_is_named_by_the_plan(meta_pipe):
    plan = dqtk.plan(
        meta_pipe, recipe(LayerSpec(weight=replace(SHARED, format=VectorCodebook(words=16, length=2, group="{role}_books"))))
    )
    groups = {choice.site.role: choice.spec.weight.format.group for choice in plan.choices if choice.spec is not None}
    assert groups["self_attn.q"] == "self_attn_q_books"
    assert {group for _, group in plan.books} == set(groups.values())
    assert all(name == "transformer" for name, _ in plan.books)
    assert plan.book_bytes("transformer") == 16 * 2 * 2 * len(plan.books)
    assert plan.book_bytes("text_encoder") == 0
    said = plan.explain()
    assert "transformer: books self_attn_q_books: 1 of 16 words of 2, 64 B shared by 2 layers" in said
    assert dqtk.Plan.from_json(plan.to_json()).books == plan.books
    size = plan.sizes("transformer")
    alone = sum(choice.bytes_after - choice.bytes_before for choice in plan.choices)
    assert size["bytes_after"] == size["bytes_before"] + alone + plan.book_bytes("transformer")


def test_a_group_has_books_of_one_form():
    model = nn.Sequential(nn.Linear(24, 8), nn.Linear(24, 8))
    rules = [
        dqtk.Rule(pattern=path, spec=LayerSpec(weight=TensorSpec(format=form, granularity=PerChannel())), why="test")
        for path, form in (
            ("0", VectorCodebook(words=16, length=2, group="g")),
            ("1", VectorCodebook(words=64, length=2, group="g")),
        )
    ]
    with pytest.raises(
        ValueError, match=r"plan: layers of group 'g' must share books of one form, got .*words=64.* at model:1 and"
    ):
        dqtk.plan(model, dqtk.Recipe(name="two", rules=tuple(rules)))


def test_many_words_are_no_burden_where_they_are_shared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(192, 192), nn.Linear(192, 192))
    plan = dqtk.plan(model, recipe(LayerSpec(weight=replace(SHARED, format=VectorCodebook(words=4096, length=6, group="g")))))
    assert [describe(choice.spec) for choice in plan.choices] == ["W2 4096 words of 6 shared by g per channel, A16"] * 2
    assert plan.sizes("model")["bytes_after"] == 2 * (192 * 192 * 2 // 8 + 192 * 4 + 192 * 2) + 4096 * 6 * 2


def test_a_group_that_its_words_would_outweigh_gets_eight_bits_and_says_so():
    """One layer alone, a group among others, and one of two weights of a layer."""
    large = LayerSpec(weight=replace(SHARED, format=VectorCodebook(words=65536, length=8, group="{role}")))
    with torch.device("meta"):
        one = nn.Sequential(nn.Linear(192, 192))
    plan = dqtk.plan(one, recipe(large))
    role = plan.choices[0].site.role
    said = f"8 bit per channel: group '{role}', one layer with 65536 words of 8, would take more"
    assert (describe(plan.choices[0].spec), plan.choices[0].why) == ("W8 per channel, A16", f"test; {said}")
    assert plan.books == {}
    assert plan.sizes("model")["bytes_after"] == 192 * 192 + 192 * 4 + 192 * 2
    forms = VectorCodebook(words=4096, length=6, group="small"), VectorCodebook(words=4096, length=6, group="large")
    small, large = (LayerSpec(weight=replace(SHARED, format=form)) for form in forms)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(3)), *(nn.Linear(192, 192) for _ in range(2)))
    rules = [dqtk.Rule(pattern=f"{i}", spec=small if i < 3 else large, why="test") for i in range(5)]
    plan = dqtk.plan(model, dqtk.Recipe(name="two", rules=tuple(rules)))
    assert [describe(choice.spec).split(",")[0] for choice in plan.choices[2:4]] == [
        "W8 per channel",
        "W2 4096 words of 6 shared by large per channel",
    ]
    assert plan.choices[0].why.endswith("group 'small', 3 layers with 4096 words of 6, would take more")
    assert plan.books == {("model", "large"): forms[1]}
    both = ByLevel(specs=(LayerSpec(weight=WORDS), small), edges=(500.0,))
    (choice,) = dqtk.plan(one, recipe(both)).choices
    assert [part.weight.format for part in choice.spec.specs] == [WORDS.format, Int(bits=8)]


def test_old_choices_keep_their_text():
    """Hashes of plans and checkpoints from before there were groups hold."""
    assert canonical(VectorCodebook(books=3)) == '{"books":3,"type":"VectorCodebook"}'
