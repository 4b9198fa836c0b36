"""dqtk against what users would pick instead, on the same model in the same run: what it costs in quality, what it gains in speed.

    python benchmarks/peers.py quality [MODEL ...] [--num-prompts 24] [--steps 20]
    python benchmarks/peers.py speed [pixart-xl | sdxl | FOLDER] [--layers 4] [--size 512] [--repeats 7] [--only WORD ...] [--dry]

quality: dqtk's w8a8 and torchao's int8 dynamic quantization of the same linear layers: PSNR against the unquantized pipeline with
its interval. Needs ``pip install torchao``, which quantizes linear layers only, so dqtk's plan is cut to those that both can take.

speed: one denoising step with random weights of the published size, in bfloat16, each method W8A8 wherever it can
(``peer_speed.py`` says how): dqtk, bfloat16 and float32, eager and compiled; torchao, optimum-quanto, SDNQ and OpenVINO where
installed. A method that fails has a row that says what it raised.

Appends one JSON line per model and method to benchmarks/results.jsonl, versions included.
"""

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from rows import append

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
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

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


def quality(options: argparse.Namespace) -> None:
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


def speed(options: argparse.Namespace) -> None:
    from peer_speed import VARIANTS, measure_all, measure_here, verdict

    torch.set_num_threads(options.threads)
    if options.variant is None:
        print("\n".join(verdict(measure_all(options))))
        return
    if options.variant not in VARIANTS:
        raise SystemExit(f"--variant must be one of {', '.join(VARIANTS)}, got {options.variant!r}")
    measure_here(options.model, options.variant, options.result, options.size, options.layers, options.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    asked = what.add_parser("quality")
    asked.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-sdxl"])
    asked.add_argument("--num-prompts", type=int, default=24)
    asked.add_argument("--steps", type=int, default=20)
    asked = what.add_parser("speed")
    asked.add_argument("model", nargs="?", default="pixart-xl", help="pixart-xl, sdxl, or a pipeline as dqtk bench takes it")
    asked.add_argument("--layers", type=int, help="blocks of the model (default: all)")
    asked.add_argument("--size", type=int, default=512, help="height and width in pixels")
    asked.add_argument("--repeats", type=int, default=7)
    asked.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="variants whose name has one of these words")
    asked.add_argument("--timeout", type=int, default=3600, help="seconds for one variant")
    asked.add_argument("--folder", type=Path, default=Path("out/peer-speed"), help="for what the processes leave")
    asked.add_argument("--dry", action="store_true", help="append no rows: for trying out, or on a busy machine")
    asked.add_argument("--variant", help=argparse.SUPPRESS)
    asked.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    {"quality": quality, "speed": speed}[options.what](options)


if __name__ == "__main__":
    main()
