"""Generation with pipelines other than text-to-image by prompt."""

import copy

import pytest
import torch
from dqtk.pipelines.tiny.build import new_pixart, new_sdxl
from dqtk.pipelines.tiny.train_vae import new_vae
from PIL import Image

from dqtk.report.compare import compare
from dqtk.report.generate import NotFinite, check_call_kwargs, generate, make_tasks, to_tensor
from dqtk.resolve import call_kwargs_for


@pytest.fixture(scope="module")
def dit():
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=16, patch_size=4, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=8
    )
    return DiTPipeline(transformer=transformer, vae=new_vae(), scheduler=DDIMScheduler(), id2label={7: "cock", 8: "hen, biddy"})


def test_class_labels_by_number_and_by_name(dit):
    found = compare(dit, dit, ["7", "hen"], call_kwargs={"num_inference_steps": 2}, scores=("psnr",), progress=False)
    assert found.measure("psnr").detail["exact_matches"] == 2
    assert len(found.curves[0].sqnr_db) == 2
    with pytest.raises(ValueError, match=r"^prompts: a class-conditional prompt must be a number or a known label, got 'fox'\."):
        compare(dit, dit, ["fox"], progress=False)


def test_pipelines_without_a_prompt_are_refused(dit):
    class Unconditional(type(dit)):
        def __call__(self, batch_size=1, generator=None):
            raise AssertionError("not called")

    pipe = Unconditional(**dit.components)
    with pytest.raises(ValueError, match=r"^prompts: the pipeline must take 'prompt' or 'class_labels', got Unconditional with"):
        compare(pipe, pipe, ["a"], progress=False)


def test_tasks_are_numbered_by_prompt_and_repetition():
    tasks = make_tasks(["a", "b"], seed=3, seeds_per_prompt=2)
    assert [task.id for task in tasks] == ["0000-0", "0000-1", "0001-0", "0001-1"]
    assert len({task.seed for task in tasks}) == 4
    assert make_tasks(["b"], 3, 1)[0].seed == tasks[0].seed  # of the index, not of the words


def test_images_become_batches_in_zero_to_one():
    images = [Image.new("RGB", (5, 3), colour) for colour in ((255, 0, 51), (0, 0, 0))]
    batch = to_tensor(images)
    assert batch.shape == (2, 3, 3, 5)
    assert batch[0, :, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_image_output_types_are_ignored_and_the_rest_passed_on():
    assert check_call_kwargs({"output_type": "np", "guidance_scale": 4}) == {"guidance_scale": 4}
    assert check_call_kwargs(None) == {}


def test_sdxl_is_compared_inside_too_with_its_timestep_by_position():
    torch.manual_seed(0)
    pipe = new_sdxl(new_vae())
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    settings = {"num_inference_steps": 2, "height": 64, "width": 64}
    found = compare(pipe, half, ["a red circle", "two blue squares"], call_kwargs=settings, scores=("psnr",), progress=False)
    own, same = found.curves
    assert own.timesteps == same.timesteps == (999.0, 499.0)
    assert own.num_images == 2
    assert min(same.sqnr_db) > 30  # bf16 alone
    assert {pair.name for pair in found.sizes} == {"vae", "text_encoder", "text_encoder_2", "unet"}
    assert all(pair.candidate.in_memory == pytest.approx(pair.reference.in_memory / 2, rel=0.01) for pair in found.sizes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_overflow_are_no_pictures(value):
    """Clamped and cast they would be black and white squares with a PSNR."""
    torch.manual_seed(0)
    pipe = new_pixart(new_vae())
    kwargs = {"num_inference_steps": 1, **call_kwargs_for(pipe)}
    tasks, fine = make_tasks(["a red circle", "a blue square"], 0, 1), copy.deepcopy(pipe)
    pipe.transformer.proj_out.bias.data[:] = value
    with pytest.raises(
        NotFinite, match=r"generate: pictures must be finite .*, got NaN or infinity in 2 of 2, first in 0000-0 \('a red"
    ):
        generate(pipe, tasks, kwargs)
    assert "decode" not in vars(pipe.vae)
    fine.vae.decoder.conv_out.bias.data[:] = value
    with pytest.raises(NotFinite):
        generate(fine, tasks, kwargs)


def test_pictures_are_the_pipelines_own():
    torch.manual_seed(0)
    pipe = new_pixart(new_vae())
    kwargs = {"num_inference_steps": 1, **call_kwargs_for(pipe)}
    (task,) = make_tasks(["a red circle"], 0, 1)
    (image,) = generate(pipe, [task], kwargs).images
    own = pipe(prompt=[task.prompt], generator=[torch.Generator().manual_seed(task.seed)], **kwargs).images[0]
    assert image.tobytes() == own.tobytes()
