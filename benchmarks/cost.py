"""What quantizing a real-sized model costs: time and peak memory of ``dqtk quantize`` on a PixArt-Sigma-XL with random weights.

    python benchmarks/cost.py [--recipe w4a8] [--num-prompts 2] [--steps 10] [--folder DIR]
    python benchmarks/cost.py -- --dtype float32 --max-memory 1    # where the CPU has no bfloat16 units

The denoiser is the published configuration (28 blocks, 1152 wide, 0.6 B parameters) in bf16; the text encoder is one T5 layer of
the right width (4096), the autoencoder a small one. Calibration paints latents of 512 x 512 pictures (1024 tokens), both halves of
guidance. The command runs as a user would run it; its memory is the peak resident size that the system reports. Appends one JSON
line to benchmarks/results.jsonl.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rows import append

CALIBRATION = Path(__file__).parent.parent / "pipelines" / "tiny" / "calibration.txt"


def build(folder: Path) -> None:
    """Write the pipeline with seeded random weights, if it is not there."""
    if (folder / "model_index.json").exists():
        return
    import torch  # only where the pipeline is built: the measuring process stays small
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from models import PIXART_XL
    from transformers import T5Config, T5EncoderModel

    from dqtk.sources import load_pipeline

    torch.manual_seed(0)
    tiny = load_pipeline("tiny-pixart")
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    )
    text = T5EncoderModel(T5Config(d_model=4096, d_kv=64, num_heads=2, num_layers=1, d_ff=128, vocab_size=len(tiny.tokenizer)))
    pipe = PixArtSigmaPipeline(
        tokenizer=tiny.tokenizer,
        text_encoder=text.bfloat16(),
        vae=vae.bfloat16(),
        transformer=PixArtTransformer2DModel(**PIXART_XL).bfloat16(),
        scheduler=DPMSolverMultistepScheduler.from_config(tiny.scheduler.config),
    )
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipe.save_pretrained(unfinished)
    unfinished.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="w4a8")
    parser.add_argument("--num-prompts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("out/pixart-xl-random"))
    parser.add_argument("--build-only", action="store_true", help="write the pipeline and stop")
    parser.add_argument("more", nargs="*", help="further arguments of dqtk quantize, behind --")
    options = parser.parse_args()
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    if options.build_only:
        build(options.folder)
        return
    # In a process of its own: Linux counts the peak of a parent into that of its children.
    subprocess.run([sys.executable, __file__, "--build-only", "--folder", str(options.folder)], check=True)
    output = options.folder.with_name(f"{options.folder.name}-{options.recipe}")
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "dqtk", "quantize", str(options.folder), "--recipe", options.recipe]
    command += ["--prompts", str(CALIBRATION), "--num-prompts", str(options.num_prompts)]
    command += ["--steps", str(options.steps), "--output", str(output), *options.more]
    start = time.monotonic()
    done = subprocess.run(command, check=False, env=os.environ)
    seconds = time.monotonic() - start
    if done.returncode:
        sys.exit(done.returncode)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    stored = sum(file.stat().st_size for file in (output / "transformer").glob("*.safetensors"))
    row = {
        "benchmark": "cost",
        "model": "PixArt-Sigma-XL, random weights",
        "recipe": options.recipe,
        "seconds": round(seconds),
        "peak_bytes": peak,
        "stored_bytes": stored,
        "num_prompts": options.num_prompts,
        "steps": options.steps,
        "more": " ".join(options.more),
    }
    append(row)
    print(f"{row['model']}, {options.recipe}: {seconds / 60:.1f} min, peak {peak / 1e9:.2f} GB, denoiser {stored / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
