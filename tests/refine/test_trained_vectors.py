"""A layer of vectors that learns computes what it computes when stored; books and scales learn, codes stay."""

import pytest
import torch
from torch import nn

from dqtk.methods.solve import solve
from dqtk.nn import Quantized
from dqtk.numerics.storage import tensor_name
from dqtk.quantize import runtime_layer
from dqtk.refine.trained import training
from dqtk.spec import Hadamard, LayerSpec, PerChannel, PerTensor, ShortcutSplit, TensorSpec, Trellis, VectorCodebook

FORMS = [
    VectorCodebook(words=16, length=4, books=2),
    VectorCodebook(words=64, length=2),
    Trellis(bits=2),
    VectorCodebook(words=1024, length=2),
]
TRANSFORMS = {"plain": (), "rotated": (Hadamard(),), "in parts": (ShortcutSplit(at=(8,)),)}


def quantized(spec) -> Quantized:
    torch.manual_seed(0)
    layer = nn.Linear(32, 12).requires_grad_(False)
    (solution,) = solve([layer.weight], spec)
    return runtime_layer(layer, solution)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_learning_lowers_the_error_and_what_is_stored_computes_the_same(name, form, granularity):
    rings = isinstance(form, Trellis)
    if rings and isinstance(granularity, PerTensor):
        return  # there is no such layer
    layer = quantized(LayerSpec(weight=TensorSpec(format=form, granularity=granularity), transforms=TRANSFORMS[name]))
    x, wanted = torch.randn(40, 32), torch.randn(40, 12)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    untouched = layer(x)
    with training({"layer": layer}, None, torch.Generator()) as learning:
        torch.testing.assert_close(layer(x), untouched, rtol=1e-5, atol=1e-5)
        numbers = [p for mine in learning.values() for p in mine.parameters.values()]
        adam, losses = torch.optim.Adam(numbers, lr=0.01), []
        for _ in range(30):
            loss = (layer(x) - wanted).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < (0.99 if rings else 0.95) * losses[0]
        learned = layer(x).detach()
        weight = layer.stored_matrix().detach() if name != "in parts" else None
        for mine in learning.values():
            mine.store()
    torch.testing.assert_close(layer(x), learned, rtol=1e-5, atol=1e-5)
    assert weight is None or torch.equal(layer.stored_matrix(), weight)
    changed = {tensor_name(key) for key, tensor in layer.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == ({"scale"} if rings else {"codebook", "scale"})
    assert all(tensor.dtype == before[key].dtype for key, tensor in layer.state_dict().items())


def test_what_is_not_stored_leaves_the_layer_as_it_was():
    layer = quantized(LayerSpec(weight=TensorSpec(format=FORMS[0], granularity=PerChannel())))
    x = torch.randn(3, 32)
    before = layer(x)
    with training({"layer": layer}, None, torch.Generator()) as learning:
        learning["layer"].parameters["moved"].data += 1
        assert not torch.allclose(layer(x), before)
    assert torch.equal(layer(x), before)
