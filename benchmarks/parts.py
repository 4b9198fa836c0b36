"""Input widths per layer, and per layer and part of a run, at equal BOPs: is it worth knowing where in a run a layer is sensitive?

    python benchmarks/parts.py [MODEL ...] [--parts 3] [--shares 0.25 0.5 0.75] [--num-prompts 8] [--steps 20] [--work FOLDER]

Weights are 4 bits, rounded to nearest, stored once; inputs 4, 6 or 8. A share s is a budget of s of the way from 4-bit to 8-bit
inputs everywhere. ``per layer``: one program over layers, noise counted in each part of a run by what it does to the final latents;
``alike``: counted alike; ``per layer and part``: as the former, and mixtures over equal parts of a run are candidates. Layers are
scored on 4 calibration captions. Error: mean square between final latents of the same prompt and noise, as the original's share;
``gain``: mean over prompts of the logarithm (base 10) of the first variant's error over this one's, with its interval. Appends
JSON lines to results.jsonl.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from dqtk.metrics.bootstrap import paired_bootstrap
from methods import CALIBRATION, PROMPTS, load
from noise_levels import errors, latents
from rows import append

import dqtk
from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import Offers
from dqtk.journal import done
from dqtk.prompt_sets import read_prompts
from dqtk.recipes import of_width
from dqtk.spec import ByLevel, canonical

WIDTHS = (4, 6, 8)


def alike(offers: Offers, folder: Path) -> Offers:
    """The same with noise counted alike in all parts, as the journal has it."""
    rows = done(folder, "allocate")
    scores = {(site, spec): rows[f"{site} {spec}"]["sqnr"] for site, spec in offers.found.scores}
    candidates = {
        site: [
            candidate if spec is None else replace(candidate, loss=10 ** (-scores[site, canonical(spec)] / 10))
            for candidate, spec in zip(offers.candidates[site], specs, strict=True)
        ]
        for site, specs in offers.specs.items()
    }
    return replace(offers, candidates=candidates)


def whole_runs(offers: Offers) -> Offers:
    """The same without mixtures."""
    kept = {site: [i for i, spec in enumerate(specs) if not isinstance(spec, ByLevel)] for site, specs in offers.specs.items()}
    names = ("specs", "candidates")
    return replace(offers, **{n: {site: [getattr(offers, n)[site][i] for i in rows] for site, rows in kept.items()} for n in names})


def run(model: str, options, work: Path) -> None:
    everything = read_prompts([str(PROMPTS)], None)
    prompts, captions = everything[: options.num_prompts], everything[CALIBRATION][:4]
    kwargs = {"num_inference_steps": options.steps}
    reference = load(model)
    exact = latents(reference, prompts, options.steps)
    candidates = [of_width(4, inputs) for inputs in WIDTHS]
    how = {"call_kwargs": kwargs, "folder": work / model, "parts": options.parts, "progress": False}
    measured = dqtk.allocate(load(model), captions, candidates, Budget(amount=1e30, unit="bops"), **how)
    mixed = measured.offers
    least, most = (cost(mixed, dqtk.plan(reference, of_width(4, inputs))) for inputs in (WIDTHS[0], WIDTHS[-1]))
    for share in options.shares:
        budget, first = least + share * (most - least), None
        layers = whole_runs(mixed)
        variants = {"per layer, alike": alike(layers, work / model), "per layer": layers, "per layer and part": mixed}
        for variant, offers in variants.items():
            answer = offers.at(budget)
            pipe = dqtk.quantize(load(model), answer.plan, measured.stats, call_kwargs=kwargs, progress=False)
            found = errors(exact, latents(pipe, prompts, options.steps))
            first = found if first is None else first
            gain = paired_bootstrap(torch.log10(first / found))
            row = {"benchmark": "parts", "model": model, "share": share, "parts": options.parts, "variant": variant}
            row |= {"steps": options.steps, "num_prompts": len(prompts), "error": float(found.mean())}
            row |= {"gain": [gain.estimate, gain.low, gain.high], "expected_db": answer.expected}
            print(
                f"{model} {share} {variant:20} {row['error']:.3e} gain {row['gain']} expected {row['expected_db']:.2f} dB",
                flush=True,
            )
            append(row)


def cost(offers, plan: dqtk.Plan) -> float:
    """Of a plan among the candidates, in BOPs."""
    found = ((offers.candidates[c.site.id], offers.specs[c.site.id].index(c.spec)) for c in plan.choices)
    return sum(candidates[index].cost for candidates, index in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-sdxl"])
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--work", type=Path, help="measurements to go on from")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            run(model, options, options.work or Path(folder))


if __name__ == "__main__":
    sys.exit(main())
