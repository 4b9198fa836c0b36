"""MixDQ's chain: static W8A8, the constant token apart, concatenated inputs in parts, both, and bits per layer at equal BOPs.

    python benchmarks/mixdq.py [MODEL ...] [--num-prompts 4] [--num-pictures 8] [--steps 8] [--kept-steps 10] [--work FOLDER]
    python benchmarks/mixdq.py --since 2026-01-31T09:00   # go on with an interrupted run
    python benchmarks/mixdq.py --table

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. All variants are made from one calibration. The last
step chooses among ``mixdq-w8a8``'s own layers, the same with 4- and 6-bit weights, 8-bit weights with 16-bit inputs, and 16
bits, at the BOPs of W8A8 everywhere. Judged by the SQNR of the denoiser's output on kept calls of captions that nothing has
seen, and by the PSNR of pictures against the original's of the same prompt and noise: 95 % intervals, gains over static W8A8
paired. Appends JSON lines to results.jsonl; seconds are not measured.
"""

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from dqtk.metrics.psnr import CAP_DB, psnr
from methods import CALIBRATION, PROMPTS, load
from mixed_precision import interval, painted
from rows import append, stored

import dqtk
from dqtk.allocate.budget import Budget
from dqtk.allocate.from_model import answered
from dqtk.allocate.prices import price, shapes_of_a_step
from dqtk.allocate.probes import OutputSQNR
from dqtk.allocate.whole import Layers
from dqtk.prompt_sets import read_prompts
from dqtk.recipes import recipe_named
from dqtk.resolve import call_kwargs_for, oracle_for
from dqtk.spec import ConstantToken, Int, LayerSpec, PerChannel, ShortcutSplit, TensorSpec

NAME, RECIPE, STATIC, ALLOCATED = "mixdq", "mixdq-w8a8", "static", "+ constant token + split + allocation"
VARIANTS = {
    STATIC: (),
    "+ constant token": (ConstantToken,),
    "+ split": (ShortcutSplit,),
    "+ constant token + split": (ConstantToken, ShortcutSplit),
}
ORDER = (*VARIANTS, ALLOCATED)


def changed(name: str, change) -> dqtk.Recipe:
    """The recipe with every rule's spec changed by a function."""
    recipe = recipe_named(RECIPE)
    return replace(recipe, name=name, rules=tuple(replace(rule, spec=change(rule.spec)) for rule in recipe.rules))


def with_transforms(kinds: tuple[type, ...]) -> dqtk.Recipe:
    """The recipe with these kinds of transforms only."""
    return changed(RECIPE, lambda spec: replace(spec, transforms=tuple(t for t in spec.transforms if isinstance(t, kinds))))


def with_weights(bits: int) -> dqtk.Recipe:
    """The recipe with narrower weights, but in the first and last layer."""
    weight = TensorSpec(format=Int(bits=bits), granularity=PerChannel())
    return changed(f"mixdq-w{bits}a8", lambda spec: spec if spec.input is None else replace(spec, weight=weight))


def with_wide_inputs() -> dqtk.Recipe:
    """8-bit weights alone: an input as it is needs no constant token, weights of unlike halves need scales of their own."""

    def alone(spec: LayerSpec) -> LayerSpec:
        return LayerSpec(weight=spec.weight, transforms=tuple(t for t in spec.transforms if isinstance(t, ShortcutSplit)))

    return changed("mixdq-w8a16", alone)


class World:
    """A model, what it was calibrated on, and what it is judged by."""

    def __init__(self, model: str, options):
        self.pipe = load(model)
        self.pipe.set_progress_bar_config(disable=True)
        captions = read_prompts([str(PROMPTS)])
        self.kwargs = call_kwargs_for(self.pipe) | {"num_inference_steps": options.steps}
        how = {"call_kwargs": self.kwargs, "progress": False}
        plan = dqtk.plan(self.pipe, RECIPE)
        self.name = plan.components[0].name
        self.parts = {self.name: self.pipe.components[self.name]}
        some = captions[CALIBRATION][: options.num_prompts]
        self.stats = dqtk.calibrate(self.pipe, some, plan, keep_calls=True, steps_per_run=options.kept_steps, **how)
        unseen = dqtk.calibrate(self.pipe, captions[:2], plan, keep_calls=True, seed=1000, steps_per_run=4, **how)
        self.probe = OutputSQNR(self.parts, unseen.calls)
        self.prompts = captions[: options.num_pictures]
        self.oracle = oracle_for(self.pipe, self.prompts)
        self.exact = painted(self.pipe, self.prompts, self.kwargs, self.oracle)

    def bops(self, plan: dqtk.Plan) -> float:
        """Of one step."""
        calls = shapes_of_a_step(self.parts, self.stats.calls, [choice.site for choice in plan.choices])
        return sum(price(choice.site, choice.spec, "bops", calls=calls) for choice in plan.choices)

    def allocated(self, folder: Path) -> dqtk.Plan:
        """Within the BOPs of the recipe everywhere."""
        candidates = [recipe_named(RECIPE), with_weights(6), with_weights(4), with_wide_inputs()]
        budget = Budget(amount=self.bops(dqtk.plan(self.pipe, RECIPE)), unit="bops")
        return dqtk.allocate(self.pipe, None, candidates, budget, stats=self.stats, folder=folder, progress=False).plan

    @torch.no_grad()
    def judged(self, plan: dqtk.Plan) -> tuple[dict, torch.Tensor]:
        """What a row says of a plan, and PSNR of every prompt [P]."""
        plan, layers = answered(plan, self.parts, self.stats), Layers(self.parts)
        layers.complete([plan], self.stats)
        found = Counter(type(t).__name__ for layer in layers.made.values() for t in layer.spec.transforms)
        widths = Counter(describe(choice.spec) for choice in plan.choices)
        with layers.put({choice.site.id: choice.spec for choice in plan.choices}):
            sqnr, pictures = self.probe(self.name), painted(self.pipe, self.prompts, self.kwargs, self.oracle)
        values = psnr(pictures.images, self.exact.images).clamp(max=CAP_DB)
        row = {"sqnr_db": sqnr, "transforms": dict(found), "layers": dict(widths), "bops": self.bops(plan)}
        row |= {"psnr": interval(values), "oracle_change": interval(pictures.oracle - self.exact.oracle)}
        return row, values


def describe(spec: LayerSpec | None) -> str:
    if spec is None:
        return "16 bits"
    return f"W{spec.weight.bits}A{16 if spec.input is None else spec.input.bits}"


def run(model: str, options, work: Path) -> None:
    fixed = {"benchmark": NAME, "model": model, "num_prompts": options.num_prompts, "num_pictures": options.num_pictures}
    fixed |= {"steps": options.steps, "kept_steps": options.kept_steps}
    done = {
        row["variant"] for row in stored() if options.since and fixed.items() <= row.items() and row["created"] >= options.since
    }
    left = [variant for variant in ORDER if variant not in done]
    if not left:
        return
    world = World(model, options)
    _, base = world.judged(dqtk.plan(world.pipe, with_transforms(())))
    for variant in left:
        folder = work / f"{model}-{options.num_prompts}-{options.steps}-{options.kept_steps}"
        plan = world.allocated(folder) if variant == ALLOCATED else dqtk.plan(world.pipe, with_transforms(VARIANTS[variant]))
        row, values = world.judged(plan)
        row["gain"] = interval(values - base)
        said = f"{row['sqnr_db']:6.2f} dB, PSNR {row['psnr']}, gain {row['gain']}, oracle {row['oracle_change']}"
        print(f"{model:22} {variant:38} {said} {row['transforms']} {row['layers']}", flush=True)
        append(fixed | {"variant": variant} | row)


def markdown(models: list[str]) -> str:
    """The newest rows with pictures, a line per variant, a column per model: PSNR, its gain with the interval, SQNR."""
    newest = {(r["model"], r["variant"]): r for r in stored() if r.get("benchmark") == NAME and "psnr" in r}
    models = [model for model in models if any(key[0] == model for key in newest)]
    lines = ["| | " + " | ".join(models) + " |", "|---" * (1 + len(models)) + "|"]
    for variant in ORDER:
        cells = [newest.get((model, variant)) for model in models]
        words = ["" if r is None else f"{r['psnr'][0]:.1f}{said(r)}, {r['sqnr_db']:.1f}" for r in cells]
        lines.append(f"| {variant} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def said(row: dict) -> str:
    low, middle, high = row["gain"][1], row["gain"][0], row["gain"][2]
    return "" if row["variant"] == STATIC else f" ({middle:+.1f}: {low:+.1f} to {high:+.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["tiny-sdxl", "tiny-sdxl-stressed", "tiny-pixart-stressed"])
    parser.add_argument("--num-prompts", type=int, default=4, help="captions to calibrate on")
    parser.add_argument("--num-pictures", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--kept-steps", type=int, default=10, help="of every run, whose calls layers are scored on")
    parser.add_argument("--work", type=Path, help="folder of what was scored; an interrupted run goes on there")
    parser.add_argument("--since", metavar="TIME", help="leave out what was measured since (ISO time)")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what is in results.jsonl as Markdown")
    options = parser.parse_args()
    if options.table:
        print(markdown(options.models))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            run(model, options, options.work or Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
