"""Books that layers share learn as one: gradients of all layers add up, and what is stored computes what was learned."""

import copy
from dataclasses import replace

import pytest
import torch
from test_what_learns import calls, case

import dqtk
from dqtk.checkpoint import quantized_layers
from dqtk.refine.blocks import reconstruct
from dqtk.refine.distill import distill
from dqtk.refine.trained import training
from dqtk.spec import DiscreteSteps, Distill, LayerSpec, OfRoles, PerChannel, Reconstruct, TensorSpec, VectorCodebook

SHARED = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2, group="all"), granularity=PerChannel()))
PER_ROLE = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2, group="{role}"), granularity=PerChannel()))


def test_gradients_of_all_layers_add_up_in_one_book():
    module, given, exact, _ = case(SHARED)
    layers = quantized_layers(module)
    with training(layers, None, torch.Generator()) as learning, torch.enable_grad():
        owners = [path for path, mine in learning.items() if "moved" in mine.parameters]
        assert len(owners) == 1
        book = learning[owners[0]].books
        assert all(mine.books is book for mine in learning.values())
        (output,) = module(**given[0].kwargs)
        (output - exact[0]).square().mean().backward()
        together = book.moved.grad.clone()
    parts = []
    for path in layers:
        with training({path: layers[path]}, None, torch.Generator()) as learning, torch.enable_grad():
            (output,) = module(**given[0].kwargs)
            (output - exact[0]).square().mean().backward()
            parts.append(learning[path].books.moved.grad)
    assert len(parts) > 2
    assert all(part.any() for part in parts)
    torch.testing.assert_close(together, sum(parts), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spec", [SHARED, PER_ROLE], ids=["all", "role"])
def test_distillation_lowers_the_error_and_changes_books_and_scales_only(spec):
    module, given, exact, _ = case(spec)
    before = copy.deepcopy(module.state_dict())
    choice = Distill(iterations=60, batch=2, bias_rate=0.0)
    found = distill(module, given, exact, choice, progress=False)
    assert found.kept
    assert found.after < 0.97 * found.before
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if "book" in name} == {name for name in before if "book" in name}
    assert not any("qweight" in name for name in changed)
    assert all(tensor.dtype == before[name].dtype for name, tensor in module.state_dict().items())


def test_what_is_learned_is_what_is_stored():
    module, given, _, _ = case(SHARED)
    with training(quantized_layers(module), None, torch.Generator()) as learning:
        for mine in learning.values():
            mine.books.moved.data.fill_(0.1)
        learned = module(**given[0].kwargs)[0]
        for mine in learning.values():
            mine.store()
    torch.testing.assert_close(module(**given[0].kwargs)[0], learned, rtol=1e-5, atol=1e-6)


def test_steps_of_words_find_their_books():
    """Codes of every layer change, in steps that lower the error on calls that nothing learned from."""
    module, given, exact, _ = case(SHARED)
    before = copy.deepcopy(module.state_dict())
    choice = Distill(iterations=20, batch=2, discrete=DiscreteSteps(share=0.05, every=5))
    found = distill(module, given, exact, choice, progress=False)
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert found.kept
    assert {name for name in changed if "qweight" in name} == {name for name in before if "qweight" in name}
    module, given, exact, _ = case(SHARED)
    plain = distill(module, given, exact, replace(choice, discrete=None), progress=False)
    assert found.after < plain.after < found.before


def test_some_layers_of_a_group_do_not_learn_without_the_others():
    module, given, exact, originals = case(SHARED)
    choice = Distill(iterations=2, layers=OfRoles(roles=("ff.up",)))
    with pytest.raises(
        ValueError, match=r"refine: layers must hold all that share books or none, got group 'all' of blocks.*others read"
    ):
        distill(module, given, exact, choice, progress=False)
    with pytest.raises(
        ValueError, match=r"refine: blocks must have books of their layers' own, got group 'all' of .*Take Distill\(\)"
    ):
        reconstruct(module, originals, given, Reconstruct(iterations=2), progress=False)
    module, given, exact, originals = case(PER_ROLE)
    with pytest.raises(ValueError, match=r"got group '\w+' of blocks\.0\.to_q of \S+\. Take Distill"):
        reconstruct(module, originals, given, Reconstruct(iterations=2), progress=False)  # of one layer: no others are spoken of
    distill(module, given, exact, choice, progress=False)  # a role by itself is a whole group


def test_what_cannot_learn_is_said_before_a_layer_is_replaced():
    from test_refinable import quantize

    with pytest.raises(ValueError, match="refine: blocks must have books of their layers' own"):
        quantize(SHARED, Reconstruct(iterations=2), calls(runs=2))
    assert dqtk  # the package registers backends when it is imported
