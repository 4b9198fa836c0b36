"""What ``quantize`` refuses before anything is calibrated or touched: choices of a wrong kind, too few runs, misspelt arguments."""

import pytest
from torch import nn

import dqtk
from dqtk.checkpoint import quantized_layers
from dqtk.checks import batch_for
from dqtk.cli import main
from dqtk.policy import fixed, protecting
from dqtk.spec import GPTQ, Distill, Reconstruct


@pytest.fixture
def idle(load_tiny):
    """A pipeline whose denoiser must not be called: a calibration would be paid for."""
    pipe = load_tiny("pixart")

    def refuse(module, args):
        raise AssertionError("the denoiser was called")

    pipe.transformer.register_forward_pre_hook(refuse)
    yield pipe
    assert not quantized_layers(pipe.transformer)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"refine": "distill"}, r"refine must be a Distill, a Reconstruct or None, got 'distill'\. Write refine=Distill\(\)"),
        ({"refine": Distill}, r"refine must be a Distill, .* got <class .*Distill'>\. Write refine=Distill\(\)"),
        ({"refine": Reconstruct}, r"refine must be a Distill, .* got <class .*Reconstruct'>\. Write refine=Reconstruct\(\)"),
        ({"refine": GPTQ()}, r"refine must be a Distill, a Reconstruct or None, got GPTQ\("),
        ({"correct": "yes"}, r"correct must be True or False, got 'yes'\."),
        ({"correct": 1}, r"correct must be True or False, got 1\."),
        (
            {"correct": True, "prompts": None},
            r"correct and refine must have calls of the original to learn from, got no prompts\. Pass prompts",
        ),
        ({"call_kwargs": {"num_inference_step": 4}}, r"call_kwargs must be arguments of .*got 'num_inference_step'\. Did you mean"),
    ],
)
def test_wrong_choices(idle, how, said):
    with pytest.raises(ValueError, match=f"quantize: {said}"):
        dqtk.quantize(idle, "w8a8", **({"prompts": ["a", "b"]} | how), progress=False)


def test_misspelt_steps_of_a_policy(idle):
    """They would be swallowed by ``**kwargs``, and the edges be those of another number of steps."""
    plan = dqtk.plan(idle, "w8a8", policy=protecting([(0, 0.2)]))
    for call in (lambda **how: dqtk.quantize(idle, plan, **how), lambda **how: fixed(plan, idle, **how)):
        with pytest.raises(ValueError, match=r"call_kwargs must be arguments of .*got 'num_inference_step'"):
            call(call_kwargs={"num_inference_step": 4})


@pytest.mark.parametrize("how", [{"correct": True}, {"refine": Distill()}, {"refine": Reconstruct()}])
def test_bare_denoisers_have_no_calls_to_learn_from(bare, how):
    (name,) = how
    said = f"correct and refine must be left out where no denoiser .*, got {name} for a bare Sequential. Pass the pipeline"
    with pytest.raises(ValueError, match=f"quantize: {said}"):
        dqtk.quantize(bare, "w8a8", **how, progress=False)
    assert type(bare[0]) is nn.Linear


@pytest.mark.parametrize("how", [{"correct": True}, {"refine": Distill()}, {"refine": Reconstruct()}])
@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static"])
def test_one_run_is_refused_before_it_is_made(idle, tmp_path, how, recipe):
    said = (
        r"quantize: correct and refine must have calls of at least two calibration runs of transformer, got 1: one prompt\. "
        r"Give more prompts\."
    )
    with pytest.raises(ValueError, match=said):
        dqtk.quantize(idle, recipe, prompts=["a"], **how, progress=False)
    with pytest.raises(AssertionError, match="the denoiser was called"):  # two are two runs, in batches of one
        dqtk.quantize(idle, recipe, prompts=["a", "b"], **how, progress=False)


def test_batches_leave_two_runs_to_what_learns():
    assert [batch_for(num, 8, True) for num in (1, 2, 3, 8, 15, 16, 100)] == [1, 1, 2, 4, 8, 8, 8]
    assert batch_for(2, 8, False) == 8


@pytest.mark.parametrize("words", [["--correct"], ["--refine", "distill"], ["--refine", "blocks"]])
def test_one_run_is_refused_in_the_shell_before_weights_are_read(tiny_folders, tmp_path, capsys, monkeypatch, words):
    def refuse(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr("dqtk.cli.load_pipeline", refuse)
    command = ["quantize", str(tiny_folders["pixart"]), "--recipe", "w8a8", *words, "--output", str(tmp_path / "out")]
    assert main([*command, "--prompts", "a", "b", "--batch-size", "2"]) == 2
    error = capsys.readouterr().err
    assert "quantize: correct and refine must have calls of at least two calibration runs of transformer, got 1: 2 prompts" in error
    with pytest.raises(AssertionError, match="weights were read"):
        main([*command, "--prompts", "a", "b"])
