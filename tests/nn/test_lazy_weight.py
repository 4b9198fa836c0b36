"""``layer.weight``: free to look at, decoded when used, impossible to change."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

READ_ONLY = "weight is decoded from packed codes and cannot be changed in place .*Keep the adapter unmerged"


@pytest.fixture(params=["w8", "w4", "w4a8-rtn", "fp8"])
def layer(quantized, request):
    torch.manual_seed(0)
    return quantized(nn.Linear(24, 7).bfloat16(), request.param)


def test_metadata_is_that_of_the_unquantized_weight(quantized):
    for plain in (nn.Linear(24, 7), nn.Conv1d(8, 5, 3), nn.Conv2d(8, 5, (3, 2)), nn.Conv3d(8, 5, 3)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = quantized(plain.to(dtype), "w8").weight
            assert isinstance(weight, torch.Tensor)
            assert (weight.shape, weight.dtype, weight.device) == (plain.weight.shape, dtype, plain.weight.device)
            assert (weight.numel(), weight.ndim, weight.element_size()) == (plain.weight.numel(), plain.weight.ndim, dtype.itemsize)
            assert weight.is_floating_point()
            assert not weight.requires_grad


def test_looking_costs_nothing(layer, monkeypatch):
    def decode():
        raise AssertionError("decoded")

    monkeypatch.setattr(layer, "dequantize", decode)
    weight = layer.weight
    assert weight.dtype == torch.bfloat16
    assert weight.shape == (7, 24)
    assert weight.device.type == "cpu"
    assert weight.data.dtype == torch.bfloat16
    assert "LazyWeight((7, 24), dtype=torch.bfloat16, of QuantLinear)" in repr(weight)


def test_forward_does_not_touch_it(quantized, monkeypatch):
    x = torch.randn(2, 24)
    for spec in ("w8", "w4a8-rtn", "fp8"):
        layer = quantized(nn.Linear(24, 7), spec)
        expected = layer(x)
        monkeypatch.setattr(type(layer), "weight", property(lambda self: pytest.fail("touched")))
        assert torch.equal(layer(x), expected)
        monkeypatch.undo()


def test_it_decodes_when_used(layer):
    expected = layer.dequantize()
    weight = layer.weight
    x = torch.randn(3, 24).bfloat16()
    assert torch.equal(F.linear(x, weight), F.linear(x, expected))
    assert torch.equal(x @ weight.T, x @ expected.T)
    assert torch.equal(weight + 1, expected + 1)
    assert torch.equal(1 - weight, 1 - expected)
    assert torch.equal(weight[2, 3:5], expected[2, 3:5])
    assert torch.equal(weight.float(), expected.float())
    assert torch.equal(torch.cat([weight, weight]), torch.cat([expected, expected]))
    assert torch.equal(torch.zeros(7, 24).copy_(weight), expected.float())
    assert float(weight.abs().max()) == float(expected.abs().max())
    assert weight.tolist() == expected.tolist()
    for copied in (weight.clone(), weight.detach().clone(), weight.data.clone(), copy.deepcopy(weight)):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, expected)


def test_numpy(quantized):
    layer = quantized(nn.Linear(24, 7), "w8")
    expected = layer.dequantize().numpy()
    for array in (layer.weight.numpy(), layer.weight.detach().numpy(), np.asarray(layer.weight)):
        assert np.array_equal(array, expected)


def test_it_follows_the_layer(layer):
    assert layer.float().weight.dtype == torch.float32
    assert torch.equal(layer.weight + 0, layer.dequantize())
    assert layer.to("meta").weight.is_meta


def augmented(layer):
    layer.weight += 1


def augmented_data(layer):
    layer.weight.data += 1


def replaced_data(layer):
    layer.weight.data = torch.zeros(7, 24)


def parameter(layer):
    layer.weight = nn.Parameter(torch.zeros(7, 24))


def tensor(layer):
    layer.weight = torch.zeros(7, 24)


def item(layer):
    layer.weight[0] = 1


WRITES = [
    augmented,
    augmented_data,
    replaced_data,
    parameter,
    tensor,
    item,
    lambda layer: layer.weight.add_(1),
    lambda layer: layer.weight.data.copy_(torch.zeros(7, 24)),
    lambda layer: layer.weight.mul_(2),
    lambda layer: layer.weight.zero_(),
    lambda layer: layer.weight.set_(torch.zeros(3, dtype=torch.bfloat16)),
    lambda layer: nn.init.normal_(layer.weight),
    lambda layer: nn.init.zeros_(layer.weight),
    lambda layer: torch.add(torch.zeros(7, 24), 1, out=layer.weight),
    lambda layer: torch._foreach_mul_([layer.weight], 2.0),
]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [True, False])
def test_writing_raises(layer, write, grad):
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=f"QuantLinear: {READ_ONLY}"):
        write(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(value.float(), state[name].float())


def test_convolutions_are_read_only_too(quantized):
    with pytest.raises(RuntimeError, match=f"QuantConv2d: {READ_ONLY}"):
        quantized(nn.Conv2d(8, 5, 3), "w8").weight.add_(1)


def test_it_is_neither_parameter_nor_state(layer):
    assert "weight" not in dict(layer.named_parameters())
    assert "weight" not in layer.state_dict()
    with pytest.raises(AttributeError):
        del layer.weight


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.detach().add_(1),
        lambda w: w.view(-1).mul_(2),
        lambda w: w.t().mul_(2),
        lambda w: w[0].add_(1),
        lambda w: w[0, 1:3].fill_(0),
        lambda w: w.data.view(-1).add_(1),
        lambda w: w.detach()[0].zero_(),
    ],
)
def test_a_write_through_a_view_raises(layer, write):
    with pytest.raises(RuntimeError, match="decoded from packed codes"):
        write(layer.weight)


def test_views_read_like_the_tensor(layer):
    weight, expected = layer.weight, layer.dequantize()
    for view in (lambda w: w.t(), lambda w: w[1:3, ::2], lambda w: w.view(-1), lambda w: w.detach().unsqueeze(0)):
        assert torch.equal(view(weight) + 0, view(expected))
        assert view(weight).stride() == view(expected).stride()
