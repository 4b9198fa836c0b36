"""Layers that read one tensor round it once: the same numbers, one call, and an end where the host does not call as expected."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dqtk
from dqtk.bench.variants import data_free
from dqtk.checkpoint import replace_layer
from dqtk.kernels import linears_int8
from dqtk.sites import read_together
from dqtk.spec import LayerSpec, Smooth


class Attention(nn.Module):
    """Calls its projections as diffusers' processors do. ``context``: what k and v read; None for the input itself."""

    def __init__(self, width: int = 64, cross: bool = False):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, n, bias) for n, bias in ((48, True), (32, False), (16, True)))
        self.is_cross_attention = cross

    def forward(self, x, context=None):
        other = x if context is None else context
        return torch.cat([self.to_q(x), self.to_k(other), self.to_v(other)], dim=-1)


class Model(nn.Module):
    def __init__(self, cross: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"attn": Attention(cross=cross)})])

    def forward(self, x, context=None):
        return self.blocks[0]["attn"](x, context)


def attention_of(model: nn.Module) -> Attention:
    return model.blocks[0]["attn"]


def quantized(recipe="w8a8", cross: bool = False, spec: LayerSpec | None = None) -> tuple[nn.Module, nn.Module]:
    """A model whose layers share their input, and one whose layers each round it."""
    torch.manual_seed(0)
    model = Model(cross).eval()
    wanted = dqtk.plan(model, recipe)
    for choice in wanted.choices:
        made = data_free(model.get_submodule(choice.site.path), choice.spec if spec is None else spec)
        replace_layer(model, choice.site.path, made)
    alone = copy.deepcopy(model)
    for layer in (attention_of(alone).to_q, attention_of(alone).to_k, attention_of(alone).to_v):
        layer.shared = None
    return model, alone


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each shared call computed."""
    import dqtk.nn.shared_input as room

    seen: list[int] = []

    def counted(x, qweights, *others):
        seen.append(len(qweights))
        return linears_int8(x, qweights, *others)

    monkeypatch.setattr(room, "linears_int8", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
@torch.no_grad()
def test_same_numbers_in_one_call(recipe, dtype, calls):
    model, alone = (made.to(dtype) for made in quantized(recipe))
    for rows in (1, 2, 7):
        x = torch.randn(2, rows, 64, dtype=dtype)
        assert torch.equal(model(x), alone(x))
    assert calls == [3, 3, 3]
    assert attention_of(model).to_q.shared.waiting is None  # nothing is kept behind the last


@torch.no_grad()
def test_cross_attention_shares_what_k_and_v_read(calls):
    model, alone = quantized(cross=True)
    x, context = torch.randn(1, 5, 64), torch.randn(1, 3, 64)
    assert torch.equal(attention_of(model).to_k(context), attention_of(alone).to_k(context))
    assert torch.equal(attention_of(model).to_v(context), attention_of(alone).to_v(context))
    assert calls == [2]
    assert attention_of(model).to_q.shared is None
    assert torch.equal(attention_of(model).to_q(x), attention_of(alone).to_q(x))


@torch.no_grad()
def test_another_tensor_ends_it(calls):
    """Self-attention that is called with a context, as a reference-net does: right at once, and alone from then on."""
    model, alone = quantized()
    x, context = torch.randn(1, 5, 64), torch.randn(1, 5, 64)
    for _ in range(3):
        assert torch.equal(model(x, context), alone(x, context))
    assert torch.equal(model(x), alone(x))
    assert calls == [3]


@torch.no_grad()
def test_a_change_in_place_is_seen():
    model, alone = quantized()
    x = torch.randn(1, 5, 64)
    model_, alone_ = attention_of(model), attention_of(alone)
    assert torch.equal(model_.to_q(x), alone_.to_q(x))
    x.mul_(2)
    assert torch.equal(model_.to_k(x), alone_.to_k(x))


def test_inference_mode_and_training_compute_alone(calls):
    model, alone = quantized()
    with torch.inference_mode():
        x = torch.randn(1, 5, 64)
        assert torch.equal(model(x), alone(x))
    x = torch.randn(1, 5, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    assert calls == []


def smoothed_spec() -> LayerSpec:
    spec = dqtk.plan(Model(), "w8a8").choices[0].spec
    return LayerSpec(weight=spec.weight, input=spec.input, transforms=(Smooth(alpha=0.5),))


@torch.no_grad()
def test_the_same_smoothing_is_shared_another_is_not(calls):
    model, alone = quantized(spec=smoothed_spec())
    x = torch.randn(1, 5, 64)
    assert torch.equal(model(x), alone(x))
    assert calls == [3]
    for other in (model, alone):
        attention_of(other).to_k.smooth = attention_of(other).to_k.smooth * 3
    assert torch.equal(model(x), alone(x))
    assert calls == [3]


@torch.no_grad()
def test_compiles_whole_and_shares_what_was_shared_before():
    model, alone = quantized(spec=smoothed_spec())
    traced: list[int] = []

    def backend(graph, inputs):
        traced.append(sum("linears_int8" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(1, 5, 64)
    assert torch.equal(compiled(x), alone(x))
    assert traced == [0]
    assert torch.equal(model(x), alone(x))
    for _ in range(2):
        x = torch.randn(1, 5, 64)
        assert torch.equal(compiled(x), alone(x))
    assert traced == [0, 1]  # once more for what it knows now, and then no more
    assert attention_of(model).to_q.shared.waiting is None


@torch.no_grad()
def test_other_values_in_the_same_tensors_are_looked_at_again(calls):
    model, alone = quantized(spec=smoothed_spec())
    x = torch.randn(1, 5, 64)
    assert torch.equal(model(x), alone(x))
    state = alone.state_dict()
    state["blocks.0.attn.to_v.smooth"] = 2 * state["blocks.0.attn.to_v.smooth"]
    for other in (model, alone):
        other.load_state_dict(state)
    assert torch.equal(model(x), alone(x))
    assert calls == [3]


@torch.no_grad()
def test_a_pass_that_was_broken_off_ends_nothing(calls):
    model, alone = quantized()
    attention_of(model).to_q(torch.randn(1, 5, 64))
    for _ in range(2):
        x = torch.randn(1, 5, 64)
        assert torch.equal(model(x), alone(x))
    assert calls == [3, 3, 3]
    for _ in range(4):  # but a host that only ever calls one of them pays for it twice at most
        attention_of(model).to_q(torch.randn(1, 5, 64))
    assert calls == [3, 3, 3, 3, 3]


@torch.no_grad()
def test_copies_share_among_themselves(calls):
    model, alone = quantized()
    twin = copy.deepcopy(model)
    layers = (attention_of(twin).to_q, attention_of(twin).to_k, attention_of(twin).to_v)
    assert all(one is other for one, other in zip(attention_of(twin).to_q.shared.layers, layers, strict=True))
    x = torch.randn(1, 5, 64)
    assert torch.equal(twin(x), alone(x))
    assert calls == [3]
    single = copy.deepcopy(attention_of(model).to_q)
    assert single.shared is None
    again = pickle.loads(pickle.dumps(attention_of(model).to_q))
    assert again.shared is None
    assert torch.equal(single(x), again(x))


def test_replacing_a_layer_forms_the_group_anew():
    model, _ = quantized()
    layers = attention_of(model)
    replace_layer(model, "blocks.0.attn.to_k", layers.to_k.plain())
    assert [member is layer for member, layer in zip(layers.to_q.shared.layers, (layers.to_q, layers.to_v), strict=True)] == [
        True
    ] * 2
    replace_layer(model, "blocks.0.attn.to_v", layers.to_v.plain())
    assert layers.to_q.shared is None


def test_who_reads_together():
    model = Model()
    assert read_together(model, "blocks.0.attn.to_k") == ["to_q", "to_k", "to_v"]
    assert read_together(Model(cross=True), "blocks.0.attn.to_k") == ["to_k", "to_v"]
    assert read_together(Model(cross=True), "blocks.0.attn.to_q") == []


def test_op():
    weights = [torch.randint(-127, 128, (n, 24), dtype=torch.int8) for n in (8, 5)]
    scales = [torch.rand(n, 1) for n in (8, 5)]
    x = torch.randn(3, 24)
    torch.library.opcheck(linears_int8, (x, weights, scales, [None, None], [None, torch.randn(5)], None, None, 8, None))
    assert [y.shape for y in linears_int8(x[:0], weights, scales, [None, None], [None, None], None, None, 8)] == [(0, 8), (0, 5)]
