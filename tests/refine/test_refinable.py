"""What a refiner cannot do for the layers or calls at hand is said before a layer is replaced."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_what_learns import A4, W3, Denoiser, calls, case

import dqtk
from dqtk.calibrate.stats import Stats
from dqtk.checkpoint import quantized_layers
from dqtk.refine.blocks import reconstruct
from dqtk.refine.distill import distill
from dqtk.spec import (
    Distill,
    Hadamard,
    LayerSpec,
    MostSensitive,
    OfRoles,
    PerChannel,
    PerTensor,
    RankDecay,
    Reconstruct,
    TensorSpec,
    Trellis,
    VectorCodebook,
)

NUMBERS = LayerSpec(weight=W3, input=A4)
WORDS = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2), granularity=PerTensor()))
TWO_BOOKS = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=4, books=2), granularity=PerTensor()))
ROTATED = LayerSpec(weight=WORDS.weight, transforms=(Hadamard(),))
RINGS = LayerSpec(weight=TensorSpec(format=Trellis(bits=2), granularity=PerChannel()))

ONE_BOOK = "refine: candidates must be 1 for weights other than words of one book without transforms, got 2 for blocks.0"
WRONG = [
    (WORDS, Distill(decay=RankDecay(rank=2)), r"refine: decay must be None for weights that are vectors.* got RankDecay\(.*blocks"),
    (RINGS, Distill(exact_start=True), "refine: exact_start must be False for weights that are vectors.* for blocks.*OfRoles"),
    (WORDS, Distill(layers=MostSensitive()), "MostSensitive must be asked of layers whose weights are numbers.* vectors at blocks"),
    (TWO_BOOKS, Reconstruct(candidates=2), ONE_BOOK),
    (ROTATED, Reconstruct(candidates=2), ONE_BOOK),
    (RINGS, Reconstruct(candidates=2), ONE_BOOK),
    (NUMBERS, Reconstruct(candidates=2), ONE_BOOK),
    (NUMBERS, Distill(layers=OfRoles(roles=("ff.dwn",))), "OfRoles must name roles of quantized layers of unet .*Did you mean"),
]
WRONG_CALLS = [
    (Distill(guidance=2.0), "refine: guidance must be None for calls of unet that do not hold both halves.* a batch of 3 that may"),
    (Distill(influence=(0.0,) * 19 + (1.0,)), "refine: influence must count some calls of unet"),
]


def quantize(spec, choice, given, rules=()):
    """Raises what ``dqtk.quantize`` does, and leaves the model as it was."""
    torch.manual_seed(0)
    module = Denoiser().requires_grad_(False)
    layers, before = dict(module.named_modules()), copy.deepcopy(module.state_dict())
    given = [replace(call, component="unet") for call in given]
    target = SimpleNamespace(components={"unet": module})
    plan = dqtk.plan(target, dqtk.Recipe(name="r", rules=(*rules, dqtk.Rule(spec=spec, why="test"))))
    try:
        dqtk.quantize(target, plan, Stats(calls=given), refine=choice, progress=False)
    except ValueError:
        assert all(module.get_submodule(path) is layer for path, layer in layers.items())
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
        raise
    return module


@pytest.mark.parametrize(("spec", "choice", "said"), WRONG)
def test_nothing_is_replaced_where_layers_cannot_learn_so(spec, choice, said):
    with pytest.raises(ValueError, match=said):
        quantize(spec, choice, calls(runs=2))


@pytest.mark.parametrize(("choice", "said"), WRONG_CALLS)
def test_nothing_is_replaced_where_calls_do_not_serve(choice, said):
    given = calls(runs=2)
    for call in given:
        call.kwargs["sample"] = call.kwargs["sample"][:3]
    with pytest.raises(ValueError, match=said):
        quantize(NUMBERS, choice, given)


@pytest.mark.parametrize("choice", [Distill(decay=RankDecay(rank=2)), Distill(exact_start=True)])
def test_the_layers_that_were_replaced_are_asked_for(choice):
    module, given, exact, originals = case(NUMBERS)
    for some in (None, {"blocks.0.to_q": originals["blocks.0.to_q"]}):
        with pytest.raises(ValueError, match=r"unquantized form is not at hand, got .* pass the layers that were replaced"):
            distill(module, given, exact, choice, originals=some, progress=False)


def test_refiners_called_alone_refuse_the_same():
    module, given, exact, originals = case(TWO_BOOKS)
    with pytest.raises(ValueError, match="refine: exact_start must be False for weights that are vectors"):
        distill(module, given, exact, Distill(exact_start=True), originals=originals, progress=False)
    with pytest.raises(ValueError, match=ONE_BOOK):
        reconstruct(module, originals, given, Reconstruct(candidates=2), progress=False)


def test_layers_of_numbers_beside_vectors_may_have_a_branch_by_role():
    choice = Distill(iterations=2, exact_start=True, decay=RankDecay(rank=2), layers=OfRoles(roles=("ff.up", "ff.down")))
    rules = (dqtk.Rule(pattern="*.to_q", spec=WORDS, why="test"),)
    module = quantize(NUMBERS, choice, calls(runs=2), rules)
    assert len(quantized_layers(module)) == 3
