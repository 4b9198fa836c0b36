"""The oracle's score of a video pipeline of the world in motion, over held-out captions.

    python -m dqtk.pipelines.tiny.judge_wan tiny-wan --num 48 --sheet work/sheet.png

Three lines: rendered clips, the same through the autoencoder (with its PSNR), and clips generated from their captions.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dqtk.calls import call_arguments
from dqtk.sources import load_pipeline

from .motion import Moving, judge, render, sample_clip
from .train_vae import to_float

SEED = 1  # of captions and places; training has stream 0


def score(frames: Sequence[np.ndarray], wanted: Sequence[Moving]) -> dict[str, Any]:
    """Means over clips of the oracle's verdict: uint8 clips [F, 64, 64, 3] against what they should show."""
    verdicts = [judge(each, clip) for each, clip in zip(frames, wanted, strict=True)]
    parts = {name: round(float(np.mean([v.attributes[name] for v in verdicts])), 3) for name in verdicts[0].attributes}
    correct = float(np.mean([v.all_correct for v in verdicts]))
    return {"mean": round(float(np.mean([v.mean for v in verdicts])), 4), "all_correct": round(correct, 3)} | parts


@torch.no_grad()
def reconstruct(pipe: Any, frames: np.ndarray) -> np.ndarray:
    """A uint8 clip through the pipeline's autoencoder."""
    x = to_float(torch.from_numpy(frames).permute(3, 0, 1, 2)[None]).to(pipe.vae.dtype)
    decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
    return to_bytes(pipe.video_processor.postprocess_video(decoded.float(), output_type="np"))[0]


def generate(pipe: Any, captions: Sequence[str], seed: int = 0, **asked: Any) -> np.ndarray:
    """A clip per caption, uint8 [N, F, 64, 64, 3]; each from a seed of its own, so that none depends on its neighbours."""
    clips = []
    for number, caption in enumerate(captions):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        clips.append(to_bytes(pipe(caption, generator=generator, output_type="np", **call_arguments(pipe, asked)).frames)[0])
    return np.stack(clips)


def to_bytes(frames: np.ndarray) -> np.ndarray:
    return np.rint(frames * 255).astype(np.uint8)


def sheet(frames: Sequence[np.ndarray]) -> Image.Image:
    """Every fourth frame of each clip, a row per clip, at twice the size."""
    picture = Image.fromarray(np.concatenate([np.concatenate(list(clip[::4]), axis=1) for clip in frames]))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--num", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sheet", type=Path, help="picture of the first 12 generated clips")
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    pipe = load_pipeline(a.model, a.dtype)
    wanted = [sample_clip(SEED, i, "heldout") for i in range(a.num)]
    real = [render(clip, SEED, i) for i, clip in enumerate(wanted)]
    print("rendered", json.dumps(score(real, wanted)), flush=True)
    decoded = [reconstruct(pipe, frames) for frames in real]
    errors = [np.square(one.astype(float) - two).mean() for one, two in zip(real, decoded, strict=True)]
    psnr = float(np.mean([10 * np.log10(255**2 / error) for error in errors]))
    print("autoencoder", json.dumps({"psnr": round(psnr, 2)} | score(decoded, wanted)), flush=True)
    asked = {"num_inference_steps": a.steps, "guidance_scale": a.guidance}
    made = generate(pipe, [clip.caption for clip in wanted], a.seed, **{k: v for k, v in asked.items() if v is not None})
    print("generated", json.dumps(score(list(made), wanted)), flush=True)
    if a.sheet is not None:
        sheet(list(made[:12])).save(a.sheet)


if __name__ == "__main__":
    main()
