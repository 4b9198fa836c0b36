"""Two kinds of ground: small untrained pipelines that really run, and a comparison made up of known numbers."""

import copy
import io
import math

import pytest
import torch
from dqtk.pipelines.tiny.build import new_pixart
from dqtk.pipelines.tiny.train_vae import new_vae
from PIL import Image

from dqtk.report.comparison import Comparison, Curve, OracleScore, Row, SizePair, Timing
from dqtk.report.measures import score_measures
from dqtk.report.ranges import RangeCurve
from dqtk.report.scores import resolve_scores
from dqtk.report.sizes import ComponentSize


@pytest.fixture(scope="session")
def pixart():
    """tiny-pixart as built, untrained; tests must leave it as it is."""
    torch.manual_seed(0)
    pipe = new_pixart(new_vae())
    # Some architectures start their last layer at zero; an untrained one would then paint nothing that noise could change.
    assert all(p.abs().sum() > 0 for p in pipe.transformer.parameters() if p.ndim > 1)
    return pipe


@pytest.fixture(scope="session")
def perturbed(pixart):
    """A copy of the pipeline whose transformer's matrices carry relative noise of the given size."""

    def make(amount):
        pipe = copy.deepcopy(pixart)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in pipe.transformer.parameters():
                if p.ndim == 2:
                    p += amount * p.std() * torch.randn(p.shape, generator=generator)
        return pipe

    return make


def png(colour, side=64):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def made_up_row(index, psnr, prompt=None, lost=False):
    return Row(
        id=f"{index:04d}-0",
        prompt_index=index,
        repetition=0,
        prompt=prompt or f"a prompt with number {index}",
        seed=1000 + index,
        scores={"psnr": psnr, "ssim": 0.9, "ms_ssim": 0.95},
        floor={"psnr": 50.0, "ssim": 0.99, "ms_ssim": 0.999},
        oracle={
            "reference": OracleScore(mean=0.9, all_correct=True),
            "candidate": OracleScore(mean=0.5 if lost else 0.9, all_correct=not lost),
            "floor": OracleScore(mean=0.9, all_correct=True),
        },
        images={"reference": png((200, 40, 40)), "candidate": png((190, 50, 40)), "floor": png((200, 40, 41))},
    )


@pytest.fixture
def row():
    """A function (index, PSNR) -> Row with all scores, oracle and pictures."""
    return made_up_row


@pytest.fixture(scope="session")
def plan_summary():
    """Plain data as the engine gives it, with a block structure and one kept layer."""
    names = [f"transformer_blocks.{b}.{layer}" for b in range(3) for layer in ("attn1.to_q", "attn1.to_k", "ff.net.2")]
    sites = [
        {
            "id": f"transformer:{name}",
            "role": "feed-forward down" if "ff" in name else "self-attention",
            "shape": [64, 64],
            "weight_bits": 8 if "ff" in name else 4,
            "input_bits": 8,
            "spec": "int4 per group of 64",
            "why": "rule 2",
        }
        for name in names
    ]
    kept = {"id": "transformer:proj_out", "role": "output projection", "shape": [8, 64], "spec": "kept", "why": "last <layer>"}
    return {
        "recipe": "w4a8",
        "hash": "abc123",
        "components": {
            "transformer": {
                "class": "PixArtTransformer2DModel",
                "bytes_before": 8000,
                "bytes_after": 2400,
                "num_parameters": 4000,
                "quantized_share": 0.95,
            }
        },
        "sites": [*sites, kept | {"weight_bits": None, "input_bits": None}],
        "kernels": {"linear_w4a8: cpu int_mm": 9},
    }


@pytest.fixture
def made_up(plan_summary):
    """A function (PSNR values) -> Comparison with everything in it."""

    def make(values=(20.0, 40.0, math.inf, 30.0), **changes):
        rows = [made_up_row(i, value, lost=i == 0) for i, value in enumerate(values)]
        scores, missing = resolve_scores(("psnr", "ssim", "ms_ssim"))
        steps = {"num_images": 4, "timesteps": (999.0, 666.0, 333.0), "cosine": (0.999, 0.998, 1.0)}
        curves = [
            Curve(kind=kind, pipeline=pipeline, label=f"{pipeline} {kind}", sqnr_db=(30.0, 25.0, math.inf), **steps)
            for pipeline in ("candidate", "floor")
            for kind in ("own", "same")
        ]
        size = ComponentSize(name="transformer", in_memory=8000, at_16_bit=8000, on_disk=8100)
        smaller = ComponentSize(name="transformer", in_memory=2400, at_16_bit=2400, on_disk=2500, zeros=0.125)
        fields = {
            "reference_name": "tiny-pixart",
            "candidate_name": "out/pixart-w4a8",
            "floor_name": "bf16 rounding",
            "rows": tuple(rows),
            "measures": tuple(score_measures(rows, scores, missing | {"lpips": "no weights here"}, 0)),
            "curves": tuple(curves),
            "timing": Timing(reference=1.0, candidate=0.5, num_batches=2, batch_size=8, note="median of 2 batches"),
            "sizes": (SizePair(name="transformer", reference=size, candidate=smaller),),
            "dtype": "bfloat16",
            "seed": 0,
            "seeds_per_prompt": 1,
            "call_kwargs": {"num_inference_steps": 3},
            "versions": {"dqtk": "0.1.0", "torch": "2.9.0_" + "built_here_" * 8},
            "hardware": {"processor": "test", "threads": "1"},
            "created": "2026-01-01T00:00:00+00:00",
            "plan_summary": plan_summary,
            "ranges": (
                RangeCurve(role="ff.<down>", num_layers=3, levels=(1.0, 0.7, 0.2), unused=(1.5, 0.5, 0.0)),
                RangeCurve(role="conv", num_layers=1, levels=(1.0, 0.7, 0.2), unused=(0.0, 0.25, 0.5)),
                RangeCurve(role="cross_attn.q", num_layers=2, levels=(1.0, 0.2), unused=(0.0, 0.125)),
            ),
        }
        return Comparison(**(fields | changes))

    return make
