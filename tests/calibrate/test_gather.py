"""Second moments and samples against brute force in float64, of linears and convolutions, and what is refused."""

import copy
import dataclasses
import functools
import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dqtk
from dqtk.calibrate import Stats, calibrate
from dqtk.calibrate.gather import SAMPLE_ROWS, gather, gram_bytes, rows_of
from dqtk.calibrate.placement import Around
from dqtk.calibrate.replay import Call
from dqtk.checkpoint import digest, quantized_layers
from dqtk.plan import Recipe, Rule
from dqtk.sites import Site
from dqtk.spec import GPTQ, Dynamic, Int, LayerSpec, PerChannel, PerGroup, PerTensor, PerToken, Smooth, TensorSpec

PROMPTS = ["a red square", "a large blue circle", "two small green triangles"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """q, k and v read one tensor; ``other`` reads another."""

    def __init__(self, k=8):
        super().__init__()
        self.q, self.k, self.v, self.other = (nn.Linear(k, n) for n in (8, 8, 6, 4))

    def forward(self, x, t=None):
        return self.other((self.q(x) + self.k(x)).tanh())


def site(path, shared=None, component="transformer", shape=(8, 8), kind="linear"):
    return Site(id=f"{component}:{path}", kind=kind, role="other", shape=shape, bias=True, shared_input=shared)


def calls_of(*inputs, component="transformer", level=0.5):
    return [Call(component, (), {"x": x, "t": torch.tensor(1.0)}, level) for x in inputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_moments_of_a_linear(dtype):
    """The mean of x x^T over every row of every call, whatever the calls' sizes."""
    module = Attention().to(dtype)
    inputs = [seeded(2, 5, 8).to(dtype) * 3, seeded(1, 7, 8, seed=1).to(dtype) + 1]
    (found,) = gather(module, calls_of(*inputs), [site("q")]).values()
    rows = torch.cat([x.reshape(-1, 8) for x in inputs]).double()
    assert found.gram.dtype == torch.float64
    torch.testing.assert_close(found.gram, rows.T @ rows / 17, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.gram, found.gram.T)
    assert torch.equal(found.sample.double(), rows)
    assert found.count == 17


CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": (3, 2), "stride": (2, 1)},
    "padding": {"kernel_size": 3, "padding": (1, 2)},
    "dilation": {"kernel_size": (2, 3), "dilation": (2, 1), "padding": 1},
    "all": {"kernel_size": (3, 2), "stride": (2, 3), "padding": (2, 1), "dilation": (2, 1)},
    "one tap": {"kernel_size": 1},
}


@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_second_moments_of_a_convolution(options):
    """Windows as torch's own ``unfold`` cuts them, the channel innermost, zeros where the padding is."""
    conv, x = nn.Conv2d(5, 4, **options), seeded(3, 5, 9, 8)
    module = nn.ModuleDict({"conv": conv})
    module.forward = lambda x, t: conv(x)
    kernel = conv.kernel_size
    windows = F.unfold(x.double(), kernel, conv.dilation, conv.padding, conv.stride)
    rows = windows.transpose(1, 2).reshape(-1, 5, math.prod(kernel)).transpose(1, 2).flatten(1)
    (found,) = gather(module, calls_of(x), [site("conv", shape=tuple(conv.weight.shape), kind="conv")]).values()
    torch.testing.assert_close(found.gram, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sample.double(), rows)
    assert found.count == len(rows)
    ends = torch.cat([x.amin((2, 3)), x.amax((2, 3))], dim=1)
    assert torch.equal(found.ends, ends.repeat_interleave(len(rows) // 3, dim=0))
    assert torch.equal(found.scaled(torch.full((rows.shape[1],), 2.0)).ends, 2 * found.ends)
    assert found.mapped(lambda rows: rows).ends is None
    matrix = conv.weight.detach().movedim(1, -1).flatten(1)
    expected = conv(x).detach().movedim(1, -1).flatten(0, -2) - conv.bias
    torch.testing.assert_close(found.sample @ matrix.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("conv", "shape"), [(nn.Conv1d(4, 2, 3, padding=1), (2, 4, 7)), (nn.Conv3d(4, 2, 2), (2, 4, 3, 4, 3))])
def test_convolutions_of_other_dimensions(conv, shape):
    x = seeded(*shape)
    rows = rows_of(conv, x, 1000, torch.Generator().manual_seed(0))
    expected = conv(x).detach().movedim(1, -1).flatten(0, -2) - conv.bias
    torch.testing.assert_close(rows @ conv.weight.detach().movedim(1, -1).flatten(1).T, expected, rtol=1e-4, atol=1e-4)


def test_large_calls_are_thinned_evenly():
    """Both halves of guidance and all of the picture are among the rows that are taken; none twice."""
    linear, conv = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)
    x = torch.arange(6000.0).view(2, 3000, 1).expand(2, 3000, 4)
    taken = rows_of(linear, x, 100, torch.Generator().manual_seed(0))[:, 0]
    assert len(taken.unique()) == len(taken) == 100
    assert 30 < (taken < 3000).sum() < 70
    assert taken.histc(10, 0, 6000).min() >= 3
    maps = torch.arange(5000.0).view(2, 1, 50, 50).expand(2, 4, 50, 50)
    taken = rows_of(conv, maps, 100, torch.Generator().manual_seed(0))[:, 0]
    assert len(taken.unique()) == len(taken) == 100
    assert (taken < 2500).sum() == 50


@pytest.mark.parametrize(("num_calls", "batch", "tokens"), [(128, 8, 64), (64, 4, 75), (16, 2, 256)])
def test_the_sample_sees_all_tokens_of_the_grid(num_calls, batch, tokens):
    """No stride falls into step with the tokens: over many calls every position of the picture and every image is seen."""
    place = torch.arange(batch * tokens, dtype=torch.float32).view(batch, tokens, 1).expand(batch, tokens, 8).contiguous()
    (found,) = gather(Attention(), calls_of(*[place] * num_calls), [site("q")], max_rows=batch * tokens // 2).values()
    places = found.sample[:, 0].long()
    assert len(places.unique()) > 0.6 * min(len(places), batch * tokens)
    assert len((places % tokens).unique()) > 0.9 * tokens
    assert len((places // tokens).unique()) == batch


def test_the_ends_of_every_channel_are_seen():
    """Least and largest of all rows, also of those that were not taken; rows with the largest numbers are kept."""
    x = seeded(2, 900, 8)
    x[1, 333, 5], x[0, 7, 2] = 400.0, -300.0
    (found,) = gather(Attention(), calls_of(seeded(1, 50, 8), x), [site("q")], max_rows=20).values()
    every = torch.cat([seeded(1, 50, 8).reshape(-1, 8), x.reshape(-1, 8)])
    assert torch.equal(found.low, every.amin(0).clamp(max=0))
    assert torch.equal(found.high, every.amax(0).clamp(min=0))
    assert torch.equal(found.absmax, every.abs().amax(0))
    assert torch.equal(found.scaled(torch.full((8,), 0.5)).high, found.high / 2)


def test_numbers_of_rows_that_are_not_taken_must_be_finite_too():
    """They would reach smoothing through the ends of their channel."""
    x = seeded(1, 900, 8)
    x[0, 333, 5] = math.nan
    with pytest.raises(ValueError, match="inputs of transformer:q must be finite"):
        gather(Attention(), calls_of(x), [site("q")], max_rows=10)


def test_second_moments_are_made_only_where_they_are_asked_for():
    x = seeded(2, 50, 8)
    (found,) = gather(Attention(), calls_of(x), [site("q")], without_moments={"transformer:q"}).values()
    assert found.gram.shape == (0, 0)
    assert found.mapped(lambda rows: rows * 2).gram.shape == (0, 0)
    (full,) = gather(Attention(), calls_of(x), [site("q")]).values()
    assert torch.equal(found.sample, full.sample)
    assert torch.equal(found.mean, full.mean)


def test_squares_that_overflow_are_refused():
    """Finite numbers whose second moments are not: GPTQ would never end."""
    x = seeded(2, 5, 8)
    x[0, 0, 0], x[0, 1, 0] = 3e19, -3e19
    with pytest.raises(ValueError, match="got NaN, infinity or more than 1e17"):
        gather(Attention(), calls_of(x), [site("q")])


def test_every_call_counts_alike_and_the_sample_is_bounded():
    module = Attention()
    calls = calls_of(*(torch.full((1, 4000, 8), float(i)) for i in range(4)))
    (found,) = gather(module, calls, [site("q")], max_rows=50).values()
    torch.testing.assert_close(found.mean, torch.full((8,), 1.5))
    assert found.count == 200
    (found,) = gather(module, calls, [site("q")]).values()
    assert len(found.sample) <= SAMPLE_ROWS
    assert found.sample[:, 0].unique(return_counts=True)[1].tolist() == [len(found.sample) // 4] * 4


def test_shared_inputs_are_gathered_once(monkeypatch):
    module = Attention()
    found_module, seen = importlib.import_module("dqtk.calibrate.gather"), []
    replay = found_module.replay
    monkeypatch.setattr(found_module, "replay", lambda m, c, watched, w: (seen.append(sorted(watched)), replay(m, c, watched)))
    sites = [site("q", "transformer:qkv"), site("k", "transformer:qkv"), site("other")]
    found = gather(module, calls_of(seeded(2, 5, 8)), sites)
    assert seen == [["other", "q"]]
    assert found.keys() == {"transformer:qkv", "transformer:other"}


def test_only_calls_of_the_component_count():
    module, x = Attention(), seeded(2, 5, 8)
    calls = calls_of(x) + calls_of(seeded(2, 5, 8, seed=1), component="text_encoder", level=None)
    (found,) = gather(module, calls, [site("q")]).values()
    assert found.count == 10


def test_calls_without_rows_are_passed_over():
    """Empty inputs, of linears and of convolutions, as a pipeline without a prompt may make."""
    x = seeded(2, 5, 8)
    (found,) = gather(Attention(), calls_of(x[:0], x, x[:, :0]), [site("q")]).values()
    assert found.count == 10
    conv = nn.Conv2d(3, 2, 1)
    module = nn.ModuleDict({"conv": conv})
    module.forward = lambda x, t: conv(x)
    x = seeded(2, 3, 4, 4)
    (found,) = gather(module, calls_of(x[:0], x), [site("conv", shape=(2, 3, 1, 1), kind="conv")]).values()
    assert found.count == 32


def test_a_layer_with_empty_inputs_only():
    x = seeded(2, 0, 8)
    with pytest.raises(ValueError, match=r"calibrate: transformer:q must be given numbers to learn from, got empty inputs only"):
        gather(Attention(), calls_of(x, x), [site("q")])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("level", "words"), [(0.25, " at noise level 0.250"), (None, "")])
def test_numbers_that_are_none(value, level, words):
    """The message names layer and noise level; both signs of infinity do not cancel."""
    x = seeded(2, 5, 8)
    x[1, 2, 3], x[1, 3, 3] = value, -value
    match = rf"inputs of transformer:q must be finite, got NaN, infinity or more than 1e17{words}\. Calibrate in bfloat16"
    with pytest.raises(ValueError, match=match):
        gather(Attention(), calls_of(seeded(1, 2, 8)) + calls_of(x, level=level), [site("q")])


def test_a_layer_that_is_never_reached():
    with pytest.raises(ValueError, match="calibrate: layer v must be called while the pipeline runs, got no call of it"):
        gather(Attention(), calls_of(seeded(2, 5, 8)), [site("q"), site("v")])


def test_calls_must_have_been_kept():
    with pytest.raises(ValueError, match=r"calibrate: calls of transformer must have been kept, got none\. Calibrate with this"):
        gather(Attention(), calls_of(seeded(2, 5, 8), component="unet"), [site("q")])


def test_statistics_of_a_linear_function_of_the_input():
    module, matrix = Attention(), seeded(8, 8, seed=9)
    (found,) = gather(module, calls_of(seeded(2, 50, 8)), [site("q")]).values()
    moved = found.mapped(lambda x: x @ matrix.to(x.dtype))
    rows = found.sample.double() @ matrix.double()
    torch.testing.assert_close(moved.gram, rows.T @ rows / 100, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.sample.double(), rows, rtol=1e-5, atol=1e-5)
    assert moved.count == found.count


def test_memory_is_that_of_the_second_moments():
    conv = site("conv", shape=(2, 3, 3, 3), kind="conv")
    found = gather(Attention(), calls_of(seeded(2, 5, 8)), [site("q")])["transformer:q"].gram
    assert gram_bytes(site("q")) == found.numel() * found.element_size()
    assert gram_bytes(conv) == 8 * 27**2


# --- real pipelines --------------------------------------------------------------------------------------------------

LEARNED = LayerSpec(
    weight=TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32)),
    input=TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic()),
    solver=GPTQ(),
    transforms=(Smooth(alpha=0.5),),
)
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())


def planned(pixart, spec=LEARNED):
    """Two blocks of the transformer and a part of the text encoder."""
    first = Recipe(name="some", rules=(Rule(pattern="transformer_blocks.[01].*", spec=spec, why="learned"),))
    second = Recipe(name="some", rules=(Rule(pattern="encoder.block.0.*", spec=spec, why="learned"),))
    return dqtk.plan(pixart, first, text_encoders=second)


def run(pixart, plan, call_kwargs, **options):
    return calibrate(
        pixart, PROMPTS, plan, call_kwargs=call_kwargs, progress=False, batch_size=1, **({"steps_per_run": 2} | options)
    )


def facts(calls):
    return [(c.component, c.level, {name: digest(t) for name, t in c.kwargs.items() if isinstance(t, torch.Tensor)}) for c in calls]


@pytest.fixture(scope="module")
def learned(pixart, call_kwargs):
    return run(pixart, planned(pixart), call_kwargs)


def test_calls_that_a_plan_needs_are_kept(learned):
    """Of three steps two a run, with their noise level; text encoders whole. Nothing else is watched."""
    components = [c.component for c in learned.calls]
    assert components.count("transformer") == 2 * len(PROMPTS)
    assert components.count("text_encoder") == 2 * len(PROMPTS)  # both halves of guidance
    assert all((c.level is None) == (c.component == "text_encoder") for c in learned.calls)
    assert len({c.level for c in learned.calls if c.level is not None}) == 3  # runs take different steps
    assert not learned.inputs
    assert all(c.kwargs["hidden_states"].shape[0] == 2 for c in learned.calls if c.level is not None)


def test_kept_calls_compute_what_the_pipeline_saw(pixart, learned, call_kwargs):
    """Second moments of a layer, against hooks on the running pipeline, where every step is kept."""
    stats = run(pixart, planned(pixart), call_kwargs, steps_per_run=10)
    path, seen = "transformer_blocks.1.ff.net.2", []
    handle = pixart.transformer.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for i, prompt in enumerate(PROMPTS):
        pixart([prompt], generator=[torch.Generator().manual_seed(i)], output_type="latent", **call_kwargs)
    handle.remove()
    rows = torch.cat([x.flatten(0, -2) for x in seen]).double()
    chosen = next(c.site for c in planned(pixart).choices if c.site.path == path)
    (found,) = gather(pixart.transformer, stats.calls, [chosen]).values()
    torch.testing.assert_close(found.gram, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert found.count == len(rows)


def weights_of(pixart, plan, stats):
    pipe = copy.deepcopy(pixart)
    dqtk.quantize(pipe, plan, stats, progress=False)
    parts = (pipe.transformer, pipe.text_encoder)
    return [{path: digest(layer.qweight) for path, layer in quantized_layers(part).items()} for part in parts]


def test_interrupted_and_continued_equals_one_run(pixart, call_kwargs, learned, tmp_path, monkeypatch):
    """The same calls and the same codes, from memory, from the file, and after an interruption in the middle."""
    plan, output = planned(pixart), tmp_path / "stats.safetensors"
    original, done = type(pixart).__call__, []

    @functools.wraps(original)
    def interrupted(self, prompt, **kwargs):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(prompt)
        return original(self, prompt, **kwargs)

    monkeypatch.setattr(type(pixart), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pixart, plan, call_kwargs, output=output)
    monkeypatch.undo()
    assert Stats.load(output).num_prompts == 2
    continued = run(pixart, plan, call_kwargs, output=output)
    assert facts(continued.calls) == facts(learned.calls)
    assert facts(Stats.load(output).calls) == facts(learned.calls)
    expected = weights_of(pixart, plan, learned)
    assert all(expected)
    assert weights_of(pixart, plan, Stats.load(output)) == expected


@pytest.mark.parametrize("what", ["steps", "placement", "ranges only", "ranges too"])
def test_an_output_that_kept_something_else_is_refused(what, pixart, call_kwargs, learned, tmp_path):
    """The same sites and prompts, but other steps, or statistics of another kind."""
    learned.save(tmp_path / "s")
    spec, options = LEARNED, {}
    if what == "steps":
        options = {"steps_per_run": 3}
    elif what == "placement":
        options = {"placement": Around()}
    elif what == "ranges only":
        spec = LayerSpec(weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()), input=STATIC)
    else:
        spec = dataclasses.replace(LEARNED, input=STATIC, transforms=())
    with pytest.raises(ValueError, match=r"calibrate: sites of .*s must be those of this run .*remove it or choose another name"):
        run(pixart, planned(pixart, spec), call_kwargs, output=tmp_path / "s", **options)


def test_statistics_without_calls_are_refused_before_anything_changes(pixart, learned):
    """Also where only the second component lacks them."""
    pipe, plan = copy.deepcopy(pixart), planned(pixart)
    some = dataclasses.replace(learned, calls=[c for c in learned.calls if c.component == "transformer"])
    for sequential in (False, True):
        with pytest.raises(ValueError, match="calibrate: calls of text_encoder must have been kept, got none"):
            dqtk.quantize(pipe, plan, some, sequential=sequential, progress=False)
        assert not quantized_layers(pipe.transformer)


def test_wide_moments_are_whole():
    """Summed as a triangle, in stripes: symmetric, and those of float64."""
    module = Attention(1030)
    module.other = nn.Linear(8, 4)
    rows = [seeded(1, 40, 1030), seeded(1, 30, 1030)]
    (found,) = gather(module, calls_of(*rows), [site("q", shape=(8, 1030))]).values()
    x = torch.cat(rows, dim=1)[0].double()
    torch.testing.assert_close(found.gram, x.T @ x / 70, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.gram, found.gram.T)
