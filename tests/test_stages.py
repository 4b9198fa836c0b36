"""Which layers are solved together, from whose inputs, in what order, and that memory limits change nothing."""

import copy
import dataclasses
import importlib

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate import Key, Stats
from dqtk.calibrate.gather import gather
from dqtk.calibrate.record import observe
from dqtk.calibrate.replay import Call
from dqtk.checkpoint import digest, quantized_layers
from dqtk.plan import Recipe, Rule
from dqtk.sites import repeated_block
from dqtk.spec import GPTQ, Dynamic, Int, LayerSpec, LowRank, PerChannel, PerGroup, PerTensor, PerToken, Smooth, TensorSpec

stages = importlib.import_module("dqtk.stages")

W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=8))
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
LEARNED = LayerSpec(weight=W4, input=A8, solver=GPTQ())
BRANCH = LayerSpec(weight=W4, input=A8, transforms=(Smooth(alpha=0.5),), low_rank=LowRank(rank=2))
PLAIN = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_out, self.to_v, self.to_k, self.to_q = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        weights = (self.to_q(x) @ self.to_k(x).transpose(1, 2) / 4).softmax(-1)
        return self.to_out(weights @ self.to_v(x))


class Block(nn.Module):
    """Defined in another order than it runs."""

    def __init__(self):
        super().__init__()
        self.fc2, self.fc1, self.attn = nn.Linear(32, 16), nn.Linear(16, 32), Attention()

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.fc2(self.fc1(x).relu())


class Model(nn.Module):
    """Three blocks, run from the last to the first; a layer before them and one that no call reaches."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.entrance, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = self.entrance(x)
        for block in reversed(self.blocks):
            x = block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False).eval()


@pytest.fixture
def stats():
    inputs = [torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(3)]
    return Stats(calls=[Call("model", (), {"x": x}, 0.5) for x in inputs])


def planned(model, *rules):
    found = [Rule(pattern=pattern, spec=spec, why="asked for") for pattern, spec in rules]
    return dqtk.plan(model, Recipe(name="r", rules=(*found,)))


@pytest.fixture
def watched(monkeypatch):
    """Lists that fill while ``quantize`` runs: paths of every gathering, and (weights, gram) of every solving."""
    gathered, solved = [], []
    gather, solve = stages.gather, stages.solve_site

    def see_gather(module, calls, sites, **options):
        gathered.append([site.path for site in sites])
        return gather(module, calls, sites, **options)

    def see_solve(weights, spec, inputs=None, **options):
        solved.append(([tuple(w.shape) for w in weights], None if inputs is None else inputs.gram.clone()))
        return solve(weights, spec, inputs, **options)

    monkeypatch.setattr(stages, "gather", see_gather)
    monkeypatch.setattr(stages, "solve_site", see_solve)
    return gathered, solved


def state(model):
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def quantize(model, plan, stats, **options):
    return dqtk.quantize(model, plan, stats, progress=False, **options)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_layers_that_share_input_and_spec_are_solved_together(model, stats, watched):
    quantize(model, planned(model, ("blocks.0.*", LEARNED)), stats)
    gathered, solved = watched
    assert len(gathered) == 1
    assert [len(shapes) for shapes, _ in solved] == [3, 1, 1, 1]  # q, k and v; out; up; down


def test_another_spec_is_another_group_of_the_same_inputs(model, stats, watched):
    other = dataclasses.replace(LEARNED, weight=dataclasses.replace(W4, format=Int(bits=3)))
    quantize(model, planned(model, ("*.to_q", other), ("blocks.0.attn.*", LEARNED)), stats)
    gathered, solved = watched
    assert len(gathered) == 1
    together = [gram for shapes, gram in solved if len(shapes) == 2]  # k and v of block 0
    assert len(together) == 1
    assert len(solved) == 3 + 1 + 1  # three q, k with v, out
    assert any(len(shapes) == 1 and torch.equal(gram, together[0]) for shapes, gram in solved)
    bits = {path: layer.spec.weight.bits for path, layer in quantized_layers(model).items()}
    assert {bits[f"blocks.{i}.attn.to_q"] for i in range(3)} == {3}
    assert bits["blocks.0.attn.to_v"] == 4


def test_layers_that_share_a_branch_have_one_down(model, stats):
    shared = dataclasses.replace(BRANCH, low_rank=LowRank(rank=2, shared=True))
    quantize(model, planned(model, ("blocks.1.attn.*", shared)), stats)
    q, k, v, out = (model.blocks[1].attn.get_submodule(f"to_{name}") for name in ("q", "k", "v", "out"))
    assert torch.equal(q.down, k.down)
    assert torch.equal(q.smooth, v.smooth)
    assert not torch.equal(q.down, out.down)
    assert q.down.data_ptr() != k.down.data_ptr()


def test_layers_that_learn_nothing_need_no_calls(model, watched):
    quantize(model, planned(model, ("blocks.*", PLAIN)), None)
    gathered, solved = watched
    assert not gathered
    assert all(len(shapes) == 1 and gram is None for shapes, gram in solved)
    assert len(solved) == 18


def test_learned_and_plain_layers_in_one_plan(model, stats, watched):
    plan = planned(model, ("blocks.*.fc?", LEARNED), ("*", PLAIN))
    for sequential in (False, True):
        mine = copy.deepcopy(model)
        quantize(mine, plan, stats, sequential=sequential)
        assert {path: layer.spec for path, layer in quantized_layers(mine).items()} == {c.site.path: c.spec for c in plan.choices}


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LEARNED, BRANCH], ids=["GPTQ", "branch"])
def test_a_memory_limit_changes_the_number_of_replays_only(spec, model, stats, watched):
    """One input at a time, two, or all at once: the same bits everywhere."""
    plan, gathered, results = planned(model, ("blocks.*", spec), ("entrance", spec)), watched[0], []
    for limit in (1, 3 * 8 * 16 * 16, 2**31):
        gathered.clear()
        mine = copy.deepcopy(model)
        quantize(mine, plan, stats, max_memory=limit)
        results.append((len(gathered), state(mine)))
        held = [{site.shared_input or site.id: site for site in map(plan_site(plan), paths)} for paths in gathered]
        assert all(sum(8 * site.k**2 for site in inputs.values()) <= limit or len(inputs) == 1 for inputs in held)
    counts = [count for count, _ in results]
    assert counts[0] == 3 * 4 + 1
    assert counts[0] > counts[1] > counts[2] == 1
    assert results[0][1] == results[1][1] == results[2][1]


def plan_site(plan):
    sites = {choice.site.path: choice.site for choice in plan.choices}
    return lambda path: sites[path]


def test_a_memory_limit_inside_a_block_changes_what_sequential_sees_at_most_there(model, stats, watched):
    plan, gathered = planned(model, ("blocks.*", LEARNED)), watched[0]
    quantize(model, plan, stats, sequential=True, max_memory=1)
    assert len(gathered) == 3 * 4
    assert len(quantized_layers(model)) == 18


# --- whose inputs ----------------------------------------------------------------------------------------------------


def block_of_paths(gathered):
    return [sorted({path.split(".")[1] for path in paths}) for paths in gathered]


def test_sequential_goes_block_by_block_in_the_order_of_the_call(model, stats, watched):
    quantize(model, planned(model, ("blocks.*", LEARNED)), stats, sequential=True)
    gathered, solved = watched
    assert block_of_paths(gathered) == [["2"], ["1"], ["0"]]
    assert [len(shapes) for shapes, _ in solved] == [3, 1, 1, 1] * 3
    assert [path.rpartition(".")[2] for path in gathered[0]] == ["to_q", "to_k", "to_v", "to_out", "fc1", "fc2"]


def test_sequential_sees_the_model_as_it_is_quantized_so_far(model, stats, watched):
    """Second moments of the second block, against the model whose first block was replaced by hand; all else original."""
    original, solved = copy.deepcopy(model), watched[1]
    plan = planned(model, ("blocks.*", LEARNED))
    quantize(model, plan, stats, sequential=True)
    half = copy.deepcopy(original)
    half.blocks[2] = copy.deepcopy(model.blocks[2])  # the block that runs first
    site = plan_site(plan)("blocks.1.attn.to_q")
    (expected,), (before,) = (gather(m, stats.calls, [site]).values() for m in (half, original))
    second = solved[4][1]
    assert torch.equal(second, expected.gram)
    assert not torch.equal(second, before.gram)


def test_otherwise_everything_sees_the_original(model, stats, watched):
    """Whatever has been solved before, in whatever stages."""
    original = copy.deepcopy(model)
    plan = planned(model, ("blocks.*", LEARNED))
    quantize(model, plan, stats, max_memory=1)
    found = gather(original, stats.calls, [choice.site for choice in plan.choices if choice.spec is not None])
    grams = [gram for _, gram in watched[1]]
    assert len(grams) == len(found) == 12
    for expected in found.values():
        assert any(torch.equal(expected.gram, gram) for gram in grams if gram.shape == expected.gram.shape)


def test_the_first_block_is_the_same_either_way(model, stats):
    """Nothing was quantized before it; what follows it differs."""
    plan = planned(model, ("blocks.*", LEARNED))
    one, two = (state(quantize(copy.deepcopy(model), plan, stats, sequential=sequential)) for sequential in (False, True))
    differ = {name.split(".")[1] for name in one if one[name] != two[name]}
    assert differ == {"0", "1"}


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("transformer_blocks.3.attn1.to_q", "transformer_blocks.3"),
        ("single_transformer_blocks.12.proj_mlp", "single_transformer_blocks.12"),
        ("down_blocks.1.attentions.0.transformer_blocks.2.ff.net.0.proj", "down_blocks.1.attentions.0.transformer_blocks.2"),
        ("down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0"),
        ("up_blocks.0.upsamplers.0.conv", "up_blocks.0"),
        ("mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.attentions.0.transformer_blocks.0"),
        ("mid_block.resnets.1.conv2", "mid_block"),
        ("blocks.7.ffn.net.2", "blocks.7"),
        ("layers.5.attention.to_q", "layers.5"),
        ("text_model.encoder.layers.2.self_attn.q_proj", "text_model.encoder.layers.2"),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1"),
        ("encoder.layer.4.output.dense", "encoder.layer.4"),
        ("time_embedding.linear_1", "time_embedding"),
        ("proj_out", "proj_out"),
    ],
)
def test_blocks_by_their_names(path, block):
    assert repeated_block(path) == block


# --- errors and interruptions ----------------------------------------------------------------------------------------


def test_a_layer_that_is_never_reached_stops_before_anything_changes(model, stats):
    before = state(model)
    for spec in (LEARNED, BRANCH):
        with pytest.raises(ValueError, match="calibrate: layer unused must be called while the pipeline runs"):
            quantize(model, planned(model, ("*", spec)), stats)
        assert state(model) == before
        assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("sequential", [False, True])
def test_calls_must_be_there_before_anything_changes(sequential, model):
    before = state(model)
    plan = planned(model, ("entrance", PLAIN), ("blocks.*", LEARNED))
    with pytest.raises(ValueError, match="calibrate: calls of model must have been kept, got none"):
        quantize(model, plan, Stats(), sequential=sequential)
    assert state(model) == before


def test_static_inputs_of_learned_layers(model, stats, watched):
    """A range that is read off comes from the statistics, one that is transformed or searched from the kept calls."""
    static = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
    spec = dataclasses.replace(LEARNED, input=static)
    plan = planned(model, ("blocks.0.fc1", spec), ("blocks.0.fc2", dataclasses.replace(spec, transforms=(Smooth(alpha=0.5),))))
    ranges = observe(torch.tensor([[-4.0, 47.0]]), "linear")
    for path in ("fc1", "fc2"):
        stats.add(Key(f"model:blocks.0.{path}", -1, "all"), ranges)
    quantize(model, plan, stats)
    assert float(model.blocks[0].fc1.input_scale) == pytest.approx(51 / 255)
    assert float(model.blocks[0].fc2.input_scale) != pytest.approx(51 / 255, rel=0.01)


@pytest.mark.parametrize("sequential", [False, True])
def test_what_interrupts_leaves_a_true_model(sequential, model, stats, monkeypatch):
    """Layers are whole: old or new; the model computes, and the rest can follow."""
    module = importlib.import_module("dqtk.quantize")
    install, done = module._install, []

    def interrupted(*args):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(args[1].path)
        install(*args)

    plan = planned(model, ("blocks.*", LEARNED))
    original = copy.deepcopy(model)
    monkeypatch.setattr(module, "_install", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, plan, stats, sequential=sequential)
    monkeypatch.undo()
    assert sorted(quantized_layers(model)) == sorted(done)
    assert not any(part._forward_pre_hooks for part in model.modules())
    x = stats.calls[0].kwargs["x"]
    assert (model(x) - original(x)).norm() < 0.2 * original(x).norm()
    for path, layer in original.named_modules():
        if isinstance(layer, nn.Linear) and path not in done:
            assert torch.equal(model.get_submodule(path).weight, layer.weight)
    rest = dataclasses.replace(plan, choices=tuple(c for c in plan.choices if c.spec is not None and c.site.path not in done))
    quantize(model, rest, stats, sequential=sequential)
    assert len(quantized_layers(model)) == 18


# --- text encoders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
def test_text_encoders_learn_too(sequential, load_tiny, watched):
    """CLIP's two and T5's: their own calls, layer by layer where asked for."""
    for name in ("sdxl", "pixart"):
        pipe = load_tiny(name)
        plan = dqtk.plan(
            pipe,
            Recipe(name="little", rules=(Rule(pattern="*blocks.0*attn1.to_q", spec=PLAIN, why="something"),)),
            text_encoders=Recipe(name="gptq", rules=(Rule(spec=LayerSpec(weight=W4, solver=GPTQ(sweeps=0)), why="all"),)),
        )
        stats = dqtk.calibrate(pipe, ["a red circle"], plan, call_kwargs={"num_inference_steps": 1}, progress=False)
        assert {c.component for c in stats.calls} == {n for n in dqtk.sites.components_of(pipe) if "text" in n}
        watched[0].clear()
        tokens = torch.arange(20)[None]
        before = pipe.text_encoder(tokens)[0]
        quantize(pipe, plan, stats, sequential=sequential)
        after = pipe.text_encoder(tokens)[0]
        assert 0 < (after - before).norm() < 0.25 * before.norm()
        encoders = 2 if name == "sdxl" else 1
        assert len(watched[0]) >= 3 * encoders if sequential else len(watched[0]) == encoders
