"""What MixDQ's two transforms are worth: static W8A8, with the constant token apart, with concatenated inputs in parts, with both.

    python benchmarks/mixdq.py [MODEL ...] [--num-prompts 4] [--steps 8]

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. All variants are made from one calibration and judged by
the SQNR of the denoiser's output in dB on kept calls of captions that it has not seen. Appends JSON lines to results.jsonl.
"""

import argparse
import copy
import sys
from collections import Counter
from dataclasses import replace

import torch
from methods import CALIBRATION, PROMPTS, load
from rows import append

import dqtk
from dqtk.allocate.probes import OutputSQNR
from dqtk.checkpoint import replace_layer
from dqtk.prompt_sets import read_prompts
from dqtk.quantize import runtime_layer
from dqtk.recipes import recipe_named
from dqtk.resolve import call_kwargs_for
from dqtk.spec import ConstantToken, ShortcutSplit
from dqtk.stages import solutions

RECIPE = "mixdq-w8a8"
VARIANTS = {
    "static": (),
    "+ constant token": (ConstantToken,),
    "+ split": (ShortcutSplit,),
    "+ constant token + split": (ConstantToken, ShortcutSplit),
}


def with_transforms(kinds: tuple[type, ...]) -> dqtk.Recipe:
    """The recipe with these kinds of transforms only."""
    recipe, rules = recipe_named(RECIPE), []
    for rule in recipe.rules:
        assert rule.spec is not None
        kept = tuple(transform for transform in rule.spec.transforms if isinstance(transform, kinds))
        rules.append(replace(rule, spec=replace(rule.spec, transforms=kept)))
    return replace(recipe, rules=tuple(rules))


@torch.no_grad()
def measure(model: str, num_prompts: int, steps: int) -> None:
    pipe = load(model)
    pipe.set_progress_bar_config(disable=True)
    captions = read_prompts([str(PROMPTS)])
    how = {"call_kwargs": call_kwargs_for(pipe) | {"num_inference_steps": steps}, "progress": False}
    plan = dqtk.plan(pipe, RECIPE)
    name = plan.components[0].name
    denoiser = pipe.components[name]
    stats = dqtk.calibrate(pipe, captions[CALIBRATION][:num_prompts], plan, **how)
    unseen = dqtk.calibrate(pipe, captions[:2], plan, seed=1000, steps_per_run=4, **how)
    probe = OutputSQNR({name: denoiser}, unseen.calls)
    for variant, kinds in VARIANTS.items():
        work = [choice for choice in dqtk.plan(pipe, with_transforms(kinds)).choices if choice.spec is not None]
        twin, found = copy.deepcopy(denoiser), Counter()
        for group in solutions({name: denoiser}, work, stats, sequential=False, max_memory=2**31):
            for choice, solution in group:
                replace_layer(twin, choice.site.path, runtime_layer(denoiser.get_submodule(choice.site.path), solution))
                found.update(type(transform).__name__ for transform in solution.spec.transforms)
        row = {"benchmark": "mixdq", "model": model, "variant": variant, "sqnr_db": probe(name, twin), "layers": dict(found)}
        row |= {"num_prompts": num_prompts, "steps": steps}
        print(f"{model:24} {variant:28} {row['sqnr_db']:6.2f} dB  {dict(found)}", flush=True)
        append(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tiny-sdxl", "tiny-sdxl-stressed", "tiny-pixart-stressed"])
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    for model in args.models:
        measure(model, args.num_prompts, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
