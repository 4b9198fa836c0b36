"""Output correction: it undoes an affine error, is refused where unseen calls do not confirm it, and is saved with the model."""

import copy

import pytest
import torch
from torch import nn

import dqtk
from dqtk.calibrate.answers import exact_outputs, outputs
from dqtk.calibrate.replay import Call
from dqtk.calibrate.stats import Stats
from dqtk.correct.output import channel_dim, check_correctable, correct_output, edges_between, fit
from dqtk.nn.correction import OutputCorrection, correction_of, output_of, remove_correction
from dqtk.nn.noise import noise_states
from dqtk.resolve import call_kwargs_for

PROMPTS = ["a large red circle on a plain blue background", "two small green squares", "a yellow digit 7", "three blue triangles"]


class Denoiser(nn.Module):
    """[B, 4, H, W]: the sample, and an error that depends on the time."""

    def __init__(self, error=lambda y, t: y):
        super().__init__()
        self.scale, self.error = nn.Parameter(torch.ones(1), requires_grad=False), error

    def forward(self, sample, timestep, return_dict=False):
        y = self.error(sample * self.scale, timestep)
        return (y, "more") if not return_dict else y


def calls(runs=4, times=(100.0, 500.0, 900.0)):
    draw = torch.Generator().manual_seed(0)
    found = [(run, time) for run in range(runs) for time in times]
    return [
        Call("unet", (), {"sample": torch.randn(2, 4, 5, 5, generator=draw), "timestep": torch.tensor(time)}, 0.5, run)
        for run, time in found
    ]


def corrected(error, **how):
    stats = Stats(calls=calls(**how))
    exact = exact_outputs({"unet": Denoiser()}, stats)["unet"]
    module = Denoiser(error)
    return module, correct_output(module, stats, "unet", exact), stats, exact


def error_of(module, stats, exact):
    return sum(float((a - b).square().sum()) for a, b in zip(outputs(module, stats.calls), exact, strict=True))


def test_an_affine_error_per_level_and_channel_is_undone():
    shift = torch.tensor([0.5, -0.5, 0, 2]).view(1, 4, 1, 1)
    module, made, stats, exact = corrected(lambda y, t: y * (1 + t / 1000) + shift)
    assert made.gain.shape == (3, 4)
    assert made.gain.tolist() == [pytest.approx([1 / (1 + t / 1000)] * 4) for t in (100, 500, 900)]
    assert error_of(module, stats, exact) < 1e-8
    (y, more) = module(torch.ones(1, 4, 5, 5), torch.tensor(500.0))
    assert (more, y.flatten().tolist()) == ("more", pytest.approx([1.0] * 100, abs=1e-5))
    assert repr(made) == "OutputCorrection(corrects 3 of 3 intervals, 4 channels)"


def test_only_levels_that_need_it_are_changed():
    _, made, *_ = corrected(lambda y, t: y * 1.3 if t > 800 else y)
    assert made.gain[:2].tolist() == [[1] * 4] * 2
    assert made.gain[2].tolist() == pytest.approx([1 / 1.3] * 4)


def test_what_unseen_calls_do_not_confirm_is_left_out():
    """Each run's error points its own way: what one half learns, the other refutes."""
    signs = iter([1.0, -1.0] * 3)

    def error(y, t):
        return y + next(signs) * 0.3 if t == 100.0 else y

    with pytest.warns(UserWarning, match="correcting the output of unet helps at no noise level on calls it was not fitted on"):
        module, made, *_ = corrected(error, runs=4, times=(100.0,))
    assert made is None
    assert correction_of(module) is None


def test_a_fit_undoes_the_least_squares_solution():
    draw = torch.Generator().manual_seed(1)
    got = torch.randn(50, 3, generator=draw, dtype=torch.float64)
    exact = got * torch.tensor([0.5, 2, 1]) + 0.1 * torch.randn(50, 3, generator=draw, dtype=torch.float64) + 3
    gain, shift = fit([(got[:20], exact[:20]), (got[20:], exact[20:])])
    for channel in range(3):
        design = torch.stack([exact[:, channel], torch.ones(50, dtype=torch.float64)], dim=1)
        slope, rest = torch.linalg.lstsq(design, got[:, channel]).solution.tolist()
        assert [float(gain[channel]), float(shift[channel])] == pytest.approx([1 / slope, -rest / slope], rel=1e-5)
    constant = fit([(torch.zeros(4, 1).double(), torch.full((4, 1), 2.0).double())])
    assert [part.tolist() for part in constant] == [[1], [2]]


def test_edges_share_out_the_times():
    assert edges_between([5.0] * 9) == ()
    assert edges_between([1.0, 3.0, 3.0, 9.0]) == (2.0, 6.0)
    assert edges_between(range(20), most=4) == (4.5, 9.5, 14.5)


@pytest.mark.parametrize(
    ("shape", "config", "dim"),
    [
        ((2, 4, 8, 8), {"out_channels": 4}, 1),
        ((2, 8, 8, 8), {"out_channels": 8, "in_channels": 4}, 1),
        ((2, 16, 64), {"in_channels": 64}, 2),
        ((2, 13, 16, 8, 8), {"out_channels": 16}, 2),
        ((2, 16, 13, 8, 8), {"out_channels": 16}, 1),
        ((2, 10, 64), {}, 2),
        ((2, 10, 6, 6), {"out_channels": 64}, 1),
    ],
)
def test_channels_are_found(shape, config, dim):
    module = Denoiser()
    module.config = type("Config", (), config)
    assert channel_dim(module, torch.zeros(shape)) == dim


def test_one_run_confirms_nothing_and_lists_are_no_outputs():
    with pytest.raises(
        ValueError, match=r"quantize: correct and refine must have calls of at least two calibration runs of unet, got 1"
    ):
        exact_outputs({"unet": Denoiser()}, Stats(calls=calls(runs=1)))
    with pytest.raises(ValueError, match="must have calls of at least two calibration runs of unet, got 0"):
        exact_outputs({"unet": Denoiser()}, Stats())
    with pytest.raises(ValueError, match=r"denoiser: its output must be a tensor, .* got list"):
        output_of([torch.zeros(1)])


def test_copies_dtypes_and_taking_it_out():
    module, made, *_ = corrected(lambda y, t: y * 2)
    other = copy.deepcopy(module)
    x = torch.ones(1, 4, 5, 5)
    assert torch.equal(other(x, torch.tensor(100.0))[0], module(x, torch.tensor(100.0))[0])
    assert correction_of(other) is not made
    assert module.to(torch.bfloat16)(x.bfloat16(), torch.tensor(100.0))[0].dtype == torch.bfloat16
    assert made.gain.dtype == torch.float32
    remove_correction(module)
    assert module.float()(x, torch.tensor(100.0))[0].mean() == 2
    assert not module._forward_hooks


def test_what_cannot_be_corrected_is_refused_before_anything_is_touched(bare):
    module, _, stats, exact = corrected(lambda y, t: y * 2)
    with pytest.raises(
        ValueError, match=r"quantize: output of unet must not be corrected yet, got OutputCorrection\(corrects 3 of 3"
    ):
        check_correctable({"unet": module}, stats, {"unet": exact})
    timeless = [Call("unet", (), {"sample": c.kwargs["sample"], "timestep": None}, 0.0, c.run) for c in stats.calls]
    with pytest.raises(ValueError, match="quantize: unet must be called with a time for its output to be corrected by it"):
        check_correctable({"unet": Denoiser()}, Stats(calls=timeless), {"unet": exact})
    with pytest.raises(ValueError, match="quantize: correct and refine must be left out where no denoiser"):
        dqtk.quantize(bare, "w8a16", Stats(calls=stats.calls), correct=True, progress=False)
    module = Denoiser()
    module.config = type("Config", (), {"out_channels": 16})
    with pytest.raises(ValueError, match="a clip must have other numbers of frames and channels"):
        channel_dim(module, torch.zeros(1, 16, 16, 4, 4))


@pytest.mark.parametrize("change", [{"gain": [[1.0]]}, {"gain": [[float("nan")] * 4] * 3}, {"edges": [1.0, 0.5]}])
def test_tables_that_make_no_sense(change):
    fields = {"edges": [1.0, 2.0], "gain": [[1.0] * 4] * 3, "shift": [[0.0] * 4] * 3, "dim": 1} | change
    with pytest.raises(ValueError, match=r"(output_correction: gain and shift|noise_levels: edges) must be finite"):
        OutputCorrection(**fields).attach(nn.Linear(1, 1))


# --- a pipeline ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(load_tiny):
    pipe = load_tiny("pixart", torch.bfloat16)
    plan = dqtk.plan(pipe, "w4a8-rtn")
    kwargs = call_kwargs_for(pipe) | {"num_inference_steps": 4}
    stats = dqtk.calibrate(pipe, PROMPTS, plan, call_kwargs=kwargs, batch_size=1, keep_calls=True, progress=False)
    assert {call.run for call in stats.calls} == {0, 1, 2, 3}
    return dqtk.quantize(pipe, plan, stats, correct=True, progress=False)


def test_saved_and_loaded_by_diffusers_it_corrects_the_same(pipe, draw, tmp_path):
    from diffusers import DiffusionPipeline

    made = correction_of(pipe.transformer)
    assert made is not None
    assert len(noise_states(pipe.transformer)) == 1
    dqtk.save(pipe, tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    again = correction_of(loaded.transformer)
    assert (again.edges, again.dim) == (made.edges, made.dim)
    assert torch.equal(again.gain, made.gain)
    assert torch.equal(again.shift, made.shift)
    expected = draw(pipe, num_inference_steps=3)
    assert torch.equal(draw(loaded, num_inference_steps=3), expected)
    config = tmp_path / "p" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"dim": 1', '"dim": 2'))
    with pytest.raises(ValueError, match=r"hash must be .* The file was edited"):
        DiffusionPipeline.from_pretrained(tmp_path / "p", dtype=torch.bfloat16)
    remove_correction(loaded.transformer)
    assert not torch.equal(draw(loaded, num_inference_steps=3), expected)


def test_a_bare_module_comes_back_too(tmp_path):
    from dqtk.checkpoint import load_module, save_module

    class Bare(Denoiser):
        def __init__(self):
            super().__init__(lambda y, t: y * 2)
            self.layer = nn.Linear(8, 8)

    module = Bare()
    stats = Stats(calls=calls())
    exact = exact_outputs({"unet": Denoiser()}, stats)["unet"]
    dqtk.quantize(module, "w8a16", progress=False)
    correct_output(module, stats, "unet", exact)
    save_module(module, tmp_path / "m")
    loaded = load_module(Bare(), tmp_path / "m")
    x = torch.ones(1, 4, 5, 5)
    assert torch.equal(loaded(x, torch.tensor(900.0))[0], module(x, torch.tensor(900.0))[0])
    assert float(loaded(x, torch.tensor(900.0))[0].mean()) == pytest.approx(1, abs=1e-5)
