"""Learning from whole runs: gradients of the final latents through guidance, scheduler and all steps, of the student alone."""

import copy
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_distill import Denoiser, calls, student, teacher
from torch import nn

import dqtk
from dqtk.calibrate.answers import exact_outputs
from dqtk.calibrate.stats import Stats
from dqtk.checkpoint import quantized_layers
from dqtk.refine import descent
from dqtk.refine.distill import distill
from dqtk.refine.judge import Painter
from dqtk.refine.trained import training
from dqtk.refine.whole_runs import Runs
from dqtk.resolve import call_kwargs_for
from dqtk.spec import Distill, FinalLatents, WholeRuns

TIMES = (950.0, 700.0, 400.0, 100.0)
PROMPTS = tuple("abcdefghijklmnop")
RATES = {"weight_rate": 0.002, "scale_rate": 0.005, "bias_rate": 0.001}
CHOICE = Distill(iterations=100, batch=2, runs=WholeRuns(prompts=PROMPTS), judge=FinalLatents(prompts=("x", "y", "z")), **RATES)


class Painting:
    """[1, 48, 32] from noise, text of a learned table, guidance 2, a step of Euler per time; the last by another expert if there is
    one."""

    def __init__(self, expert=None):
        torch.manual_seed(5)
        self.components = {"unet": teacher(), "text_encoder": nn.Embedding(128, 32)}
        self.components |= {} if expert is None else {"transformer_2": expert}
        self.scheduler = SimpleNamespace(config={"num_train_timesteps": 1000}, timesteps=torch.tensor(TIMES))

    @torch.no_grad()
    def __call__(self, prompt, generator, output_type, return_dict):
        text = self.components["text_encoder"](torch.tensor([ord(word) for word in prompt]))[:, None]
        x = torch.stack([torch.randn(48, 32, generator=draw) for draw in generator])
        for time in TIMES:
            part = self.components["transformer_2" if time == TIMES[-1] and "transformer_2" in self.components else "unet"]
            uncond, cond = part(torch.cat([x, x + text]), torch.tensor(time / 1000))[0].chunk(2)
            x = 0.8 * x + 0.3 * (uncond + 2 * (cond - uncond))
        return (x,)


def case(**expert):
    """A pipeline whose denoiser has become a student, its runs and its judge."""
    pipe = Painting(**expert)
    runs, painter = Runs(pipe, CHOICE.runs, None), Painter(pipe, CHOICE.judge, None)
    pipe.components["unet"] = student(pipe.components["unet"])
    return pipe, runs, painter


def gradients(pipe, runs, index=0):
    """Of everything that learns, by name, and the loss."""
    module = pipe.components["unet"]
    with training(quantized_layers(module), None, torch.Generator().manual_seed(0)) as trained:
        named = {f"{path}.{name}": p for path, mine in trained.items() for name, p in mine.parameters.items()}
        named |= {name: p.requires_grad_() for name, p in module.named_parameters()}
        loss = runs.loss(index, module)
        return float(loss.detach()), dict(
            zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True), strict=True)
        )


def test_the_loss_is_the_logarithm_of_the_final_latents_error():
    pipe, runs, _ = case()
    draw = torch.Generator().manual_seed(CHOICE.runs.seed + 2)
    exact, got = (
        Painting.__call__(p, ["c"], [copy.deepcopy(draw).set_state(draw.get_state())], "latent", False)[0].double()
        for p in (Painting(), pipe)
    )
    expected = ((got - exact).square().sum() / exact.square().sum()).log()
    with torch.no_grad():
        found = float(runs.loss(2, pipe.components["unet"]))
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert len(runs) == len(PROMPTS)
    assert runs.num_steps == len(TIMES)


def test_gradients_are_those_of_the_whole_run_by_finite_differences():
    """Of the bias of the second norm, which no rounding follows within a call: a run of a denoiser that is not quantized."""
    pipe = Painting()
    runs = Runs(pipe, CHOICE.runs, None)
    module = pipe.components["unet"]
    with torch.no_grad():
        module.layers[0].weight *= 1.2  # another model than the one that painted
    bias = module.norm.bias.requires_grad_()
    (grad,) = torch.autograd.grad(runs.loss(1, module), [bias])
    towards = grad / grad.norm()
    ends = []
    for size in (1e-2, -1e-2):
        with torch.no_grad():
            bias += size * towards
            ends.append(float(runs.loss(1, module)))
            bias -= size * towards
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(float(grad.norm()), rel=1e-2)


def test_computing_calls_again_changes_no_gradient():
    pipe, runs, _ = case()
    plain, again = (gradients(pipe, replace_choice(runs, recompute=recompute)) for recompute in (False, True))
    assert plain[0] == again[0]
    assert all(torch.equal(grad, again[1][name]) for name, grad in plain[1].items())
    assert any(grad.abs().sum() > 0 for name, grad in plain[1].items() if name.endswith("moved"))


def replace_choice(runs, **changes):
    found = copy.copy(runs)
    found.choice = replace(runs.choice, **changes)
    return found


def test_only_the_last_steps_learn_where_asked():
    pipe, runs, _ = case()
    loss, whole = gradients(pipe, runs)
    for last, alike in ((len(TIMES), True), (1, False), (2, False)):
        again, found = gradients(pipe, replace_choice(runs, last=last))
        assert again == loss
        assert all(torch.equal(grad, found[name]) for name, grad in whole.items()) == alike
    table = gradients(pipe, replace_choice(runs, last=1))[1]["table"]  # a row per time: TIMES fall into rows 2, 2, 1 and 0
    assert table[0].abs().sum() > 0
    assert table[1:].abs().sum() == 0


def test_weights_are_made_once_a_run_and_everything_is_left_as_it_was():
    pipe, runs, _ = case(expert=Denoiser())
    module, count = pipe.components["unet"], []
    text, expert = pipe.components["text_encoder"], pipe.components["transformer_2"]
    expert.requires_grad_(True)
    with training(quantized_layers(module), None, torch.Generator().manual_seed(0)) as trained:
        (first, *_) = trained.values()
        made = first.weight

        def counted():
            count.append(1)
            return made()

        vars(first.stored)["learned"] = counted
        runs.loss(0, module).backward()
        assert vars(first.stored)["learned"] is counted
    assert len(count) == 1
    assert first.parameters["moved"].grad is not None
    networks = (text, expert)
    assert all(p.requires_grad and p.grad is None for part in networks for p in part.parameters())
    assert not any("forward" in vars(part) for part in (module, *networks))


def test_whoever_had_replaced_a_forward_finds_it_again():
    pipe, runs, _ = case()
    module = pipe.components["unet"]
    hooked = module.forward
    module.forward = hooked
    with torch.no_grad():
        runs.loss(0, module)
    assert vars(module)["forward"] is hooked


def learned(choice=CHOICE, file=None, **expert):
    """A student that has learned from runs: (found, pipeline)."""
    pipe, runs, painter = case(**expert)
    given = calls(4)
    exact = exact_outputs({"unet": teacher()}, Stats(calls=given))["unet"]
    module = pipe.components["unet"]
    found = distill(module, given, exact, choice, painter=painter, runs=runs, name="unet", file=file, progress=False)
    return found, pipe


def test_pictures_of_prompts_that_it_has_not_seen_come_nearer():
    found, _ = learned()
    assert found.kept
    assert found.after < 0.95 * found.before


def test_an_expert_learns_around_the_other():
    found, _ = learned(expert=Denoiser().requires_grad_(False))
    assert found.after < found.before


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    short = replace(CHOICE, iterations=12)
    _, whole = learned(short)
    taken = descent.Descent._step

    def stops(self, loss_of):
        if self.done == 7:
            raise KeyboardInterrupt
        return taken(self, loss_of)

    with monkeypatch.context() as patch:
        patch.setattr(descent.Descent, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            learned(short, tmp_path / "state.safetensors")
    _, resumed = learned(short, tmp_path / "state.safetensors")
    pairs = zip(*(p.components["unet"].state_dict().values() for p in (whole, resumed)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_runs_need():
    with pytest.raises(ValueError, match="Distill: with runs, judge must be given, and guidance and influence left out"):
        Distill(runs=WholeRuns(prompts=("a",)))
    with pytest.raises(ValueError, match="Distill: with runs, judge must be given, and guidance and influence left out"):
        replace(CHOICE, guidance=2.0)
    with pytest.raises(ValueError, match="WholeRuns: prompts must be a tuple of at least one text, got"):
        WholeRuns(prompts=())
    with pytest.raises(ValueError, match="WholeRuns: last must be a positive integer, got 0"):
        WholeRuns(prompts=("a",), last=0)
    pipe, _, painter = case()
    given = calls(4)
    with pytest.raises(ValueError, match="refine: runs must be None where model stands in no pipeline"):
        distill(pipe.components["unet"], given, [torch.zeros(1)] * 12, CHOICE, painter=painter, progress=False)


def test_a_pipeline_that_hides_gradients_is_refused():
    class Closed(Painting):
        def __call__(self, prompt, generator, output_type, return_dict):
            with torch.no_grad():
                return super().__call__(prompt, generator, output_type, return_dict)

    pipe = Closed()
    runs = Runs(pipe, CHOICE.runs, None)
    pipe.components["unet"] = student(pipe.components["unet"])
    pipe.components["unet"].requires_grad_(True)
    with pytest.raises(ValueError, match="refine: runs must be None for Closed, whose final latents carry no gradient of Denoiser"):
        runs.loss(0, pipe.components["unet"])


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_families_can_be_differentiated(load_tiny, name):
    """Real pipelines, guidance and schedulers: what was learned is saved and painted."""
    pipe = load_tiny(name)
    choice = Distill(
        iterations=2,
        runs=WholeRuns(prompts=("a", "b"), last=1),
        judge=FinalLatents(prompts=("c",)),
    )
    kwargs = call_kwargs_for(pipe) | {"num_inference_steps": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two iterations may gain nothing
        plan = dqtk.plan(pipe, "w4a8-rtn")
        stats = dqtk.calibrate(pipe, ["a", "b"], plan, batch_size=1, keep_calls=True, call_kwargs=kwargs, progress=False)
        dqtk.quantize(pipe, plan, stats, refine=choice, call_kwargs=kwargs, progress=False)
    assert pipe("c", output_type="pt", generator=torch.Generator().manual_seed(0), **kwargs).images.isfinite().all()
