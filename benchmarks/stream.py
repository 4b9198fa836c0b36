"""A model larger than memory: time and peak memory of ``dqtk quantize --stream`` on a FLUX.1-dev transformer with random weights.

    OMP_NUM_THREADS=1 python benchmarks/stream.py [--recipes w8a8 w4a16] [--folder DIR] [--keep]

The published configuration (19 + 38 blocks, 3072 wide, 11.9 B parameters) in bf16, 24 GB in files of 2 GB: one block of normal
numbers, rolled for every tensor. The command runs as a user would run it, on the component's folder; its memory is the peak
resident size that the system reports, pages mapped from files included. Every tensor of the result is then read again and compared
with its digest. Results are deleted after measuring, and the model at the end unless ``--keep``. Needs 37 GB of disk. Appends one
JSON line per recipe to benchmarks/results.jsonl.

This process imports nothing large before it has measured: Linux counts what a parent holds when it starts a child as the child's.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rows import append

FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
BLOCK = 2**24  # random numbers
FILE = 2 * 10**9  # bytes
STEM = "diffusion_pytorch_model"


def build(folder: Path) -> None:
    """Write the model file by file. Runs in a process of its own."""
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import save_file

    from dqtk.sites import meta

    model = meta(FluxTransformer2DModel, **FLUX)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_config(unfinished)
    groups: list[list[str]] = [[]]
    for name in shapes:
        if 2 * sum(sizes[other] for other in (*groups[-1], name)) > FILE:
            groups.append([])
        groups[-1].append(name)
    numbers = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    places: dict[str, str] = {}
    for i, names in enumerate(groups):
        tensors = {}
        for name in names:
            rolled = numbers.roll(7919 * len(places))
            tensors[name] = rolled.repeat(-(-sizes[name] // BLOCK))[: sizes[name]].clone().view(shapes[name])
            places[name] = f"{STEM}-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, unfinished / places[names[0]], metadata={"format": "pt"})
    index = {"metadata": {"total_size": 2 * sum(sizes.values())}, "weight_map": places}
    (unfinished / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    unfinished.rename(folder)


def verify(folder: Path) -> None:
    """Read every tensor of a result. Runs in a process of its own."""
    from dqtk.checkpoint import verify_files

    verify_files(sorted(folder.glob("*.safetensors")), "stream")


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: Path, recipe: str) -> dict[str, Any]:
    """Time, peak memory and size of the result of one command."""
    output = folder.with_name(f"{folder.name}-{recipe}")
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "dqtk", "quantize", str(folder), "--recipe", recipe, "--stream", "--output", str(output)]
    start = time.monotonic()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)  # this child's usage, not the largest of all
    seconds = time.monotonic() - start
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
    subprocess.run([sys.executable, __file__, "--verify", str(output)], check=True)
    row = {
        "benchmark": "stream",
        "model": "FLUX.1-dev transformer, random weights",
        "recipe": recipe,
        "seconds": round(seconds),
        "peak_bytes": usage.ru_maxrss * 1024,
        "source_bytes": bytes_of(folder),
        "stored_bytes": bytes_of(output),
    }
    shutil.rmtree(output)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["w8a8", "w4a16"])
    parser.add_argument("--folder", type=Path, default=Path("out/flux-random"))
    parser.add_argument("--keep", action="store_true", help="keep the 24 GB of random weights")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--verify", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build or options.verify:
        build(options.build) if options.build else verify(options.verify)
        return
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    if not options.folder.exists():
        subprocess.run([sys.executable, __file__, "--build", str(options.folder)], check=True)
    rows = [measure(options.folder, recipe) for recipe in options.recipes]
    if not options.keep:
        shutil.rmtree(options.folder)

    for row in rows:
        append(row)
        peak, before, after = (row[key] / 1e9 for key in ("peak_bytes", "source_bytes", "stored_bytes"))
        print(f"{row['model']}, {row['recipe']}: {row['seconds'] / 60:.1f} min, peak {peak:.2f} GB, {before:.1f} -> {after:.1f} GB")


if __name__ == "__main__":
    main()
