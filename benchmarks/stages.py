"""Where the time of a generation goes: text encoders, denoiser, decoder and the rest, of the original and of plans, on real masks.

    python benchmarks/stages.py [MODEL ...] [--plans w8a8 paro paro-int8 w8a8+paro-int8] [--densities 0.5 0.3] [--steps 20]
        [--repeats 3]

A plan is a recipe, an attention, or both with a plus between them. Each is calibrated on other captions than the one that is drawn.
In each round every pipeline draws the same prompt from the same noise once, in an order drawn anew; stages are timed by hooks (a
device waits for what it was given before a stage begins and ends). Medians, and ratios to the original's whole time in the same
round. Appends a JSON line per plan to results.jsonl.
"""

import argparse
import copy
import random
import statistics
import time
from collections import Counter
from contextlib import ExitStack
from typing import Any

import torch
from methods import load
from rows import append

import dqtk
from dqtk.nn.attention import blocks_of
from dqtk.recipes import ATTENTION, attention_named, recipe_named
from dqtk.resolve import call_kwargs_for
from dqtk.sites import DENOISERS, TEXT_ENCODERS, components_of

CALIBRATION = ["a large red circle moving left", "a small blue square moving up on a green background"]
PROMPT = "a small yellow square moving right"


class Stages:
    """Seconds per stage of a pipeline's calls while ``with`` it."""

    def __init__(self, pipe: Any):
        self.pipe, self.seconds, self._open = pipe, Counter(), ExitStack()

    def __enter__(self) -> "Stages":
        for name, part in components_of(self.pipe).items():
            stage = "denoiser" if DENOISERS.fullmatch(name) else "text encoder" if TEXT_ENCODERS.fullmatch(name) else None
            if stage is not None:
                begun: list[float] = []
                self._open.callback(part.register_forward_pre_hook(lambda *_, begun=begun: begun.append(now())).remove)
                ended = part.register_forward_hook(lambda *_, begun=begun, stage=stage: self.add(stage, begun.pop()))
                self._open.callback(ended.remove)
        vae = getattr(self.pipe, "vae", None)
        if vae is not None:
            decode = vae.decode

            def timed(*args: Any, **kwargs: Any) -> Any:
                start = now()
                found = decode(*args, **kwargs)
                self.add("decoder", start)
                return found

            vae.decode = timed
            self._open.callback(lambda: vae.__dict__.pop("decode"))
        self.start = now()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds["whole"] = now() - self.start
        self._open.close()

    def add(self, stage: str, start: float) -> None:
        self.seconds[stage] += now() - start


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def planned(reference: Any, name: str, density: float | None, steps: int) -> Any:
    """A copy of the original with a plan in it."""
    pipe = copy.deepcopy(reference)
    words = name.split("+")
    attention = next((attention_named(word, density) for word in words if word in ATTENTION), None)
    recipe = next((recipe_named(word) for word in words if word not in ATTENTION), dqtk.Recipe(name=name, rules=()))
    plan = dqtk.plan(pipe, recipe, attention=attention)
    prompts = CALIBRATION if plan.needs_stats else None
    dqtk.quantize(pipe, plan, prompts=prompts, call_kwargs={"num_inference_steps": steps}, progress=False)
    return pipe


def computed(pipe: Any) -> float | None:
    """Mean share of blocks of its attentions; None without any."""
    found = [blocks.density() for part in components_of(pipe).values() for blocks in blocks_of(part).values()]
    return round(sum(found) / len(found), 4) if found else None


def run(model: str, options: argparse.Namespace) -> None:
    reference = load(model)
    reference.set_progress_bar_config(disable=True)
    pipes = {("original", None): reference}
    for name in options.plans:
        sparse = any(word.startswith("paro") for word in name.split("+"))
        for density in options.densities if sparse else [None]:
            pipes[name, density] = planned(reference, name, density, options.steps)
    kwargs = call_kwargs_for(reference) | {"num_inference_steps": options.steps}
    rounds: list[dict] = []
    for number in range(options.repeats + 1):
        rounds.append({})
        for which in random.sample(list(pipes), len(pipes)):
            with torch.no_grad(), Stages(pipes[which]) as stages:
                pipes[which](PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **kwargs)
            rounds[-1][which] = stages.seconds
        if number == 0:
            rounds.clear()  # kernels are compiled and checked in the first
    for which, pipe in pipes.items():
        stages = {stage: statistics.median(each[which][stage] for each in rounds) for stage in rounds[0][which]}
        stages["rest"] = stages["whole"] - sum(value for stage, value in stages.items() if stage != "whole")
        faster = {
            stage: round(statistics.median(each["original", None][stage] / each[which][stage] for each in rounds), 3)
            for stage in ("whole", "denoiser")
        }
        name, density = which
        words = "  ".join(f"{stage} {1e3 * value:8.1f} ms" for stage, value in stages.items())
        print(f"{model:12} {name:20} {density or '':4}  {words}  faster: {faster['whole']:.2f}, denoiser {faster['denoiser']:.2f}")
        row = {
            "benchmark": "stages",
            "model": model,
            "plan": name,
            "density": density,
            "computed": computed(pipe),
            "faster": faster,
        }
        append(row | {"steps": options.steps, "milliseconds": {stage: round(1e3 * value, 2) for stage, value in stages.items()}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-wan"])
    parser.add_argument("--plans", nargs="+", default=["w8a8", "dense", "paro", "paro-int8", "w8a8+paro-int8"])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for model in options.models:
        run(model, options)


if __name__ == "__main__":
    main()
