"""Layers that share books of words: what they compute and weigh, and that layers and books stay together wherever a model goes."""

import copy
import importlib
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import offload_state_dict
from diffusers.hooks import apply_group_offloading
from torch import nn

import dqtk
from dqtk.checkpoint import load_module, quantized_layers
from dqtk.kernels import to_matrix
from dqtk.nn import books_of, forget_books, keep_decoded
from dqtk.report.sizes import bytes_in_memory
from dqtk.spec import ByLevel, Dynamic, Hadamard, Int, LayerSpec, PerChannel, PerTensor, PerToken, TensorSpec, VectorCodebook

main_path = importlib.import_module("dqtk.quantize")

ONE = VectorCodebook(words=16, length=2, group="all")
WIDE = VectorCodebook(words=512, length=3, group="all")
TWO = VectorCodebook(words=16, length=4, books=2, group="all")
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())


class Model(nn.Module):
    """[B, T, 24] -> [B, 12, 2, T / 2], through two blocks and a convolution."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24, bias=False)) for _ in range(2)])
        self.conv = nn.Conv2d(24, 12, 3, padding=1)

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = x + block(x)
        return self.conv(x.transpose(1, 2).unflatten(2, (2, -1)))


def spec_of(form, granularity=None, **fields):
    return LayerSpec(weight=TensorSpec(format=form, granularity=granularity or PerChannel()), **fields)


def recipe(*specs):
    """The first for feed-forwards, the last for the rest."""
    rules = (dqtk.Rule(pattern="blocks.*", spec=specs[0], why="test"), dqtk.Rule(spec=specs[-1], why="test"))
    return dqtk.Recipe(name="shared", rules=rules)


def original():
    torch.manual_seed(0)
    return Model().requires_grad_(False).eval()


def quantized(*specs):
    return dqtk.quantize(original(), recipe(*specs), progress=False)


def batch(dtype=torch.float32):
    return torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def codes_of(qweight, bits, count):
    """int64 [N, count], one bit after the other, by the planes that packing.py draws."""
    found = []
    for row in qweight.tolist():
        codes = []
        for start in range(0, len(row), bits):
            eight, plane_at, low = row[start : start + bits], 0, 0
            code = [0] * 8
            for plane in [8] * (bits // 8) + [p for p in (4, 2, 1) if bits & p]:
                for i in range(8):
                    byte = eight[plane_at + i % plane]
                    code[i] |= (byte >> (i // plane * plane) & (2**plane - 1)) << low
                plane_at, low = plane_at + plane, low + plane
            codes += code
        found.append(codes[:count])
    return torch.tensor(found)


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize("form", [ONE, WIDE, TWO], ids=str)
def test_equals_a_dequantization_by_hand(form, granularity):
    model, x = quantized(spec_of(form, granularity)), batch()
    (book,) = books_of(model).buffers()
    assert (book.dtype, book.shape) == (torch.float16, (form.books, form.words, form.length))
    plain = original()
    for path, layer in quantized_layers(model).items():
        codes = codes_of(layer.qweight, form.code_bits, layer.k // form.length * form.books).unflatten(1, (-1, form.books))
        words = sum(book[m].double()[codes[..., m]] for m in range(form.books)).flatten(1)
        by_hand = words * layer.scale.double()
        stored = to_matrix(layer.weight) if layer.weight.ndim == 4 else layer.weight[:]
        torch.testing.assert_close(stored.double(), by_hand, rtol=1e-6, atol=1e-8)
        weight = plain.get_submodule(path).weight
        weight.copy_(by_hand.view(weight.shape) if weight.ndim == 2 else layer.weight[:])
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_bytes_count_the_books_once():
    plan, model = dqtk.plan(original(), recipe(spec_of(WIDE))), quantized(spec_of(WIDE))
    assert plan.books == {("model", "all"): WIDE}
    book = 512 * 3 * 2
    assert plan.book_bytes("model") == book
    layers = sum(choice.bytes_after for choice in plan.choices)
    assert layers == sum(site.n * site.k * 9 // 3 // 8 + 4 * site.n for site in (choice.site for choice in plan.choices))
    assert bytes_in_memory(model) == layers + book + sum(p.nbytes for p in model.parameters())
    left = sum(p.numel() for p in original().parameters()) - sum(choice.site.num_weights for choice in plan.choices)
    assert plan.sizes("model")["bytes_after"] == layers + book + 2 * left


def test_copies_have_books_of_their_own_and_layers_read_those_beside_them():
    model, x = quantized(spec_of(ONE)), batch()
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.books is twin.dqtk_books for layer in quantized_layers(twin).values())
        twin.dqtk_books.put("all", torch.zeros_like(twin.dqtk_books.stored("all")))
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
    alone = copy.deepcopy(model.blocks[0][0])  # takes what it needs along
    assert torch.equal(alone(x), model.blocks[0][0](x))


def test_books_keep_their_numbers_when_the_model_is_cast():
    model = quantized(spec_of(TWO))
    before = model.dqtk_books.stored("all").clone()
    model.to(torch.bfloat16).half().to(torch.float64)
    assert torch.equal(model.dqtk_books.stored("all"), before)
    assert model.dqtk_books.stored("all").dtype == torch.float16
    assert model(batch(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("form", [ONE, WIDE], ids=str)
def test_a_saved_model_is_the_same_to_the_bit(form, tmp_path):
    model, x = quantized(spec_of(form, transforms=(Hadamard(block=8),)), spec_of(form)), batch()
    dqtk.save(model, tmp_path / "saved")
    loaded = load_module(original(), tmp_path / "saved")
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert [name for name in mine if "book" in name] == ["dqtk_books.book_all"]
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    assert torch.equal(model(x), loaded(x))


@pytest.mark.parametrize("buffers", [True, False])
def test_sequential_offload(buffers):
    model, x = quantized(spec_of(ONE)).bfloat16(), batch(torch.bfloat16)
    expected = model(x)
    cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
    assert model.dqtk_books.stored("all").is_meta == buffers
    for _ in range(2):
        assert torch.equal(model(x), expected)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(kind):
    model, x = quantized(spec_of(WIDE)), batch()
    expected = model(x)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert model.dqtk_books.stored("all").dtype == torch.float16


def test_dispatch_from_disk(tmp_path):
    model, x = quantized(spec_of(ONE)), batch()
    expected = model(x)
    offload_state_dict(tmp_path, {name: t for name, t in model.state_dict().items() if t.numel()})
    where = {"blocks": "cpu", "conv": "disk", "dqtk_books": "disk"}
    placed = dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, offload_buffers=True)
    assert torch.equal(placed(x), expected)


def test_one_graph_with_gradients():
    model, x = quantized(spec_of(WIDE)), batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(a), model(b)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_rounded_inputs_and_levels():
    """One stored weight that serves 16-bit inputs at one noise level and 8-bit ones at another."""
    way, rounded = spec_of(ONE), spec_of(ONE, input=A8)
    model, x = quantized(ByLevel(specs=(way, rounded), edges=(500.0,))), batch()
    assert [name for name, _ in model.named_buffers() if "book" in name] == ["dqtk_books.book_all"]
    assert torch.equal(model(x, timestep=torch.tensor([900.0])), quantized(way)(x))
    assert torch.equal(model(x, timestep=torch.tensor([100.0])), quantized(rounded)(x))
    plain = model.blocks[0][0].plain()
    assert torch.equal(plain.weight, model.blocks[0][0].weight[:])


def test_kept_weights_are_let_go_of_when_a_book_changes():
    model, x = quantized(spec_of(ONE)), batch()
    expected = model(x)
    kept = keep_decoded(model, "1MiB")
    assert len(kept.paths) == 5
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    book = model.dqtk_books.stored("all")
    model.dqtk_books.put("all", 2 * book)
    changed = model.blocks[0][0](x)
    assert model.blocks[0][0].kept is None
    torch.testing.assert_close(changed, F.linear(x, 2 * quantized(spec_of(ONE)).blocks[0][0].weight[:], model.blocks[0][0].bias))


def test_a_layer_in_no_model_says_so():
    layer = quantized(spec_of(ONE)).blocks[0][0]
    vars(layer)["books"] = None
    with pytest.raises(
        ValueError, match=r"QuantLinear: the layer must stand in a model, as its words are in the books that group 'all'"
    ):
        layer(batch())


def test_an_interruption_leaves_true_layers_and_whole_books(tmp_path, monkeypatch):
    """Right after the first layer; its books are those of a run to the end, and those of the other group, that none reads, go."""
    specs = spec_of(ONE), spec_of(replace(TWO, group="other"))
    whole, place, placed = quantized(*specs), main_path.replace_layer, []

    def stop(model, path, layer):
        assert all(
            torch.equal(book, dict(whole.dqtk_books.named_buffers())[name]) for name, book in model.dqtk_books.named_buffers()
        )
        place(model, path, layer)
        placed.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(main_path, "replace_layer", stop)
    model, x = original(), batch()
    with pytest.raises(KeyboardInterrupt):
        dqtk.quantize(model, recipe(*specs), progress=False)
    assert list(quantized_layers(model)) == placed == ["blocks.0.0"]
    assert model.dqtk_books.groups() == ("all",)
    assert torch.equal(model.dqtk_books.stored("all"), whole.dqtk_books.stored("all"))
    assert all(torch.equal(model.get_submodule(path).weight[:], whole.get_submodule(path).weight[:]) for path in placed)
    dqtk.save(model, tmp_path / "saved")
    loaded = load_module(original(), tmp_path / "saved")
    assert torch.equal(model(x), loaded(x))


def test_an_interruption_before_the_first_layer_leaves_no_books(monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_path, "replace_layer", stop)
    model = original()
    with pytest.raises(KeyboardInterrupt):
        dqtk.quantize(model, recipe(spec_of(ONE)), progress=False)
    assert books_of(model) is None
    monkeypatch.undo()
    dqtk.quantize(model, recipe(spec_of(ONE)), progress=False)  # the name of the group is free
    assert torch.equal(model(batch()), quantized(spec_of(ONE))(batch()))


def test_groups_of_one_model_are_apart_and_names_are_taken_once():
    model = original()
    some = dqtk.Recipe(name="some", rules=(dqtk.Rule(pattern="blocks.0.*", spec=spec_of(ONE), why="test"),))
    dqtk.quantize(model, some, progress=False)
    before, x = model.dqtk_books.stored("all").clone(), batch()
    with pytest.raises(
        ValueError, match=r"quantize: model:blocks\.1\.0 must share books under a new name, got 'all', which layers"
    ):
        dqtk.quantize(
            model, dqtk.Recipe(name="r", rules=(dqtk.Rule(pattern="blocks.1.*", spec=spec_of(ONE), why="t"),)), progress=False
        )
    other = spec_of(replace(TWO, group="other"))
    dqtk.quantize(model, dqtk.Recipe(name="r", rules=(dqtk.Rule(pattern="blocks.1.*", spec=other, why="t"),)), progress=False)
    assert model.dqtk_books.groups() == ("all", "other")
    assert torch.equal(model.dqtk_books.stored("all"), before)
    assert model(x).isfinite().all()
    forget_books(model)
    assert books_of(model) is None


def test_a_root_that_calls_its_children_in_turn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24)).requires_grad_(False)
    dqtk.quantize(model, dqtk.Recipe(name="r", rules=(dqtk.Rule(spec=spec_of(ONE), why="t"),)), progress=False)
    x = batch()
    assert torch.equal(model(x), model[2](model[1](model[0](x))))
    assert model[-1] is books_of(model)  # as its docstring says
    assert len(model) == 4
