"""Memory of a whole generation: what a process takes while it paints a picture, beside the weights that it holds.

    python benchmarks/memory.py FOLDER [FOLDER ...] [--steps 2] [--size 512] [--prompt "a red circle"]

Each pipeline (a folder, hub id or embedded name, quantized or not) is loaded in a process of its own, which is asked how far its
resident memory rises above what it was before loading: at rest behind a first picture, and how far above its rest at the peak of a
second, text encoders and autoencoder included. ``weights``: of all components as they lie in memory. Linux only. Appends a JSON
line per pipeline to results.jsonl.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

MIB = 1 << 20


def measure(model: str, steps: int, size: int | None, prompt: str) -> dict[str, Any]:
    """Of a pipeline that this process has not seen before."""
    from dqtk.bench.memory import _resident, rise
    from dqtk.calls import call_arguments, prompt_argument
    from dqtk.report.sizes import bytes_in_memory
    from dqtk.sources import load_pipeline

    small = load_pipeline("tiny-pixart")
    small("a red circle", **call_arguments(small, {"num_inference_steps": 1}))  # libraries are there from now on
    del small
    before = _resident("VmRSS")
    pipe = load_pipeline(model, "bfloat16")
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": steps} | ({} if size is None else {"height": size, "width": size})
    call = call_arguments(pipe, asked) | prompt_argument(pipe, [prompt], "memory")

    def paint() -> None:
        pipe(**call, generator=torch.Generator().manual_seed(0))

    paint()  # weights are read from their files when they are first used
    rest = _resident("VmRSS") - before
    peak = rise(paint, torch.device("cpu"))
    weights = sum(bytes_in_memory(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    return {"weights": weights, "at_rest": rest, "rise": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int)
    parser.add_argument("--prompt", default="a red circle")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.models[0], options.steps, options.size, options.prompt)))
        return
    from rows import append

    for model in options.models:
        command = [sys.executable, __file__, model, "--here", "--steps", str(options.steps), "--prompt", options.prompt]
        command += [] if options.size is None else ["--size", str(options.size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        append({"benchmark": "memory", "model": model, "steps": options.steps, "size": options.size, **row})
        print(f"{model:32} " + ", ".join(f"{name} {value / MIB:7.0f} MiB" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
