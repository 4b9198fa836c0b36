"""Vector quantization beside scalar codes at 2, 3 and 4 bits: same layers, same prompts and seeds, bytes and time to encode.

    python benchmarks/vq.py [MODEL ...] [--num-prompts 8] [--steps 8] [--bits 2 3 4] [--methods WORD ...]
                             [--distill ITERATIONS [--discrete SHARE]] [--batch 8]
    python benchmarks/vq.py --since 2026-01-31T09:00   # go on with an interrupted run
    python benchmarks/vq.py --table

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. Every variant quantizes the same linear layers of the
denoiser with 16-bit inputs (those of benchmarks/methods.py) and learns on the same captions. ``--distill`` measures every variant
again after so many iterations of ``Distill``, ``--discrete`` once more with steps that change at most a share of the words of each
layer. ``--batch``: captions per run of calibration; fewer make smaller calls, and more runs. Bits count codes, books, scales and
signs of these layers; bytes the whole denoiser at 16-bit compute. Seconds are of quantizing and training alone, on a machine that
may be shared: compare them within a run. Appends one JSON line per variant to benchmarks/results.jsonl.
"""

import argparse
import copy
import sys
import time
from typing import Any

import torch
from methods import CALIBRATION, PROMPTS, bits_of, load, measure, plan_for
from rows import append, stored

import dqtk
from dqtk.calibrate.answers import exact_outputs
from dqtk.checkpoint import quantized_layers
from dqtk.prompt_sets import read_prompts
from dqtk.recipes import recipe_named
from dqtk.refine.distill import distill
from dqtk.report.sizes import bytes_at_16_bit
from dqtk.resolve import call_kwargs_for
from dqtk.spec import (
    GPTQ,
    MSE,
    BeamSearch,
    DiscreteSteps,
    Distill,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    TensorSpec,
    Trellis,
    VectorCodebook,
)


def scalars(bits: int, size: int) -> LayerSpec:
    weight = TensorSpec(format=Int(bits=bits, symmetric=False), granularity=PerGroup(size=size), range=MSE())
    return LayerSpec(weight=weight, solver=GPTQ())


def vectors(solver: GPTQ | BeamSearch, **form: Any) -> LayerSpec:
    return LayerSpec(weight=TensorSpec(format=VectorCodebook(**form), granularity=PerChannel()), solver=solver)


SHARED = {2: {"words": 4096, "length": 6}, 3: {"words": 512, "length": 3}, 4: {"words": 4096, "length": 3}}
ONE_BOOK = {2: {"words": 256, "length": 4}, 3: {"words": 64, "length": 2}, 4: {"words": 256, "length": 2}}


BOOK_RATES = {"weight_rate": 0.002, "scale_rate": 0.0002}  # a word is many weights: at a tenth, what GPTQ chose is not undone


def methods(bits: int) -> dict[str, LayerSpec]:
    """By name."""
    rings = TensorSpec(format=Trellis(bits=bits), granularity=PerChannel())
    found = {
        "int, groups of 64, gptq": scalars(bits, 64),
        "int, groups of 16, gptq": scalars(bits, 16),
        "one book, gptq": vectors(GPTQ(), **ONE_BOOK[bits]),
        "one book, beam search": vectors(BeamSearch(), **ONE_BOOK[bits]),
        "one book per role, gptq": vectors(GPTQ(), **ONE_BOOK[bits], group="{role}"),
        "one book for all, gptq": vectors(GPTQ(), **ONE_BOOK[bits], group="all"),
        "one large book for all, gptq": vectors(GPTQ(), **SHARED[bits], group="all"),
        "vqdm": recipe_named(f"vqdm-{bits}bit").main_spec(),
        "vqdm form, gptq": vectors(GPTQ(), books=bits),
        "trellis": recipe_named(f"trellis-{bits}bit").main_spec(),
        "trellis, not rotated": LayerSpec(weight=rings, solver=GPTQ()),
    }
    return found if bits == 4 else {"vq4dit": recipe_named(f"vq4dit-{bits}bit").main_spec()} | found


def run(model: str, options) -> None:
    reference, everything = load(model), read_prompts([str(PROMPTS)], None)
    prompts = everything[: options.num_prompts]
    steps = {"num_inference_steps": options.steps}
    how = {"batch_size": options.batch, "call_kwargs": steps, "progress": False}
    stats = dqtk.calibrate(reference, everything[CALIBRATION], plan_for(reference, scalars(4, 64)), **how)
    for bits in options.bits:
        for name, spec in methods(bits).items():
            rows = []
            for trained in trainings(options):
                row = {"benchmark": "vq", "model": model, "setting": f"{bits} bit", "method": name, **trained}
                row |= {"num_prompts": len(prompts), "steps": options.steps}
                done = options.since and any(row.items() <= r.items() and r["created"] >= options.since for r in stored())
                rows += [] if done or not any(word in name for word in options.methods) else [row]
            if not rows:
                continue
            solved = load(model)
            made, start = plan_for(solved, spec), time.perf_counter()
            dqtk.quantize(solved, made, stats, progress=False)
            seconds = time.perf_counter() - start
            for row in rows:
                pipe, start = copy.deepcopy(solved), time.perf_counter()
                if row["distilled"]:
                    row |= train(reference, pipe, made.components[0].name, stats, row)
                row["seconds"] = round(seconds + time.perf_counter() - start, 1)
                row |= measure(reference, pipe, prompts, call_kwargs_for(reference) | steps)
                row |= {"bits_per_weight": bits_of(pipe, made), "bytes": bytes_at_16_bit(pipe.components[made.components[0].name])}
                print(f"{model:20} {bits} bit {named(row):44} {said(row)}", flush=True)
                append(row | {"threads": torch.get_num_threads(), "batch": options.batch})


def trainings(options) -> list[dict]:
    """What rows say of each training: none, continuous steps, with discrete ones."""
    found = [{"distilled": 0}]
    found += [{"distilled": options.distill}] if options.distill else []
    return found + ([{"distilled": options.distill, "discrete": options.discrete}] if options.discrete else [])


def train(reference, pipe, component: str, stats, row: dict) -> dict:
    """Train the denoiser as the row has it; the errors on calls that were held out."""
    calls = [call for call in stats.calls if call.component == component]
    exact = exact_outputs({component: reference.components[component]}, stats)[component]
    steps = DiscreteSteps(share=row["discrete"]) if row.get("discrete") else None
    layers = quantized_layers(pipe.components[component]).values()
    books = any(isinstance(layer.spec.weight.format, VectorCodebook) for layer in layers)
    choice = Distill(iterations=row["distilled"], discrete=steps, **(BOOK_RATES if books else {}))
    found = distill(pipe.components[component], calls, exact, choice, name=component, progress=False)
    return {"held_out": [found.before, found.after], "rates": [choice.weight_rate, choice.scale_rate]}


def named(row: dict) -> str:
    """The method, and how it was trained."""
    more = f", {row['discrete']:.0%} discrete" if row.get("discrete") else ""
    return f"{row['method']}, distilled ({row['distilled']}{more})" if row["distilled"] else row["method"]


def said(row: dict) -> str:
    psnr, oracle = row["psnr"], row.get("oracle_change")
    text = f"{psnr[0]:.1f} ({psnr[1]:.1f} to {psnr[2]:.1f}) | {row['sqnr_same'][0]:.1f} | "
    text += "" if oracle is None else f"{oracle[0]:+.3f} ({oracle[1]:+.3f} to {oracle[2]:+.3f})"
    return f"{text} | {row['bits_per_weight']:.2f} | {row['bytes'] / 1e6:.2f} | {row['seconds']:.0f}"


def markdown(models: list[str]) -> str:
    """The newest row of every variant, one table per model."""
    newest = {
        (r["model"], r["setting"], r["method"], r["distilled"], r.get("discrete", 0)): r
        for r in stored()
        if r.get("benchmark") == "vq" and r["model"] in models
    }
    lines = []
    for model in models:
        lines += ["", f"### {model}", "", "| bits | method | PSNR dB | SQNR dB | oracle | bits, all | MB | s |", "|---" * 8 + "|"]
        mine = [row for (name, *_), row in sorted(newest.items(), key=lambda item: item[0]) if name == model]
        lines += [f"| {row['setting']} | {named(row)} | {said(row)} |" for row in mine]
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-sdxl"])
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=[""], metavar="WORD", help="only methods whose name has one of these words")
    parser.add_argument("--distill", type=int, default=0, metavar="ITERATIONS", help="measure again after distillation")
    parser.add_argument("--discrete", type=float, default=0, metavar="SHARE", help="and with steps of words beside it")
    parser.add_argument("--batch", type=int, default=8, help="captions per run of calibration")
    parser.add_argument("--since", metavar="TIME", help="leave out what was measured since (ISO time), as after an interruption")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what is in results.jsonl as Markdown")
    options = parser.parse_args()
    if options.discrete and not options.distill:
        parser.error("--discrete must come with --distill")
    if options.table:
        print(markdown(options.models))
        return
    for model in options.models:
        run(model, options)


if __name__ == "__main__":
    sys.exit(main())
