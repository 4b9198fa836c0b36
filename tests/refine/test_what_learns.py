"""Zero points, stored branches, a branch that decays, chosen layers: each learns, and the stored form stays as the plan has it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate.answers import exact_outputs
from dqtk.calibrate.replay import Call
from dqtk.calibrate.stats import Stats
from dqtk.checkpoint import quantized_layers
from dqtk.methods.solve import solve
from dqtk.quantize import runtime_layer
from dqtk.refine import distill as distill_module
from dqtk.refine.descent import call_at
from dqtk.refine.distill import distill, error_of
from dqtk.refine.left_over import left_over
from dqtk.refine.rank_decay import Branch
from dqtk.refine.refine import needs_originals
from dqtk.refine.selection import sensitivities
from dqtk.refine.team import ALONE
from dqtk.refine.trained import Trained
from dqtk.spec import (
    GPTQ,
    Distill,
    Dynamic,
    E4M3Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    MostSensitive,
    OfRoles,
    PerChannel,
    PerGroup,
    PerTensor,
    RankDecay,
    Reconstruct,
    ShortcutSplit,
    Smooth,
    TensorSpec,
    VectorCodebook,
)

W3 = TensorSpec(format=Int(bits=3), granularity=PerGroup(size=32))
W3_ZERO = TensorSpec(format=Int(bits=3, symmetric=False), granularity=PerGroup(size=32))
A4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32), range=Dynamic())
NOTHING = {"weight_rate": 0, "scale_rate": 0, "bias_rate": 0}


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.to_q, self.ff = nn.LayerNorm(32), nn.Linear(32, 32), FeedForward()

    def forward(self, sample, timestep):
        x = sample + self.to_q(self.norm(sample)) * timestep
        return x + self.ff(x)


class Denoiser(nn.Module):
    """[B, T, 32]."""

    def __init__(self):
        super().__init__()
        self.blocks, self.dtype = nn.ModuleList([Block()]), torch.float32

    def forward(self, sample, timestep):
        return (self.blocks[0](sample, timestep),)


def calls(runs=12, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [
        Call("model", (), {"sample": torch.randn(4, 6, 32, generator=draw), "timestep": torch.tensor(time)}, time, run)
        for run in range(runs)
        for time in (0.2, 0.9)
    ]


def case(spec):
    """A student, its calls, the original's answers, the layers that were replaced, the original."""
    torch.manual_seed(0)
    exact_model = Denoiser().requires_grad_(False)
    module = copy.deepcopy(exact_model)
    given = calls()
    plan = dqtk.plan(module, dqtk.Recipe(name="r", rules=(dqtk.Rule(spec=spec, why="test"),)))
    originals = {choice.site.path: module.get_submodule(choice.site.path) for choice in plan.choices}
    dqtk.quantize(module, plan, Stats(calls=given) if plan.needs_stats else None, progress=False)
    return module, given, exact_outputs({"model": exact_model}, Stats(calls=given))["model"], originals


def changed_by(module, *args, **kwargs):
    """What ``distill`` found, and the names of the tensors that it changed."""
    before = copy.deepcopy(module.state_dict())
    found = distill(module, *args, progress=False, **kwargs)
    after = module.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {name: (t.shape, t.dtype) for name, t in after.items()}
    assert not any("learned" in name for layer in quantized_layers(module).values() for name in vars(layer))
    return found, {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}


def judged(module, given, exact):
    """Error on the runs that ``distill`` holds out of twelve."""
    with torch.no_grad():
        pairs = [(module(**call.kwargs)[0], y) for call, y in zip(given, exact, strict=True) if call.run in (3, 11)]
    return sum(float(error_of(got, y)) for got, y in pairs) / len(pairs)


@pytest.mark.parametrize("rank", [None, 1])
def test_zero_points_learn_alone(rank):
    module, given, exact, _ = case(LayerSpec(weight=W3_ZERO))
    layer = module.blocks[0].ff.fc1
    layer.zero = (layer.zero + 1).clamp(max=7)  # a step wrong: that can be learned
    choice = Distill(iterations=60, rank=rank, zero_rate=0.1, **NOTHING)
    found, changed = changed_by(module, given, exact, choice)
    assert found.after < 0.8 * found.before
    assert "blocks.0.ff.fc1.zero" in changed
    assert all(name.endswith(".zero") for name in changed)
    assert judged(module, given, exact) == pytest.approx(found.after, rel=1e-4)


def test_an_adapter_of_zero_points_sees_sums_of_groups():
    """QA-LoRA's: up @ down of the sums of the input's groups, on top of the layer."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 24, bias=False)
    (solution,) = solve([linear.weight.detach()], LayerSpec(weight=W3_ZERO))
    layer = runtime_layer(linear, solution)
    mine = Trained(layer, layer, 0, 1, torch.Generator().manual_seed(0))
    before, x = mine.weight().detach(), torch.randn(5, 64)
    down, up = mine.zeros.parameters["zero_down"], mine.zeros.parameters["zero_up"]
    with torch.no_grad():
        up.fill_(1)
        down.copy_(torch.tensor([[1.0, -2.0]]))  # whole steps; 24 rows of both groups stay within 0 .. 7
    zero = (layer.zero.float() + torch.tensor([[1.0, -2.0]])).clamp(0, 7) - layer.zero.float()
    sums = x.view(5, 2, 32).sum(2)
    assert torch.allclose(x @ mine.weight().T - x @ before.T, -sums @ (zero * layer.scale.float()).T, atol=1e-4)


def test_a_stored_branch_learns_and_is_stored_as_it_learned():
    spec = LayerSpec(weight=W3, input=A4, solver=GPTQ(), low_rank=LowRank(rank=2))
    module, given, exact, _ = case(spec)
    found, changed = changed_by(module, given, exact, Distill(iterations=60, branch_rate=0.01, **NOTHING))
    assert found.after < 0.95 * found.before
    assert {name.rpartition(".")[2] for name in changed} == {"down", "up"}
    assert judged(module, given, exact) == pytest.approx(found.after, rel=1e-4)
    again, changed = changed_by(module, given, exact, Distill(iterations=60, weight_rate=0.04))
    assert "blocks.0.ff.fc1.qweight" in changed
    assert not any(name.endswith((".down", ".up")) for name in changed)
    assert judged(module, given, exact) == pytest.approx(again.after if again.kept else again.before, rel=1e-4)


# --- a branch that decays --------------------------------------------------------------------------------------------


def decayed(*, iterations=80, **kwargs):
    module, given, exact, originals = case(LayerSpec(weight=W3, input=A4, transforms=(Hadamard(),)))
    choice = Distill(iterations=iterations, decay=RankDecay(rank=8))
    return module, changed_by(module, given, exact, choice, originals=originals, **kwargs), (given, exact)


def test_a_branch_helps_and_is_gone():
    module, (found, changed), about = decayed()
    assert found.after < 0.8 * found.before
    assert "blocks.0.ff.fc1.qweight" in changed
    assert all(layer.down is None and layer.spec.low_rank is None for layer in quantized_layers(module).values())
    assert judged(module, *about) == pytest.approx(found.after, rel=1e-4)


def test_a_decaying_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, _, _ = decayed()
    with monkeypatch.context() as patch:

        def stopping(turn, num, seed):
            if turn == 63:
                raise KeyboardInterrupt
            return call_at(turn, num, seed)

        patch.setattr(distill_module, "call_at", stopping)
        with pytest.raises(KeyboardInterrupt):
            decayed(file=tmp_path / "state.safetensors")
    again, _, _ = decayed(file=tmp_path / "state.safetensors")
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in again.state_dict().items())


def test_ranks_halve_and_what_is_kept_stays():
    target = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    branch = Branch(target, 32, 100)
    assert branch.levels() is None
    assert (branch.ranks, branch.starts) == ([9, 4, 2, 1, 0], [0, 22, 45, 68, 90])
    assert branch.begin(0) == []
    assert torch.allclose(branch.levels(), target, atol=1e-5)  # of full rank nothing is left out
    assert branch.begin(11) == []
    assert branch.gate.tolist() == [1] * 4 + [0.5] * 5
    left, values, right = torch.linalg.svd(target)
    branch.begin(21)
    assert len(branch.begin(22)) == 2  # put anew: the best approximation of rank 4, of which two directions fade
    assert torch.allclose(branch.levels(), (left[:, :4] * values[:4]) @ right[:4], atol=1e-4)
    for iteration in range(23, 90):
        branch.begin(iteration)
    assert 0 < float(branch.levels().detach().norm()) < float(values[0])
    assert branch.begin(90) == []
    assert branch.levels() is None


@pytest.mark.parametrize("transforms", [(), (Hadamard(),), (ShortcutSplit(at=(32,)),)])
def test_a_branch_of_full_rank_is_the_original(transforms):
    torch.manual_seed(0)
    linear = nn.Linear(96, 24)
    (solution,) = solve([linear.weight.detach()], LayerSpec(weight=W3_ZERO, transforms=transforms))
    layer = runtime_layer(linear, solution)
    parts = [Trained(layer, stored, i, None, torch.Generator(), "here") for i, stored in enumerate(layer.parts or (layer,))]
    for mine in parts:
        mine.branch = Branch.of(mine, {"here": linear}, RankDecay(rank=96), 10)
        mine.branch.begin(0)
    back = [mine.stored.basis.undo(mine.weight(), None, mine.stored.signs) for mine in parts]
    assert torch.allclose(torch.cat(back, dim=1), linear.weight, atol=1e-5)


def test_convolutions_have_one_too():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 8, 3)
    matrix = conv.weight.detach().movedim(1, -1).flatten(1)
    spec = LayerSpec(weight=TensorSpec(format=Int(bits=4), granularity=PerChannel()), transforms=(Smooth(alpha=0.5),))
    from dqtk.calibrate.gather import Inputs  # only here: what smoothing asks for

    rows = torch.randn(50, 288)
    inputs = Inputs(
        gram=rows.T @ rows, mean=rows.mean(0), sample=rows, low=rows.amin(0), high=rows.amax(0), peaks=rows[:1], count=50
    )
    (solution,) = solve([matrix], spec, inputs, channels=32)
    layer = runtime_layer(conv, solution)
    mine = Trained(layer, layer, 0, None, torch.Generator(), "conv")
    mine.branch = Branch.of(mine, {"conv": conv}, RankDecay(rank=8), 10)
    mine.branch.begin(0)
    assert torch.allclose(layer.basis.undo(mine.weight(), layer.smooth, None), matrix, atol=1e-5)


@pytest.mark.parametrize("weight", [W3, W3_ZERO, TensorSpec(format=Float(exponent=2, mantissa=1), granularity=E4M3Group())])
def test_codes_start_where_the_exact_weight_lies(weight):
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    (solution,) = solve([linear.weight.detach()], LayerSpec(weight=weight, transforms=(Hadamard(),)))
    layer = runtime_layer(linear, solution)
    mine = Trained(layer, layer, 0, None, torch.Generator())
    layer.qweight = layer.qweight.roll(1, dims=0)  # as if a solver had chosen others: some exact weights lie far away
    other = Trained(layer, layer, 0, None, torch.Generator())
    for trained, least in ((mine, 0.95), (other, 0.05)):
        before = trained.weight().detach()
        trained.begin_at(linear)
        assert torch.equal(trained.weight(), before)  # no code has changed
        exact = (trained.code + left_over(trained, linear) - trained.start).abs() < 1e-5
        assert least <= float(exact.float().mean()) <= 1
        assert float((trained.start != trained.code).float().mean()) > 0.9


def test_only_what_looks_at_the_originals_needs_them():
    assert [
        needs_originals(choice)
        for choice in (None, Distill(), Distill(exact_start=True), Distill(decay=RankDecay()), Reconstruct())
    ] == [
        False,
        False,
        True,
        True,
        True,
    ]


# --- which layers ----------------------------------------------------------------------------------------------------


def test_layers_of_a_role():
    module, given, exact, _ = case(LayerSpec(weight=W3, input=A4))
    choice = Distill(iterations=40, weight_rate=0.1, bias_rate=0, layers=OfRoles(roles=("ff.down",)))
    _, changed = changed_by(module, given, exact, choice)
    assert changed == {"blocks.0.ff.fc2.qweight", "blocks.0.ff.fc2.scale"}
    with pytest.raises(
        ValueError, match=r"refine: OfRoles must name roles .* of model \(.*ff.down.*\), got 'ff.dwn'. Did you mean"
    ):
        distill(module, given, exact, replace(choice, layers=OfRoles(roles=("ff.dwn",))), progress=False)


def test_the_most_sensitive_layers():
    module, given, exact, _ = case(LayerSpec(weight=W3, input=A4))
    layers = quantized_layers(module)
    quiet, said = given[::2], exact[::2]
    for call in quiet:
        call.kwargs["timestep"].fill_(1e-3)  # what to_q says hardly counts

    def loss(turn):
        return error_of(module(**quiet[turn].kwargs)[0], said[turn])

    found = sensitivities(layers, loss, 4, ALONE)
    assert found["blocks.0.to_q"] < 1e-2 * min(found["blocks.0.ff.fc1"], found["blocks.0.ff.fc2"])
    assert not any(parameter.grad is not None for parameter in module.parameters())
    choice = Distill(iterations=40, weight_rate=0.1, bias_rate=0, layers=MostSensitive(share=0.1, calls=4))
    _, changed = changed_by(module, quiet, said, choice)
    assert len({name.rpartition(".")[0] for name in changed} - {"blocks.0.to_q"}) == 1  # over a tenth, but at least one layer
    assert "blocks.0.to_q.qweight" not in changed


def test_vectors_have_no_sensitivity_per_step():
    module, _, _, _ = case(LayerSpec(weight=TensorSpec(format=VectorCodebook(words=16, length=2), granularity=PerTensor())))
    with pytest.raises(ValueError, match=r"MostSensitive must be asked of layers whose weights are numbers.*got vectors at blocks"):
        sensitivities(quantized_layers(module), lambda turn: torch.zeros(()), 1, ALONE)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: OfRoles(roles=()), "OfRoles: roles must name at least one role, got none"),
        (lambda: MostSensitive(share=0), "MostSensitive: share must be above 0 and at most 1, got 0"),
        (lambda: MostSensitive(calls=0), "MostSensitive: calls must be a positive integer, got 0"),
        (lambda: RankDecay(rank=0), "RankDecay: rank must be a positive integer, got 0"),
        (lambda: RankDecay(rate=-1), "RankDecay: rate must be from 0 to 1, got -1"),
        (lambda: Distill(zero_rate=1), "Distill: zero_rate must be from 0 to 1, got 1"),
        (lambda: Distill(batch=0), "Distill: batch must be a positive integer, got 0"),
        (lambda: Distill(guidance=float("nan")), "Distill: guidance must be a number or None, got nan"),
        (lambda: Distill(influence=(0.0, 0.0)), r"Distill: influence must be numbers from 0 up, not all 0, got \(0.0, 0.0\)"),
    ],
)
def test_wrong_choices(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
