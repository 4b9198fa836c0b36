"""A job of seconds on an untrained pipeline, and folders of pictures."""

import json

import numpy as np
import pytest
import yaml
from dqtk.pipelines.tiny.scenes import captions, parse_caption, render
from PIL import Image


@pytest.fixture
def job_file(tiny_folders, tmp_path):
    """Function (**changes) -> path of a job file; the output is TMP/out."""

    def write(name="job.yaml", **changes):
        job = {
            "name": "a test",
            "models": [str(tiny_folders["pixart"])],
            "recipes": ["w8a8"],
            "prompts": captions(5, seed=3),
            "call": {"num_inference_steps": 2},
            "metrics": ["psnr", "ssim", "oracle", "clip_score", "frechet", "kid"],
            "extractors": ["tiny-clip"],
            "batch_size": 2,
            "output": str(tmp_path / "out"),
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(job | changes))
        return path

    return write


@pytest.fixture
def pictures(tmp_path):
    """Function (name, noise, num) -> folder of clean or disturbed renders with their captions beside them."""

    def make(name, noise=0, num=9, suffix=".png"):
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for i, caption in enumerate(captions(num, seed=11)):
            array = render(parse_caption(caption), 11, i).astype(np.int32)
            array += np.random.default_rng(i).integers(-noise, noise + 1, array.shape) if noise else 0
            Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}-0{suffix}")
            rows.append(json.dumps({"id": f"{i:04d}-0", "prompt": caption}))
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        return folder

    return make
