"""What knowing the noise level is worth: a calibrated range per interval of it, a correction of the output, where to calibrate,
care for what sees the level only, distillation, another precision in some steps.

    python benchmarks/noise_levels.py [MODEL ...] [--only ranges correction placement temporal tables distillation policy]
        [--variants WORD ...] [--num-prompts 16] [--steps 8 20 50] [--schedulers own ddim] [--slower 10] [--state FOLDER]

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. Everything is calibrated once, at 20 steps of the
pipeline's own scheduler, on 16 other captions (distillation, and what it is judged against: 118, most calls kept where errors count
most; ``--state``: a folder from which that goes on after an interruption), and then judged at other numbers of steps and with
another scheduler. Error: mean square between final latents of the same prompt and noise, as the original's share; ``gain``: mean
over prompts of the logarithm (base 10) of the first variant's error over this one's, with its interval (0.3: half the error).
Policies protect a tenth of the steps: the first or last ones, or those that ``sensitive_steps`` finds on four calibration captions.
Their cost, as the first variant's share: the mean product of weight and input bits over the steps of a run, and the stored bytes.
Tables are those of the original, per prompt where pooled text enters, made for each schedule. Appends JSON lines to results.jsonl.
"""

import argparse
import inspect
import json
import sys
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from dqtk.metrics.bootstrap import paired_bootstrap
from methods import CALIBRATION, PROMPTS, SETTINGS, load, plan_for
from rows import append

import dqtk
from dqtk.calibrate.intervals import by_drift
from dqtk.calibrate.placement import Around, ByDrift, Evenly, Every
from dqtk.calibrate.schedule import run_times
from dqtk.calls import denoisers
from dqtk.checkpoint import quantized_layers
from dqtk.correct.modulation import cache_pipeline
from dqtk.correct.sensitive_steps import sensitive_steps
from dqtk.numerics.storage import layer_bytes
from dqtk.policy import protecting
from dqtk.prompt_sets import read_prompts
from dqtk.recipes import recipe_named
from dqtk.refine.influence import influence_of
from dqtk.report.generate import image_seed
from dqtk.resolve import call_kwargs_for
from dqtk.spec import GPTQ, ByLevel, Distill, Int, LayerSpec, PerLevel

STEPS = 20  # of calibration
BATCH = 8  # captions painted at once: of tiny-sdxl that takes two fifths of the time (one thread of a Xeon with AMX)
ONE = "w8a8-static"
CORRECTED, DISTILLED, TABLES = ", corrected", ", distilled", ", tables of the original"
MORE = slice(48, 166)  # captions of distillation: of 32 it learns what is theirs alone (the lab log)
FRESH = 32  # the first of 16 captions that distillation is judged on: no setting was chosen on them
PAIRED = ("correction", "distillation", "tables")  # every second variant is judged against the one before


def ranges() -> dict[str, dqtk.Recipe]:
    """One range, some, and ranges found at every call: name -> recipe."""
    levels = recipe_named("w8a8-levels")
    last = levels.rules[-1]
    assert last.spec is not None
    assert last.spec.input is not None
    found = {ONE: recipe_named(ONE)}
    for num in (2, 4, 8):
        spec = replace(last.spec, input=replace(last.spec.input, granularity=PerLevel(most=num)))
        found[f"w8a8-levels, at most {num}"] = replace(levels, rules=(*levels.rules[:-1], replace(last, spec=spec)))
    return found | {"w8a8": recipe_named("w8a8")}


def correction() -> dict[str, dqtk.Recipe]:
    """Recipes with and without a corrected output."""
    names = ("w4a8-rtn", "w8a8-static")
    return {name + more: recipe_named(name) for name in names for more in ("", CORRECTED)}


def distillation() -> dict[str, LayerSpec]:
    """Linear layers as the best without training in ``methods.py`` has them, with and without it."""
    smoothed = SETTINGS["W4A8 INT"]["smooth + gptq"]
    three = replace(smoothed, weight=replace(smoothed.weight, format=Int(bits=3)))
    specs = {"w4a8 smooth": smoothed, "w4a4 rotate 64": SETTINGS["W4A4 INT"]["rotate 64 + gptq"], "w3a8 smooth": three}
    return {name + more: spec for name, spec in specs.items() for more in ("", DISTILLED)}


def taught(model: str, captions: list[str], options, folder: Path | None) -> tuple[Distill, ByDrift]:
    """How to distill, and which calls to learn from: of the guided output, as errors count in the final latents.

    Bounded: white noise, with which that is measured, is mended better in early steps than what quantization does (the lab log).
    """
    pipe, file = load(model), None if folder is None else folder / "influence.json"
    if file is not None and file.exists():
        counts = tuple(json.loads(file.read_text()))
    else:
        counts = influence_of(pipe, captions[:1], call_kwargs={"num_inference_steps": STEPS // 2})
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(counts))
    guidance = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    bounded = tuple(min(max(count, 1.0), 4.0) for count in counts)
    rates = {"weight_rate": 0.02, "scale_rate": 0.002, "bias_rate": 0.0003, "matrix_rate": 0.0005}
    rates = {name: float(f"{rate / options.slower:.6g}") for name, rate in rates.items()}
    choice = Distill(iterations=options.iterations, batch=6, guidance=guidance, influence=bounded, **rates)
    return choice, ByDrift(moved=counts, floor=0.1)


def scheduled(pipe, own, name: str):
    """The pipeline with its own scheduler, or with DDIM made from it, as latents need it: by itself it clips them to [-1, 1]."""
    ddim = {"clip_sample": False, "set_alpha_to_one": False}
    pipe.scheduler = DDIMScheduler.from_config(own.config, **ddim) if name == "ddim" else type(own).from_config(own.config)
    return pipe


def latents(pipe, prompts: list[str], steps: int) -> torch.Tensor:
    """Final latents [P, ...], float32."""
    kwargs = call_kwargs_for(pipe) | {"num_inference_steps": steps, "output_type": "latent"}
    seeds = [image_seed(0, index) for index in range(len(prompts))]
    found = []
    for begin in range(0, len(prompts), BATCH):
        noises = [torch.Generator().manual_seed(seed) for seed in seeds[begin : begin + BATCH]]
        found.append(pipe(prompts[begin : begin + BATCH], generator=noises, **kwargs).images.float())
    return torch.cat(found)


def errors(exact: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Mean squared error of every prompt, as the exact latents' share."""
    return (got - exact).square().flatten(1).mean(1) / exact.square().flatten(1).mean(1)


def placement() -> dict[str, dqtk.Recipe]:
    """One recipe that learns from kept calls, by where these lie; ``quantized`` reads the name."""
    return {f"w4a8, calls kept {where}": recipe_named("w4a8") for where in ("evenly", "around 0.4", "by drift", "at every step")}


def placed(name: str, pipe, captions: list[str]) -> dict:
    """Arguments of ``calibrate``: five steps per run, or all."""
    if name.endswith("by drift"):
        kwargs = {"num_inference_steps": STEPS}
        seen = dqtk.calibrate(pipe, captions[:2], dqtk.plan(pipe, ONE), call_kwargs=kwargs, progress=False)
        return {"steps_per_run": 5, "placement": by_drift(seen)}
    if name.endswith("at every step"):
        return {"steps_per_run": STEPS, "placement": Every()}
    return {"steps_per_run": 5, "placement": Around() if name.endswith("around 0.4") else Evenly()}


def temporal() -> dict[str, dqtk.Recipe]:
    """What sees the noise level (time embedding and modulation) in 4 bits, all else as it is: rounded, and reconstructed on some of
    its levels or on all of a run's, which are a finite set (TFMQ-DM, arXiv 2311.16503, there AdaRound)."""
    four = recipe_named("w4a16").main_spec()
    specs = {"temporal w4": four, "temporal w4 gptq": replace(four, solver=GPTQ())}
    specs["temporal w4 gptq, calls kept at every step"] = specs["temporal w4 gptq"]
    specs["temporal w8"] = recipe_named("w8a16").main_spec()
    roles = ("time_embedding", "modulation")
    rest = dqtk.Rule(spec=None, why="as it is")
    return {name: dqtk.Recipe(name=name, rules=(dqtk.Rule(roles=roles, spec=spec, why=name), rest)) for name, spec in specs.items()}


def tables() -> dict[str, dqtk.Recipe]:
    """Everything in 4 bits, what sees the noise level too, with and without care for that; the recipe keeps it at 8 and 16 bits."""
    four = recipe_named("w4a16")
    everything = dqtk.Recipe(name="w4 everywhere", rules=(dqtk.Rule(spec=four.main_spec(), why="all"),))
    return {"w4a16 everywhere": everything, "w4a16 everywhere" + TABLES: everything, "w4a16": four, "w4a16" + TABLES: four}


COMPARISONS = {
    "ranges": ranges,
    "correction": correction,
    "placement": placement,
    "temporal": temporal,
    "tables": tables,
    "distillation": distillation,
}
BASE = "w4a4-rot"
PROTECTIONS = {"16-bit inputs": None, "w8a8": "w8a8", "w8a16": "w8a16"}


def policies(model: str, captions: list[str]) -> dict:
    """``BASE`` alone, and with a tenth of the steps of a run protected: pipelines by name."""
    pipe = load(model)
    kwargs = {"num_inference_steps": STEPS}
    stats = dqtk.calibrate(pipe, captions, dqtk.plan(pipe, BASE), call_kwargs=kwargs, progress=False)
    plain = dqtk.quantize(pipe, BASE, stats, progress=False)
    ranked = sensitive_steps(load(model), plain, captions[:4], num_intervals=STEPS, call_kwargs=kwargs)
    said = ", ".join(f"{part.begin:.2f} {part.error:.2e}" for part in ranked)
    print(f"{model}: steps by error, begin and error: {said}", flush=True)
    worst = [(part.begin, part.end) for part in ranked[: -(-STEPS // 10)]]
    made = {BASE: plain}
    for where, intervals in {"worst tenth": worst, "first tenth": [(0.0, 0.1)], "last tenth": [(0.9, 1.0)]}.items():
        for what, recipe in PROTECTIONS.items():
            if where != "worst tenth" and what != "w8a8":
                continue
            pipe = load(model)
            plan = dqtk.plan(pipe, BASE, policy=protecting(intervals, recipe))
            made[f"{BASE}, {where} {what}"] = dqtk.quantize(pipe, plan, stats, call_kwargs=kwargs, progress=False)
    return made


def cost(pipe, steps: int) -> dict[str, float]:
    """Mean over the steps of a run of weight bits times input bits, weighed by weights; stored bytes of the quantized layers."""
    products = weights = stored = 0.0
    times = run_times(pipe, call_kwargs={"num_inference_steps": steps})
    for part in denoisers(pipe).values():
        for layer in quantized_layers(part).values():
            specs = [layer.spec]
            if isinstance(layer.spec, ByLevel):
                edges, kinds = layer.spec.ascending
                specs = [layer.spec.kinds[kinds[bisect_right(edges, time)]] for time in times]
            mean = sum(spec.weight.bits * (16 if spec.input is None else spec.input.bits) for spec in specs) / len(specs)
            products, weights = products + mean * layer.n * layer.k, weights + layer.n * layer.k
            stored += layer_bytes(layer.spec, layer.n, layer.k, layer.k // layer.taps)
    return {"bops": products / weights, "bytes": stored}


@contextmanager
def cared_for(name: str, pipe, original, prompts: list[str], steps: int):
    """While open, a variant with ``TABLES`` has those of the original for this schedule and these prompts."""
    made = {}
    if name.endswith(TABLES):
        how = {"call_kwargs": {"num_inference_steps": steps}, "evict": False, "original": original}
        made = cache_pipeline(pipe, prompts, per_prompt="unet" in denoisers(pipe), **how)
    try:
        yield
    finally:
        for cache in made.values():
            cache.restore()


def quantized(model: str, recipes: dict[str, dqtk.Recipe | LayerSpec], captions: list[str], options, folder: Path | None) -> dict:
    """Pipelines by name, from calibration at ``STEPS`` steps with its own scheduler. ``folder``: of distillation."""
    made, stats = {}, {}
    distills = any(name.endswith(DISTILLED) for name in recipes)
    lesson, placement = taught(model, captions, options, folder) if distills else (None, None)
    for name, recipe in recipes.items():
        pipe = load(model)
        plan = plan_for(pipe, recipe) if isinstance(recipe, LayerSpec) else dqtk.plan(pipe, recipe)
        corrects = name.endswith(CORRECTED)
        if (kind := (plan.needs_stats, corrects, name if "calls kept" in name else "")) not in stats:
            kwargs = {"num_inference_steps": STEPS}
            batch = 2 if isinstance(recipe, LayerSpec) else 4  # of training too: an iteration is a call
            how = {"batch_size": batch, "call_kwargs": kwargs, "keep_calls": corrects, "progress": False}
            if folder is not None:
                how["output"] = folder / f"calls-{plan.hash}.safetensors"
            where = {"placement": placement} if placement else placed(name, pipe, captions) if kind[2] else {}
            stats[kind] = dqtk.calibrate(pipe, captions, plan, **how, **where)
        used = stats[kind] if plan.needs_stats or corrects else None
        refine = lesson if name.endswith(DISTILLED) else None
        state = None if folder is None else folder / plan.hash
        made[name] = dqtk.quantize(pipe, plan, used, correct=corrects, refine=refine, checkpoint=state, progress=False)
    return made


def run(model: str, comparison: str, options) -> None:
    everything = read_prompts([str(PROMPTS)], None)
    first = FRESH if comparison == "distillation" else 0
    prompts = everything[first : first + options.num_prompts]
    reference = load(model)
    own = reference.scheduler
    captions = everything[MORE if comparison == "distillation" else CALIBRATION]
    if comparison == "policy":
        made = policies(model, captions)
    else:
        recipes = {name: r for name, r in COMPARISONS[comparison]().items() if any(word in name for word in options.variants)}
        folder = options.state / model if options.state and comparison == "distillation" else None
        made = quantized(model, recipes, captions, options, folder)
    for steps in options.steps:
        for scheduler in options.schedulers:
            exact = latents(scheduled(reference, own, scheduler), prompts, steps)
            base = cost(next(iter(made.values())), steps) if comparison == "policy" else {}
            first = None
            for name, pipe in made.items():
                scheduled(pipe, own, scheduler)
                with cared_for(name, pipe, reference, prompts, steps):
                    found = errors(exact, latents(pipe, prompts, steps))
                first = (
                    found
                    if first is None or (comparison in PAIRED and not name.endswith((CORRECTED, DISTILLED, TABLES)))
                    else first
                )
                gain = paired_bootstrap(torch.log10(first / found))
                row = {"benchmark": "noise_levels", "model": model, "steps": steps, "scheduler": scheduler, "variant": name}
                row |= {"num_prompts": len(prompts), "batch": BATCH, "error": float(found.mean())}
                row["gain"] = [gain.estimate, gain.low, gain.high]
                row |= {"iterations": options.iterations, "slower": options.slower} if name.endswith(DISTILLED) else {}
                row |= {f"{kind}_share": value / base[kind] for kind, value in cost(pipe, steps).items()} if base else {}
                said = f"{model:22} {steps:3} {scheduler:5} {name:38} {row['error']:.3e}"
                print(f"{said} gain {gain.estimate:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})", flush=True)
                append(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-sdxl", "tiny-pixart", "tiny-sdxl-stressed", "tiny-pixart-stressed"])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 20, 50])
    parser.add_argument("--schedulers", nargs="+", choices=("own", "ddim"), default=["own", "ddim"])
    parser.add_argument("--only", nargs="+", choices=(*COMPARISONS, "policy"), default=[*COMPARISONS, "policy"])
    parser.add_argument("--variants", nargs="+", default=[""], metavar="WORD", help="only variants with one of these in their name")
    parser.add_argument("--iterations", type=int, default=Distill().iterations, help="of distillation")
    parser.add_argument("--slower", type=float, default=1, metavar="N", help="divide the rates of distillation by this")
    parser.add_argument("--state", type=Path, metavar="FOLDER", help="where distillation goes on from when it is interrupted")
    options = parser.parse_args()
    for model in options.models:
        for comparison in options.only:
            run(model, comparison, options)


if __name__ == "__main__":
    sys.exit(main())
