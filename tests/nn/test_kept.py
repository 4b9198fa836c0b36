"""Decoded weights that are kept: what they are, which fit, when they are let go of, and what never sees them."""

import copy
import io
import types

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from torch import nn

import dqtk
from dqtk.kernels import to_matrix
from dqtk.nn import QuantLinear, keep_decoded, kept_weights
from dqtk.nn.kept import Unit, chosen, size_of
from dqtk.report.sizes import bytes_at_16_bit, bytes_in_memory
from dqtk.spec import (
    Dynamic,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    ShortcutSplit,
    TensorSpec,
    Trellis,
    VectorCodebook,
)

RINGS = LayerSpec(weight=TensorSpec(format=Trellis(bits=3), granularity=PerChannel()), transforms=(Hadamard(),))
WORDS = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=4, books=3), granularity=PerTensor()))
GROUPS = LayerSpec(weight=TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=8)))
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
W8A8 = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()), input=A8)


class Model(nn.Module):
    """A denoiser of four layers, three of which decode: 16 x 24, 8 x 16 at nine taps, 8 x 8."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(24, 16)
        self.conv = nn.Conv2d(16, 8, 3, padding=1)
        self.mid = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)

    def forward(self, x):
        x = self.up(x).transpose(1, 2).unflatten(2, (2, -1))
        return self.down(self.mid(self.conv(x).flatten(2).transpose(1, 2)))


def quantized():
    torch.manual_seed(0)
    rules = (("up", RINGS), ("conv", WORDS), ("mid", GROUPS), ("down", W8A8))
    recipe = dqtk.Recipe(name="kept", rules=tuple(dqtk.Rule(pattern=name, spec=spec, why="test") for name, spec in rules))
    return dqtk.quantize(Model().requires_grad_(False), recipe, progress=False)


ALL = 4 * (16 * 24 + 8 * 16 * 9 + 8 * 8)


@pytest.fixture
def model():
    return quantized()


@pytest.fixture
def x():
    return torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))


def test_the_weights_are_those_that_would_be_decoded(model, x):
    expected, before = model(x), model.up.kernel()
    found = keep_decoded(model, "1MiB")
    assert (found.num_bytes, found.paths, found.left) == (ALL, ("up", "conv", "mid"), ())
    assert model.up.kernel() == "trellis_only: decoded once and kept in memory, then torch's own matmul"
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    for layer in (model.up, model.conv, model.mid):
        assert torch.equal(layer.kept.matrix, layer.stored_matrix())
    with torch.no_grad():  # what is kept is what multiplies
        model.mid.kept.matrix.zero_()
    assert torch.equal(model.mid(torch.ones(3, 8)), model.mid.bias.expand(3, -1))
    found.release()
    assert kept_weights(model) == []
    assert model.up.kernel() == before
    assert torch.equal(model(x), expected)


def test_in_the_compute_dtype_alone(model, x):
    model.bfloat16()
    expected = model(x.bfloat16())
    assert keep_decoded(model, 10**6).num_bytes == ALL // 2
    assert {weight.dtype for weight in kept_weights(model)} == {torch.bfloat16}
    torch.testing.assert_close(model(x.bfloat16()), expected, rtol=2e-2, atol=2e-2)
    wide = model.mid(torch.ones(3, 8))  # a caller's float32: decoded for it
    torch.testing.assert_close(
        wide, torch.nn.functional.linear(torch.ones(3, 8), model.mid.stored_matrix(), model.mid.bias.float())
    )


def test_a_budget_is_kept_and_what_costs_most_comes_first():
    units = [
        Unit(path=p, stored=None, num_bytes=b, seconds=s) for p, b, s in (("a", 8, 1), ("b", 4, 2), ("c", 8, 1), ("d", 2, 0.1))
    ]
    assert [unit.path for unit in chosen(units, 100)] == ["b", "a", "c", "d"]
    assert [unit.path for unit in chosen(units, 13)] == ["b", "a"]
    assert [unit.path for unit in chosen(units, 15)] == ["b", "a", "d"]
    assert chosen(units, 1) == []


def test_what_does_not_fit_goes_on_decoding(model, x):
    expected = model(x)
    found = keep_decoded(model, ALL - 1)
    assert found.num_bytes < ALL
    assert sorted((*found.paths, *found.left)) == ["conv", "mid", "up"]
    assert sum(weight.nbytes for weight in kept_weights(model)) == found.num_bytes
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with keep_decoded(model, "1MB") as again:  # lets go of the first
        assert sum(weight.nbytes for weight in kept_weights(model)) == again.num_bytes == ALL
    assert kept_weights(model) == []


def test_memory_is_counted_and_nothing_is_saved(model, tmp_path):
    before, half, names = bytes_in_memory(model), bytes_at_16_bit(model), list(model.state_dict())
    keep_decoded(model, "1MiB")
    assert bytes_in_memory(model) == before + ALL
    assert bytes_at_16_bit(model) == half + ALL // 2
    assert list(model.state_dict()) == names
    dqtk.save(model, tmp_path / "saved")
    loaded = dqtk.checkpoint.load_module(Model(), tmp_path / "saved")
    assert kept_weights(loaded) == []
    assert bytes_in_memory(loaded) == before


def test_copies_and_pickles_keep_none(model, x):
    keep_decoded(model, "1MiB")
    expected, file = model(x), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert kept_weights(other) == []
        torch.testing.assert_close(other(x), expected, rtol=1e-5, atol=1e-5)
    assert len(kept_weights(model)) == 3
    plain = model.up.plain()
    plain.weight.zero_()
    assert not hasattr(plain, "kept")
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("change", ["load", "fill", "in place", "another tensor", "dtype", "device"])
def test_let_go_of_when_codes_change(model, x, change):
    keep_decoded(model, "1MiB")
    torch.manual_seed(5)
    other = quantized()
    with torch.no_grad():
        other.mid.scale.mul_(2)
    if change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "fill":
        model.mid.fill({name: getattr(other.mid, name) for name in ("qweight", "scale", "zero")}, other.mid.bias)
    elif change == "in place":
        model.mid.scale.copy_(other.mid.scale)
    elif change == "another tensor":
        model.mid.scale = other.mid.scale
    elif change == "dtype":
        model.bfloat16()
        assert kept_weights(model) == []
        return
    else:
        model.to("meta")
        assert kept_weights(model) == []
        return
    torch.testing.assert_close(model.mid(x[..., :8]), other.mid(x[..., :8]), rtol=1e-5, atol=1e-5)
    assert model.mid.kept is None


def test_moving_nowhere_keeps_them(model):
    keep_decoded(model, "1MiB")
    model.to("cpu")
    model.to(torch.float32)
    assert len(kept_weights(model)) == 3


def test_in_one_graph_which_sees_them_go(model, x):
    expected = model(x)
    found = keep_decoded(model, "1MiB")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.mid.kept.matrix.zero_()
    model.down.bias.zero_()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    found.release()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(compiled(x)[0, 0], compiled(x)[1, 3])


def test_gradients_pass(model, x):
    with_codes, kept = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(with_codes).square().sum().backward()
    keep_decoded(model, "1MiB")
    model(kept).square().sum().backward()
    torch.testing.assert_close(kept.grad, with_codes.grad, rtol=1e-3, atol=1e-4)


def test_adapters_add_to_them(model, x):
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "mid"], init_lora_weights=False), model)
    expected = adapted(x)
    assert keep_decoded(adapted, "1MiB").paths == ("up.base_layer", "conv", "mid.base_layer")
    torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be changed in place"):
        adapted.up.merge()
    torch.testing.assert_close(adapted(x), expected, rtol=1e-5, atol=1e-5)


def test_parts_of_a_split_input(x):
    torch.manual_seed(0)
    spec = LayerSpec(weight=WORDS.weight, transforms=(ShortcutSplit(at=(8,)),))
    model = dqtk.quantize(
        nn.Sequential(nn.Linear(24, 16)),
        dqtk.Recipe(name="split", rules=(dqtk.Rule(spec=spec, why="test"),)),
        progress=False,
    )
    expected = model(x)
    keep_decoded(model, 4 * 16 * 16)  # the larger part; or the smaller, if that costs more per byte
    assert len(kept_weights(model)) == 1
    assert "(1 parts: decoded once and kept in memory" in model[0].kernel()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert keep_decoded(model, "1MiB").num_bytes == 4 * 24 * 16
    assert torch.equal(torch.cat(kept_weights(model), 1), to_matrix(model[0].stored_matrix()))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_offloaded_layers_are_refused(model, x):
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"keep_decoded: layers must stay on their device, got AlignDevicesHook at "):
        keep_decoded(model, "1MiB")
    remove_hook_from_module(model, recurse=True)
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"layers must stay on their device, got \w*GroupOffloadingHook at"):
        keep_decoded(model, "1MiB")


def test_offloading_afterwards_is_safe(model, x):
    expected = model(x)
    keep_decoded(model, "1MiB")
    cpu_offload(model, torch.device("cpu"))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_pipelines_keep_their_denoisers_weights():
    pipe = types.SimpleNamespace(components={"transformer": quantized(), "text_encoder": quantized(), "scheduler": None})
    found = keep_decoded(pipe, "1MiB")
    assert found.modules == (pipe.components["transformer"],)
    assert kept_weights(pipe.components["text_encoder"]) == []


@pytest.mark.parametrize(
    ("budget", "size"), [(7, 7), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), (" 4kib ", 4096), ("12", 12), (2e9, 2_000_000_000)]
)
def test_budgets(budget, size):
    assert size_of(budget) == size


@pytest.mark.parametrize("budget", [0, -1, "", "2 GiBs", "-3MB", "0.1", 0.5, float("nan"), float("inf"), True])
def test_budgets_that_are_none(budget):
    with pytest.raises(ValueError, match="keep_decoded: budget must be a number of bytes or a size such as '2GiB', got"):
        size_of(budget)


def test_models_without_decoded_layers_are_refused():
    rule = dqtk.Rule(spec=W8A8, why="test")
    model = dqtk.quantize(nn.Sequential(nn.Linear(8, 8)), dqtk.Recipe(name="w8a8", rules=(rule,)), progress=False)
    assert isinstance(model[0], QuantLinear)
    for target in (model, nn.Sequential(nn.Linear(8, 8))):
        with pytest.raises(ValueError, match="keep_decoded: the model must have layers that decode their weights"):
            keep_decoded(target, "1MiB")
