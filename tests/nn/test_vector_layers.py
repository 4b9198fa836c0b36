"""Layers of vectors: what they compute, report, save and load; compiled, in bfloat16, in parts, with rounded inputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dqtk
from dqtk.checkpoint import load_module, quantized_layers
from dqtk.kernels import from_matrix, report_of, to_matrix, vectors
from dqtk.methods.solve import solve
from dqtk.nn import runtime_class
from dqtk.numerics.packing import Packed, dequantize
from dqtk.report.sizes import bytes_in_memory
from dqtk.spec import Dynamic, Hadamard, Int, LayerSpec, PerChannel, PerTensor, PerToken, TensorSpec, Trellis, VectorCodebook

ADDITIVE = TensorSpec(format=VectorCodebook(words=16, length=4, books=3), granularity=PerChannel())
RINGS = TensorSpec(format=Trellis(bits=3), granularity=PerChannel())
WIDE = TensorSpec(format=VectorCodebook(words=512, length=3), granularity=PerChannel())
SINGLE = TensorSpec(format=VectorCodebook(words=64, length=2), granularity=PerTensor())
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
LAYERS = {
    "linear": (lambda: nn.Linear(24, 7), (2, 5, 24)),
    "linear without bias": (lambda: nn.Linear(24, 7, bias=False), (24,)),
    "no rows": (lambda: nn.Linear(24, 7), (0, 24)),
    "conv1d": (lambda: nn.Conv1d(16, 5, 3, stride=2, padding=1), (2, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 8, 6, 7)),
    "conv3d": (lambda: nn.Conv3d(8, 5, (3, 1, 2), padding=(1, 0, 1), bias=False), (1, 8, 4, 5, 4)),
}


def build(name, spec, dtype=torch.float32):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)
    matrix = layer.weight if layer.weight.ndim == 2 else to_matrix(layer.weight)
    (found,) = solve([matrix], spec, channels=layer.weight.shape[1])
    new = runtime_class(layer).like(layer, spec)
    new.fill(found.tensors, layer.bias)
    return layer, new.eval(), x


def product(layer, x, matrix):
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, nn.Linear):
        return F.linear(x.double(), matrix.double(), bias)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
    weight = from_matrix(matrix.double(), layer.kernel_size)
    return conv(x.double(), weight, bias, layer.stride, layer.padding, layer.dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [ADDITIVE, SINGLE, RINGS, WIDE], ids=["additive", "single", "trellis", "wide"])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_plain_layer_of_the_decoded_weight(name, weight, dtype):
    layer, new, x = build(name, LayerSpec(weight=weight), dtype)
    stored = dequantize(Packed(qweight=new.qweight, scale=new.scale, codebook=new.codebook), weight, new.k)
    assert stored.shape == (new.n, new.k)
    y = new(x)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(y.double(), product(layer, x, stored.to(dtype)), rtol=tolerance, atol=tolerance)
    assert torch.equal(to_matrix(new.weight) if new.weight.ndim > 2 else new.weight[:], stored.to(dtype))
    torch.testing.assert_close(new.plain()(x), y, rtol=tolerance, atol=tolerance)
    op = "trellis_only" if weight is RINGS else "vectors_only"
    assert new.kernel() == f"{op}: {report_of(op, 'cpu')}"


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_groups_lie_along_the_channels_at_one_tap(name):
    """A layer whose weight is the same vector for all channels of a tap is stored without loss, whatever its taps do."""
    layer, _, _ = build(name, LayerSpec(weight=ADDITIVE))
    torch.manual_seed(1)
    taps = layer.weight[0, 0].numel()
    words = torch.randn(8, 4)
    pick = torch.randint(0, 8, (len(layer.weight), taps, layer.weight.shape[1] // 4))
    matrix = words[pick].flatten(1)
    spec = LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=4), granularity=PerTensor()))
    (found,) = solve([matrix], spec, channels=layer.weight.shape[1])
    stored = dequantize(Packed(**found.tensors), spec.weight, matrix.shape[1])
    torch.testing.assert_close(stored, matrix, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("weight", [ADDITIVE, RINGS], ids=["additive", "trellis"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_rounded_inputs_are_emulated_and_say_so(name, weight):
    _, new, x = build(name, LayerSpec(weight=weight, input=A8, transforms=(Hadamard(block=4),)))
    assert new.kernel() == "emulated: emulated in floating point"
    plain = new.plain()
    assert 0 < float((new(x) - plain(x)).norm() / plain(x).norm()) < 0.02


@pytest.mark.parametrize("weight", [ADDITIVE, RINGS], ids=["additive", "trellis"])
def test_one_graph_with_gradients(weight):
    _, new, x = build("linear", LayerSpec(weight=weight))
    new.bias.requires_grad_()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(a), F.linear(b, new.weight[:], new.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    grad, new.bias.grad = new.bias.grad, None
    expected.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, new.bias.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # opcheck's own doing
def test_ops_are_well_formed():
    _, new, x = build("linear", LayerSpec(weight=ADDITIVE))
    torch.library.opcheck(vectors.decode_vectors, (new.qweight, new.codebook, new.scale, 24, torch.bfloat16))
    torch.library.opcheck(vectors.linear_vectors, (x.requires_grad_(), new.qweight, new.bias, new.codebook, new.scale))


@pytest.fixture
def model(bare):
    rules = (
        dqtk.Rule(pattern="0", spec=LayerSpec(weight=ADDITIVE), why="test"),
        dqtk.Rule(pattern="2", spec=LayerSpec(weight=RINGS, transforms=(Hadamard(),)), why="test"),
        dqtk.Rule(spec=LayerSpec(weight=SINGLE, transforms=(Hadamard(),)), why="test"),
    )
    original = copy.deepcopy(bare)
    return original, dqtk.quantize(bare, dqtk.Recipe(name="vectors", rules=rules), progress=False)


def test_a_saved_model_is_the_same_to_the_bit_and_weighs_what_the_plan_said(model, tmp_path):
    original, quantized = model
    dqtk.save(quantized, tmp_path / "saved")
    loaded = load_module(copy.deepcopy(original), tmp_path / "saved")
    mine, theirs = quantized.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)
    x = torch.randn(3, 64)
    assert torch.equal(quantized(x), loaded(x))
    plan = dqtk.plan(original, dqtk.Recipe(name="vectors", rules=(dqtk.Rule(spec=LayerSpec(weight=ADDITIVE), why="test"),)))
    layer = quantized_layers(quantized)["0"]
    assert bytes_in_memory(layer) - layer.bias.nbytes == plan.choices[0].bytes_after


def test_books_keep_their_dtype_when_the_model_is_cast(model):
    _, quantized = model
    before = quantized[0].codebook.clone()
    quantized.to(torch.bfloat16)
    assert quantized[0].codebook.dtype == torch.float16
    assert torch.equal(quantized[0].codebook, before)
    assert quantized[0].scale.dtype == quantized[2].scale.dtype == torch.float32
    assert quantized(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
