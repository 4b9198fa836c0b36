"""dqtk's w8a8 against torchao's int8 dynamic quantization: same layers, same prompts and seeds, same run.

    python benchmarks/peers.py [MODEL ...] [--num-prompts 24] [--steps 20]

Needs ``pip install torchao``. torchao quantizes linear layers only, so dqtk's plan is cut to the linear layers that both can take.
Appends one JSON line per model and method to benchmarks/results.jsonl: PSNR against the unquantized pipeline with its interval, and
the median seconds per image, interleaved with the unquantized pipeline's.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from rows import append
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

import dqtk
from dqtk.prompt_sets import read_prompts
from dqtk.report.compare import compare
from dqtk.resolve import call_kwargs_for
from dqtk.sites import DENOISERS
from dqtk.sources import load_pipeline

PROMPTS = Path(__file__).parent.parent / "pipelines" / "tiny" / "prompts.txt"


def linear_plan(pipe) -> dqtk.Plan:
    """The w8a8 plan without convolutions and without weight-only layers."""
    plan = dqtk.plan(pipe, "w8a8")
    skip = [c.site.id for c in plan.choices if c.spec is not None and (c.site.kind != "linear" or c.spec.input is None)]
    return dqtk.plan(pipe, "w8a8", overrides=dict.fromkeys(skip))


def candidates(model: str) -> dict:
    """Method name -> quantized pipeline; the same sites in both."""
    ours = load_pipeline(model)
    plan = linear_plan(ours)
    dqtk.quantize(ours, plan, progress=False)
    theirs = load_pipeline(model)
    for component in plan.components:
        wanted = {c.site.path for c in plan.choices if c.spec is not None and c.site.component == component.name}
        assert DENOISERS.fullmatch(component.name)
        module = theirs.components[component.name]
        quantize_(module, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda layer, path, wanted=wanted: path in wanted)
    return {"dqtk w8a8": ours, "torchao int8 dynamic": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-sdxl"])
    parser.add_argument("--num-prompts", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    prompts = read_prompts([str(PROMPTS)], options.num_prompts)
    for model in options.models:
        reference = load_pipeline(model)
        for name, pipe in candidates(model).items():
            kwargs = call_kwargs_for(reference) | {"num_inference_steps": options.steps}
            result = compare(reference, pipe, prompts, call_kwargs=kwargs, scores=("psnr",), num_trajectory=0, progress=False)
            psnr = result.measure("psnr").estimate
            row = {
                "model": model,
                "method": name,
                "psnr": round(psnr.value, 2),
                "psnr_interval": [round(psnr.low, 2), round(psnr.high, 2)],
                "seconds_per_image": result.timing.candidate,
                "seconds_per_image_unquantized": result.timing.reference,
                "num_prompts": len(prompts),
                "steps": options.steps,
                "threads": torch.get_num_threads(),
            }
            append(row, {"torchao": version("torchao")})
            print(f"{model:12} {name:22} PSNR {row['psnr']:6.2f} dB {row['psnr_interval']}, {row['seconds_per_image']:.3f} s")


if __name__ == "__main__":
    main()
