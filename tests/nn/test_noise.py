"""The interval of the call in progress: read from the call's own time, on every device, in copies, and inside compiled models."""

import copy

import pytest
import torch
from torch import nn

from dqtk.nn.noise import NoiseState, following, forget, noise_states


class Denoiser(nn.Module):
    """Scales its input by an entry of a table that the noise level chooses."""

    def __init__(self, edges=(200.0, 600.0)):
        super().__init__()
        self.inner = Inner(NoiseState(edges))
        self.inner.noise.attach(self)

    def forward(self, sample, timestep):
        return self.inner(sample) + 0 * timestep.reshape(-1)[0]


class Inner(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.noise = noise
        self.register_buffer("table", 10.0 ** torch.arange(noise.count))

    def forward(self, x):
        return x * self.table.index_select(0, self.noise.index(x.device))


X = torch.ones(3)


@pytest.mark.parametrize(("time", "expected"), [(-5.0, 1), (0, 1), (199.9, 1), (200.0, 10), (599, 10), (600, 100), (1e9, 100)])
@pytest.mark.parametrize("form", [lambda t: torch.tensor(t), lambda t: torch.tensor([t]), lambda t: torch.tensor([t] * 4)])
def test_the_interval_is_that_of_the_time(time, expected, form):
    model = Denoiser()
    assert model(X, form(time)).tolist() == [expected] * 3
    assert model(sample=X, timestep=form(time)).tolist() == [expected] * 3


def test_before_the_first_call_and_without_edges():
    state = NoiseState(())
    assert (state.count, state.index(torch.device("cpu")).tolist()) == (1, [0])
    assert Denoiser(())(X, torch.tensor(5.0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("edges", [(1.0, 1.0), (2.0, 1.0), (float("nan"),), (float("inf"),)])
def test_edges_that_make_no_sense(edges):
    with pytest.raises(ValueError, match="noise_levels: edges must be finite and ascending"):
        NoiseState(edges)


def test_times_that_differ_and_calls_without_time():
    model = Denoiser()
    with pytest.raises(ValueError, match=r"times must be equal within a call, got \[1.0, 700.0\]"):
        model(X, torch.tensor([1.0, 700.0]))
    with pytest.raises(ValueError, match="Denoiser must be called with a time, got none"):
        model(X, None)


def test_copies_follow_their_own_calls():
    """A copy's layers hold the copy's state; two models interleaved do not disturb each other."""
    model = Denoiser()
    other = copy.deepcopy(model)
    assert noise_states(other) == [other.inner.noise] != [model.inner.noise]
    model(X, torch.tensor(0))
    other(X, torch.tensor(900))
    assert model.inner(X).tolist() == [1, 1, 1]
    assert other.inner(X).tolist() == [100, 100, 100]
    assert noise_states(nn.Linear(1, 1)) == []


@pytest.mark.parametrize("region", ["whole", "inner"])
def test_compiled_once_for_all_levels(region):
    model = Denoiser()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model(X, torch.tensor([0.0]))
    if region == "whole":
        run = torch.compile(model, backend=backend, fullgraph=True)
    else:
        model.inner.compile(backend=backend, fullgraph=True)
        run = model
    assert run(X, torch.tensor([0.0]))[0].item() == 1
    compiled = len(graphs)  # the hook may be a graph of its own
    found = [run(X, torch.tensor([float(t)]))[0].item() for t in (300, 900, 250, 10)]
    assert found == [10, 100, 10, 1]
    assert len(graphs) == compiled


def test_inference_mode_and_gradients_in_turn():
    model = Denoiser()
    with torch.inference_mode():
        assert model(X, torch.tensor(300))[0].item() == 10
    assert model(X.clone().requires_grad_(), torch.tensor(900))[0].item() == 100


def test_one_state_per_set_of_edges():
    """Layers with the same edges share a state; a model that is told to forget has none, and its calls need no time."""
    model = nn.Linear(1, 1)
    first = following(model, (1.0, 2.0))
    assert following(model, [1, 2]) is first
    assert following(model, (1.0,)) is not first
    assert noise_states(model) == [first, following(model, (1.0,))]
    forget(model)
    assert noise_states(model) == []
    model(torch.ones(1, 1))


def test_a_device_that_is_asked_about_late_knows_the_interval():
    """As the second of two GPUs does in the first call: not 0, which would be the cleanest level."""
    state = NoiseState((500.0,))
    state.index(torch.device("cpu")).fill_(1)
    assert state.index(torch.device("meta")).shape == (1,)
    state._index[torch.device("cuda", 7)] = state._index.pop(torch.device("cpu"))  # a tensor that knows it
    assert state.index(torch.device("cpu")).tolist() == [1]
