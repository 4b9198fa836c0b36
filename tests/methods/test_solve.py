"""From spec to the tensors of a layer: who is asked, in what order, and what comes out."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dqtk.calibrate.gather import gather
from dqtk.calibrate.replay import Call
from dqtk.kernels import to_matrix
from dqtk.methods.adaround import adaround
from dqtk.methods.format_search import concrete_input
from dqtk.methods.gptq import gptq
from dqtk.methods.rtn import rtn
from dqtk.methods.smooth import smoothing
from dqtk.methods.solve import _transformed, solve
from dqtk.nn import runtime_class
from dqtk.nn.basis import Basis, block_of
from dqtk.numerics.hadamard import pack_signs, random_signs, rotate
from dqtk.numerics.storage import layer_layout
from dqtk.sites import Site
from dqtk.spec import (
    GPTQ,
    MSE,
    AdaRound,
    BestFloat,
    Dynamic,
    E4M3Group,
    Float,
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
)

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
WFP8 = TensorSpec(format=Float(), granularity=PerChannel())


def static(low, high, form):
    """Stored scale and zero of a static input with this range."""
    weight = WFP8 if isinstance(form, Float) else W8
    spec = LayerSpec(weight=weight, input=TensorSpec(format=form, granularity=PerTensor()))
    (found,) = solve([torch.ones(2, 8)], spec, input_range=(torch.tensor([low]), torch.tensor([high])))
    return found.tensors["input_scale"], found.tensors.get("input_zero")


def test_solver_is_found_by_its_type():
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerChannel()))
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    (found,) = solve([w], spec)
    assert found.spec == spec
    assert found.bias_shift is None
    assert found.tensors.keys() == {"qweight", "scale"}
    assert torch.equal(found.tensors["qweight"], rtn(w, spec.weight).qweight)


def test_weights_that_share_an_input_are_stored_apart():
    weights = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 6)]
    spec = LayerSpec(weight=W8)
    for weight, found in zip(weights, solve(weights, spec), strict=True):
        assert torch.equal(found.tensors["qweight"], rtn(weight, W8).qweight)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (-2.0, 2.0), (0.0, 0.0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_range_fits_int8_and_represents_zero(low, high, symmetric):
    scale, zero = static(low, high, Int(bits=8, symmetric=symmetric))
    codes = (torch.tensor([low, 0.0, high]) / scale).round() + zero
    assert zero.dtype == torch.int32
    assert codes.min() >= -128
    assert codes.max() <= 127
    assert codes[1] == zero
    torch.testing.assert_close((codes - zero) * scale, torch.tensor([low, 0.0, high]), atol=float(scale), rtol=0)
    if symmetric:
        assert not zero.any()


def test_static_fp8_range_has_no_zero_point():
    scale, zero = static(-896.0, 10.0, Float())
    assert zero is None
    assert scale.tolist() == [2.0]


def test_a_static_unsigned_float_reaches_below_zero():
    scale, zero = static(-0.25, 7.75, Float(exponent=2, mantissa=2, signed=False))
    assert zero.dtype == torch.float32
    torch.testing.assert_close(-zero * scale, torch.tensor([-0.25]))


def test_specs_are_not_changed():
    spec = LayerSpec(weight=W8)
    before = dataclasses.replace(spec)
    solve([torch.ones(2, 8)], spec)
    assert spec == before


# --- transforms ------------------------------------------------------------------------------------------------------

W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8))
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
A4 = TensorSpec(format=Int(bits=4), granularity=PerToken(), range=Dynamic())
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
CHAINS = {
    "smooth": (Smooth(alpha=0.5),),
    "searched": (Smooth(),),
    "shift": (Smooth(alpha=0.8, power_of_two=True),),
    "rotated": (Hadamard(seed=3),),
    "rotated in blocks": (Hadamard(block=4, regular=True),),
    "smooth, rotated": (Smooth(alpha=0.5), Hadamard()),
    "rotated, smooth": (Hadamard(block=8), Smooth(alpha=0.5)),
}


def layer_of(plain, found):
    """The runtime layer of a solution, as ``quantize`` installs it."""
    new = runtime_class(plain).like(plain, found.spec)
    bias = plain.bias
    if bias is not None and found.bias_shift is not None:
        bias = bias + found.bias_shift
    new.fill(found.tensors, bias)
    return new.eval()


def linear(seeded, n=24, k=32, seed=1):
    layer = nn.Linear(k, n).requires_grad_(False)
    layer.weight.copy_(seeded(n, k, seed=seed))
    layer.bias.copy_(seeded(n, seed=seed + 1))
    return layer


def rows_of(seeded, k=32, num=300):
    """Channels of different sizes, and means that are not zero."""
    return (seeded(num, k) + seeded(k, seed=1)) * torch.exp2(1.5 * seeded(k, seed=2))


@pytest.mark.parametrize("chain", [name for name in CHAINS if name != "searched"])
@pytest.mark.parametrize("taps", [1, 6])
def test_transforms_keep_the_function(chain, taps, seeded, stats_of):
    """Step by step in float64: inputs and weights of the new basis multiply to what they did, and the layer finds back."""
    channels = 16
    sizes = torch.exp2(2 * seeded(channels, seed=2)).repeat(taps)
    weight, rows = seeded(5, taps * channels, seed=1).double(), (seeded(40, taps * channels) * sizes).double()
    inputs = dataclasses.replace(stats_of(rows), sample=rows, mean=rows.mean(0))
    spec, work, tensors = LayerSpec(weight=W8, transforms=CHAINS[chain]), [weight], {}
    for index, transform in enumerate(spec.transforms):
        work, inputs, found = _transformed(work, inputs, transform, spec, index, channels)
        tensors |= found
    assert not torch.allclose(work[0], weight, atol=0.01)
    torch.testing.assert_close(inputs.sample @ work[0].T, rows @ weight.T, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(inputs.gram, inputs.sample.T @ inputs.sample / 40, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(inputs.mean, inputs.sample.mean(0), rtol=1e-12, atol=1e-10)
    basis, smooth, signs = Basis.of(spec, channels), tensors.get("smooth"), tensors.get("signs")
    torch.testing.assert_close(basis.undo(work[0], smooth, signs), weight, rtol=1e-12, atol=1e-10)
    applied = basis.apply(rows.unflatten(1, (taps, channels)), smooth, signs).flatten(1)
    torch.testing.assert_close(applied, inputs.sample, rtol=1e-5, atol=1e-5)  # smoothing runs in float32


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("given", [None, A8], ids=["A16", "A8"])
def test_layers_of_eight_bits_compute_what_they_did(chain, given, seeded, stats_of):
    x, plain = rows_of(seeded), linear(seeded)
    spec = LayerSpec(weight=W8, input=given, transforms=CHAINS[chain])
    (found,) = solve([plain.weight], spec, stats_of(x))
    new = layer_of(plain, found)
    assert (new(x) - plain(x)).norm() < 0.03 * plain(x).norm()
    assert (new.dequantize() - plain.weight).norm() < 0.03 * plain.weight.norm()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.tensors.items()}
    assert shapes == layer_layout(found.spec, 24, 32, 32)


@pytest.mark.parametrize("chain", CHAINS)
def test_convolutions_too(chain, seeded, stats_of):
    plain, x = nn.Conv2d(8, 5, (3, 2), stride=(2, 1), padding=(1, 0)).requires_grad_(False), seeded(3, 8, 6, 7)
    plain.weight.copy_(seeded(5, 8, 3, 2, seed=1))
    padded = F.unfold(x, (3, 2), padding=(1, 0), stride=(2, 1))
    windows = padded.transpose(1, 2).reshape(-1, 8, 6).transpose(1, 2).flatten(1)
    spec = LayerSpec(weight=W8, transforms=CHAINS[chain])
    (found,) = solve([to_matrix(plain.weight)], spec, stats_of(windows), channels=8)
    new = layer_of(plain, found)
    assert (new(x) - plain(x)).norm() < 0.02 * plain(x).norm()
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in found.tensors.items()}
    assert shapes == layer_layout(found.spec, 5, 48, 8)


@pytest.mark.parametrize("order", ["smooth first", "rotation first"])
def test_transforms_act_in_the_order_given(order, seeded, stats_of):
    """By hand: the second sees weights and statistics that the first has changed."""
    x, weight = rows_of(seeded), seeded(6, 32, seed=5)
    signs, rotation = random_signs(32, 7), Hadamard(seed=7)
    chain = (Smooth(alpha=0.5), rotation) if order == "smooth first" else (rotation, Smooth(alpha=0.5))

    def turned(rows):
        return rotate(rows, signs, block_of(rotation, 32))

    def factor(w, rows):
        return smoothing([w], stats_of(rows), Smooth(alpha=0.5), 32, lambda m: 0.0)

    if order == "smooth first":
        m = factor(weight, x)
        stored = turned(weight / m)
    else:
        m = factor(turned(weight), turned(x))
        stored = turned(weight) / m
    (found,) = solve([weight], LayerSpec(weight=W4, transforms=chain), stats_of(x))
    torch.testing.assert_close(found.tensors["smooth"].float(), m)
    assert torch.equal(found.tensors["signs"], pack_signs(signs))
    torch.testing.assert_close(found.tensors["scale"], rtn(stored, W4).scale)


def test_rotations_alone_need_no_statistics(seeded):
    plain = linear(seeded)
    (found,) = solve([plain.weight], LayerSpec(weight=W8, input=A8, transforms=(Hadamard(),)))
    x = rows_of(seeded)
    assert (layer_of(plain, found)(x) - plain(x)).norm() < 0.02 * plain(x).norm()


# --- solvers and branch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [GPTQ(), AdaRound(iterations=30)], ids=["GPTQ", "AdaRound"])
def test_solvers_get_weight_and_statistics_of_the_new_basis(solver, seeded, stats_of):
    x, weight, inputs = rows_of(seeded), seeded(6, 32, seed=5), stats_of(rows_of(seeded))
    before = inputs.gram.clone()
    (found,) = solve([weight], LayerSpec(weight=W4, solver=solver, transforms=(Hadamard(),)), inputs)
    signs, block = random_signs(32, 0), block_of(Hadamard(), 32)
    moved = inputs.mapped(lambda rows: rotate(rows, signs, block))
    torch.testing.assert_close(moved.gram, stats_of(rotate(x, signs, block)).gram, rtol=1e-4, atol=1e-4)
    run = gptq if isinstance(solver, GPTQ) else adaround
    assert torch.equal(found.tensors["qweight"], run(rotate(weight, signs, block), W4, moved, solver).qweight)
    assert torch.equal(inputs.gram, before)


def test_gptq_of_several_weights_is_gptq_of_each(seeded, stats_of):
    inputs, weights = stats_of(rows_of(seeded)), [seeded(n, 32, seed=n) for n in (4, 6)]
    spec = LayerSpec(weight=W4, solver=GPTQ())
    for weight, found in zip(weights, solve(weights, spec, inputs), strict=True):
        assert torch.equal(found.tensors["qweight"], gptq(weight, W4, inputs, GPTQ()).qweight)


def test_bfloat16_weights_are_solved_in_float32(seeded, stats_of):
    inputs, weight = stats_of(rows_of(seeded)), seeded(6, 32, seed=5).bfloat16()
    spec = LayerSpec(
        weight=W4, input=A8, solver=GPTQ(), transforms=(Smooth(), Hadamard()), low_rank=LowRank(rank=2), correct_bias=True
    )
    half, full = (solve([w], spec, inputs)[0] for w in (weight, weight.float()))
    assert half.tensors.keys() == full.tensors.keys()
    assert all(torch.equal(tensor, full.tensors[name]) for name, tensor in half.tensors.items())
    assert torch.equal(half.bias_shift, full.bias_shift)


# --- bias ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, A4, STATIC], ids=["A16", "A4", "static"])
@pytest.mark.parametrize("more", [{}, {"low_rank": LowRank(rank=2)}, {"transforms": CHAINS["smooth, rotated"], "solver": GPTQ()}])
def test_a_corrected_bias_makes_the_mean_error_zero(given, more, seeded, stats_of):
    """Of every output over the sample; without it the means are off, as the inputs have means."""
    x, plain = rows_of(seeded), linear(seeded)
    ranges = {"input_range": (x.min().view(1), x.max().view(1))}
    means = []
    for correct in (False, True):
        spec = LayerSpec(weight=W4, input=given, correct_bias=correct, **more)
        (found,) = solve([plain.weight], spec, stats_of(x), **ranges)
        assert (found.bias_shift is not None) == correct
        means.append((layer_of(plain, found)(x).double() - plain(x).double()).mean(0).abs().max())
    assert means[1] < 1e-4 * x.abs().max()
    assert means[1] < 0.05 * means[0]


@pytest.mark.parametrize("chain", ["none", "smooth"])
def test_a_convolution_rounds_its_samples_whole(chain, seeded):
    """Each with its own scale, however small the window; the correction is of what the layer then does."""
    plain, t = nn.Conv2d(8, 5, 3, padding=1).requires_grad_(False), torch.tensor(1.0)
    x = (seeded(4, 8, 6, 7) + 0.5) * torch.tensor([1.0, 9.0, 0.2, 3.0]).view(4, 1, 1, 1)
    x[:, 3, 2, 2] *= 20  # one number sets the scale of a sample; most windows do not hold it
    module = nn.ModuleDict({"conv": plain})
    module.forward = lambda x, t: plain(x)
    site = Site(id="unet:conv", kind="conv", role="other", shape=tuple(plain.weight.shape), bias=True)
    (inputs,) = gather(module, [Call("unet", (), {"x": x, "t": t}, 0.5)], [site]).values()
    means = []
    for correct in (False, True):
        spec = LayerSpec(weight=W8, input=A4, correct_bias=correct, transforms=() if chain == "none" else CHAINS[chain])
        (found,) = solve([to_matrix(plain.weight)], spec, inputs, channels=8)
        means.append((layer_of(plain, found)(x).double() - plain(x).double()).mean((0, 2, 3)).abs().max())
    assert means[1] < 0.02 * means[0]
    by_windows = dataclasses.replace(inputs, ends=None)
    (found,) = solve([to_matrix(plain.weight)], spec, by_windows, channels=8)
    off = (layer_of(plain, found)(x).double() - plain(x).double()).mean((0, 2, 3)).abs().max()
    assert off > 10 * means[1]


# --- formats and inputs that are searched ----------------------------------------------------------------------------


def test_the_split_that_was_found_is_in_the_spec(seeded, stats_of):
    """One for all weights that share the input, in the basis in which they are stored."""
    flat = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    asked = LayerSpec(weight=TensorSpec(format=BestFloat(bits=4), granularity=PerGroup(size=8)))
    first, second = solve([flat, flat[:4]], asked)
    assert first.spec == second.spec
    assert first.spec.weight.format == Float(exponent=1, mantissa=2)
    assert torch.equal(first.tensors["qweight"], rtn(flat, first.spec.weight).qweight)
    peaked = dataclasses.replace(asked, transforms=(Smooth(alpha=1.0),), input=A8)
    (found,) = solve([flat], peaked, stats_of(seeded(50, 64) * torch.exp2(4 * seeded(64, seed=1))))
    assert isinstance(found.spec.weight.format, Float)
    assert isinstance(asked.weight.format, BestFloat)


@pytest.mark.parametrize("granularity", [PerGroup(size=8), E4M3Group(size=8), PerChannel()], ids=str)
def test_searched_splits_go_with_every_solver(granularity, seeded, stats_of):
    x, plain = rows_of(seeded), linear(seeded)
    for solver in (GPTQ(), AdaRound(iterations=20)):
        spec = LayerSpec(weight=TensorSpec(format=BestFloat(bits=5), granularity=granularity), solver=solver)
        (found,) = solve([plain.weight], spec, stats_of(x))
        assert found.spec.weight.format.bits == 5
        assert (layer_of(plain, found)(x) - plain(x)).norm() < 0.1 * plain(x).norm()


@pytest.mark.parametrize("chain", ["smooth", "rotated", "rotated, smooth"])
def test_a_static_range_is_that_of_the_transformed_input(chain, seeded, stats_of):
    """Whatever the recorded range of the input was."""
    x, plain = rows_of(seeded), linear(seeded)
    spec = LayerSpec(weight=W8, input=STATIC, transforms=CHAINS[chain])
    (found,) = solve([plain.weight], spec, stats_of(x), input_range=(torch.tensor([-1e6]), torch.tensor([1e6])))
    new = layer_of(plain, found)
    z = new.basis.apply(x, new.smooth, new.signs)
    torch.testing.assert_close(found.tensors["input_scale"] * 255, (z.max() - z.min()).view(1), rtol=1e-4, atol=0)
    assert found.tensors["input_zero"].dtype == torch.int32
    assert (new(x) - plain(x)).norm() < 0.05 * plain(x).norm()
    (without,) = solve([plain.weight], LayerSpec(weight=W8, input=STATIC), input_range=(x.min().view(1), x.max().view(1)))
    assert (new(x) - plain(x)).norm() < 0.7 * (layer_of(plain, without)(x) - plain(x)).norm()


@pytest.mark.parametrize("form", [BestFloat(bits=8), BestFloat(bits=8, signed=False), Float(exponent=3, mantissa=4, signed=False)])
@pytest.mark.parametrize("how", [MSE(), MSE(steps=8, least=0.2, most=1.2)], ids=["mse", "wider"])
def test_a_searched_static_input(form, how, seeded, stats_of):
    """What follows SiLU. Format, scale and zero are those of the search on the sample; the layer computes with them."""
    x, plain = F.silu(2 * seeded(300, 32)), linear(seeded)
    asked = TensorSpec(format=form, granularity=PerTensor(), range=how)
    (found,) = solve([plain.weight], LayerSpec(weight=W8, input=asked), stats_of(x))
    spec, scale, zero = concrete_input(x, asked)
    assert found.spec.input == spec
    assert isinstance(found.spec.input.format, Float)
    assert torch.equal(found.tensors["input_scale"], scale.view(1))
    if form.signed:
        assert "input_zero" not in found.tensors
    else:
        assert torch.equal(found.tensors["input_zero"], zero.view(1))
        assert found.tensors["input_zero"].dtype == torch.float32
    assert (layer_of(plain, found)(x) - plain(x)).norm() < 0.03 * plain(x).norm()


def test_a_plain_range_is_read_off_and_not_searched(seeded, stats_of):
    """GPTQ with a static input: the recorded range decides, of all calls and not of the sample alone."""
    x, weight = rows_of(seeded), seeded(6, 32, seed=5)
    spec = LayerSpec(weight=W4, input=STATIC, solver=GPTQ())
    (found,) = solve([weight], spec, stats_of(x), input_range=(torch.tensor([-10.0]), torch.tensor([41.0])))
    assert float(found.tensors["input_scale"]) == pytest.approx(51 / 255)
    assert int(found.tensors["input_zero"]) == round(10 * 255 / 51) - 128
