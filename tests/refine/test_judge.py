"""A judge on pictures: what the pipeline paints decides whether a student is kept."""

import math
import threading

import pytest
import torch
from test_distill import BRIEF, case
from test_objective import Sampler
from test_together import Threads
from torch import nn

from dqtk.refine.distill import distill
from dqtk.refine.judge import Painter
from dqtk.spec import Distill, FinalLatents

PROMPTS = FinalLatents(prompts=("a", "b", "c"), seed=4)


class Noisy(Sampler):
    """Latents that depend on the prompt and on its noise; what the denoiser adds is scaled."""

    scale = 1.0

    def __call__(self, prompt, generator, output_type, return_dict):
        (steps,) = super().__call__(prompt, generator, output_type, return_dict)
        noise = torch.stack([torch.randn(4, 8, 8, generator=draw) for draw in generator])
        return (self.scale * steps / 100 + noise * torch.tensor([float(ord(text)) for text in prompt])[:, None, None, None],)


def expected(pipe, scales):
    """In float64: the geometric mean of each prompt's share."""
    shares = []
    for index, text in enumerate(PROMPTS.prompts):
        first, second = (torch.Generator().manual_seed(PROMPTS.seed + index) for _ in range(2))
        pipe.scale = scales[0]
        exact = pipe([text], [first], "latent", False)[0].double()
        pipe.scale = scales[1]
        shares.append(float((pipe([text], [second], "latent", False)[0].double() - exact).square().sum() / exact.square().sum()))
    return math.exp(sum(math.log(share) for share in shares) / len(shares))


def test_the_error_is_the_geometric_mean_of_shares():
    pipe = Noisy()
    painter = Painter(pipe, PROMPTS, None)
    assert painter.error() == pytest.approx(1e-12)  # nothing has changed
    pipe.scale = 1.2
    assert painter.error() == pytest.approx(expected(Noisy(), (1.0, 1.2)), rel=1e-4)


def test_processes_share_the_prompts_and_agree():
    team, found = Threads(), {}

    def run(rank):
        team.me.rank = rank
        pipe = Noisy()
        painter = Painter(pipe, PROMPTS, None, team)
        pipe.scale = 0.7
        found[rank] = (len(painter.exact), painter.error())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [num for num, _ in (found[0], found[1])] == [2, 1]
    assert found[0][1] == found[1][1] == pytest.approx(expected(Noisy(), (1.0, 0.7)), rel=1e-4)


class Opinion:
    """A painter whose errors are given."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def error(self):
        return self.errors.pop(0)


def test_pictures_decide_and_not_calls():
    """The same lesson, which lowers the error of held-out calls, kept and not kept."""
    choice = Distill(iterations=60, judge=PROMPTS)
    module, given, exact, _ = case(runs=12)
    start = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert distill(module, given, exact, BRIEF, progress=False).kept
    module, given, exact, _ = case(runs=12)
    with pytest.warns(UserWarning, match=r"distillation of model lowers no error of final latents \(2.000e-01 -> 3.000e-01\)"):
        assert not distill(module, given, exact, choice, painter=Opinion(0.2, 0.3), progress=False).kept
    assert all(torch.equal(tensor, start[name]) for name, tensor in module.state_dict().items())
    assert distill(module, given, exact, choice, painter=Opinion(0.3, 0.2), progress=False).kept
    assert not all(torch.equal(tensor, start[name]) for name, tensor in module.state_dict().items())


def test_what_a_judge_needs():
    module, given, exact, _ = case(runs=2)
    with pytest.raises(ValueError, match="refine: judge must be None where model stands in no pipeline, got FinalLatents"):
        distill(module, given, exact, Distill(judge=PROMPTS), progress=False)
    with pytest.raises(
        ValueError, match=r"refine: judge must be None for a bare denoiser, which paints nothing, got one .* Linear"
    ):
        Painter(nn.Linear(2, 2), PROMPTS, None)
    for prompts in ((), (3,)):
        with pytest.raises(ValueError, match="FinalLatents: prompts must be a tuple of at least one text, got"):
            FinalLatents(prompts=prompts)
