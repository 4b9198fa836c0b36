"""Bits per layer at equal bytes: one width everywhere, one program over all layers, groups with budgets of their own, exchanges.

    python benchmarks/mixed_precision.py [MODEL ...] [--bits 5 4.5 4 3.66 3] [--num-prompts 16] [--steps 20] [--trials 200]
        [--scored 4] [--kept-steps 5] [--content-score ssim] [--weigh] [--work FOLDER]
    python benchmarks/mixed_precision.py --since 2026-01-31T09:00   # go on with an interrupted run
    python benchmarks/mixed_precision.py --table

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. Every layer may have 2, 3, 4, 5, 6 or 8 bits (integers
that multiply INT8 inputs, rounded to nearest; scales counted) or stay at 16. A budget of b bits is what b-bit weights everywhere
would store, between two widths the line between their bytes. Variants:

- ``uniform``: the widest single width that stores no more. Where b is no width, ``uniform, interpolated`` is the line between the
  PSNR of both neighbours, prompt by prompt: what no model stores, but nobody should lose to.
- ``single metric``: one program over all layers, largest sum of SQNR in dB (what MixDQ does within a group).
- ``one program``: one program over all layers, least sum of noise powers (``dqtk allocate``).
- ``decoupled``: the groups content and quality have programs of their own, the ratio of their budgets is swept, and the best is
  taken by pictures of 8 captions (``--sweep``). With ``--content-score`` content is measured on pictures, else on SQNR.
- ``exchanged``: the best of one program and all ratios, then ``--trials`` exchanges of levels (``--switch``).

Noise counts alike at all noise levels; with ``--weigh`` in each quarter of a run by what it does to the final latents of two
captions.

Layers are scored on 4 captions (``--scored``), plans judged on 8 others, and everything here is then measured on prompts that
neither saw: PSNR against the original's picture of the same prompt and noise, its gain over ``uniform`` and over ``one program``
(paired), the oracle's change. Appends JSON lines to results.jsonl; seconds are not measured.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from dqtk.metrics.bootstrap import paired_bootstrap
from dqtk.metrics.psnr import CAP_DB, psnr
from methods import CALIBRATION, PROMPTS, load
from rows import append, stored

import dqtk
from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import Offers
from dqtk.allocate.groups import CONTENT, QUALITY, groups_of
from dqtk.allocate.parts import MOST, RunParts
from dqtk.allocate.probes import OutputSQNR, PictureScore
from dqtk.allocate.reliability import describe_reliability, monotone
from dqtk.allocate.search import ONE, exchanged, ranked, swept
from dqtk.allocate.sensitivity import measure
from dqtk.allocate.weights import Counts, weighed, weights_of_parts
from dqtk.allocate.whole import Judged, Layers, OutputNoise, Pictures
from dqtk.prompt_sets import read_prompts
from dqtk.recipes import of_width, recipe_named
from dqtk.report.generate import generate, make_tasks, to_tensor
from dqtk.resolve import call_kwargs_for, oracle_for, scores
from dqtk.sites import components_of
from dqtk.spec import describe

WIDTHS = (2, 3, 4, 5, 6, 8)
NAME, UNIFORM, LINE = "mixed_precision", "uniform", "uniform, interpolated"
VARIANTS = (UNIFORM, LINE, "single metric", ONE, "decoupled", "exchanged")


class World:
    """A model with everything about it that no budget changes."""

    def __init__(self, model: str, options, work: Path):
        self.pipe, self.options, self.work = load(model), options, work / model
        self.work.mkdir(parents=True, exist_ok=True)
        everything = read_prompts([str(PROMPTS)], None)
        self.prompts, captions = everything[: options.num_prompts], everything[CALIBRATION]
        self.kwargs = call_kwargs_for(self.pipe) | {"num_inference_steps": options.steps}
        self.plans = {bits: dqtk.plan(self.pipe, of_width(bits)) for bits in WIDTHS}
        learning = dqtk.plan(self.pipe, recipe_named("w4a8"))
        how = {"batch_size": 4, "call_kwargs": self.kwargs, "steps_per_run": options.kept_steps, "progress": False}
        self.stats = dqtk.calibrate(self.pipe, captions[: options.scored], learning, **how)
        judges = dqtk.calibrate(self.pipe, captions[4:12], learning, seed=1_000_003, **how)
        names = {component.name for component in learning.components}
        self.parts = {name: part for name, part in components_of(self.pipe).items() if name in names}
        self.run = RunParts.of_run(MOST, self.pipe, captions[:1], self.kwargs) if options.weigh else None
        self.groups = groups_of([choice.site for choice in self.plans[4].choices])
        self.layers = Layers(self.parts)
        self.found, self.losses = self.scored("sqnr", None), dict.fromkeys((CONTENT, QUALITY), "noise")
        self.monotone = [monotone(list(self.plans.values()), self.found, to_the_floor=to) for to in (False, True)]
        counts = None
        if self.run is not None:
            plans = list(self.plans.values())
            asked = (self.pipe, self.parts, plans, self.found, self.stats, len(self.run), captions[:2], self.kwargs)
            counts = Counts(self.run, weights_of_parts(*asked, self.work / "sqnr"))
            self.found = weighed(self.found, counts.weights)
            print(f"{model}: noise counts {counts.weights} in equal parts of a run", flush=True)
        self.found_of_groups, self.losses_of_groups = self.found, self.losses
        if options.content_score:
            score = self.pictures(captions[: options.scored], options.content_score)
            self.found_of_groups = self.scored("groups", score)
            self.losses_of_groups = {CONTENT: score.loss, QUALITY: "noise"}
        self.layers.complete(list(self.plans.values()), self.stats)
        calls = [[call for call in judges.calls if call.run == run] for run in (0, 1)]
        task = {"model": model, "options": f"{options.steps} steps", "weights": [] if counts is None else list(counts.weights)}
        on_pictures = Pictures(self.pictures(captions[4:12], "psnr"))
        self.search, self.confirm, self.painted = (
            Judged(self.layers, judge, self.work / name, task)
            for name, judge in (
                ("search", OutputNoise(self.parts, calls[0], counts=counts)),
                ("confirm", OutputNoise(self.parts, calls[1], counts=counts)),
                ("pictures", on_pictures),
            )
        )
        self.oracle = oracle_for(self.pipe, self.prompts)
        self.exact = self.paint({})

    def pictures(self, prompts: list[str], name: str) -> PictureScore:
        return PictureScore(self.pipe, prompts, scores()[name], seed=7, batch_size=4, call_kwargs=self.kwargs)

    def scored(self, name: str, content: PictureScore | None):
        probe = OutputSQNR(self.parts, self.stats.calls, self.run)
        probes, plans = {CONTENT: content or probe, QUALITY: probe}, list(self.plans.values())
        found = measure(self.pipe, plans, self.stats, probes, self.groups, folder=self.work / name, layers=self.layers)
        print(describe_reliability(plans, found), flush=True)
        return found

    def paint(self, picked) -> SimpleNamespace:
        """What is painted with a plan's layers in the model."""
        with self.layers.put(picked):
            return painted(self.pipe, self.prompts, self.kwargs, self.oracle)

    def judged(self, picked) -> SimpleNamespace:
        """PSNR of every prompt [P], and the oracle's changes [P]."""
        found = self.paint(picked)
        return SimpleNamespace(
            psnr=psnr(found.images, self.exact.images).clamp(max=CAP_DB), oracle=found.oracle - self.exact.oracle
        )

    def bytes_of(self, plan: dqtk.Plan) -> int:
        return sum(choice.bytes_after for choice in plan.choices)

    def budget(self, bits: float) -> Budget:
        """Bytes of b-bit weights everywhere, or between those of the widths around b."""
        low, high = around(bits)
        share = 0.0 if low == high else (bits - low) / (high - low)
        total = (1 - share) * self.bytes_of(self.plans[low]) + share * self.bytes_of(self.plans[high])
        return Budget(amount=total, unit="bytes")

    def offers(self, bits: float, losses: dict[str, str] | None = None, of_groups: bool = False) -> Offers:
        found = self.found_of_groups if of_groups else self.found
        kinds = losses or (self.losses_of_groups if of_groups else self.losses)
        alike = not (of_groups and self.options.content_score)
        return Offers.of(list(self.plans.values()), found, self.budget(bits), kinds, self.groups, alike=alike)


def around(bits: float) -> tuple[int, int]:
    """The widths below and above, or twice the width itself."""
    return max(width for width in WIDTHS if width <= bits), min(width for width in WIDTHS if width >= bits)


def picked_of(plan: dqtk.Plan) -> dict:
    return {choice.site.id: choice.spec for choice in plan.choices}


def answers(world: World, bits: float) -> dict:
    """Variant -> what is picked; None: the line between two widths."""
    low, high = around(bits)
    one = world.offers(bits).allocated()
    entries = ranked(swept(world.offers(bits, of_groups=True)), world.search, world.painted)
    ratios = [entry for entry in entries if entry.name != ONE]
    best = min([one, entries[0].made], key=lambda made: world.painted(made.picked))
    better, said = exchanged(world.offers(bits), best, world.search, world.confirm, trials=world.options.trials)
    print(f"  {ratios[0].name if ratios else 'none'} of {len(ratios)} ratios; {said}", flush=True)
    single = world.offers(bits, losses={CONTENT: "score", QUALITY: "score"}).allocated()
    found = {UNIFORM: picked_of(world.plans[low])} | ({LINE: None} if low < high else {})
    made = {"single metric": single, ONE: one} | ({"decoupled": ratios[0].made} if ratios else {}) | {"exchanged": better}
    return found | {name: plan.picked for name, plan in made.items()}


def run(model: str, options, work: Path) -> None:
    fixed = {"benchmark": NAME, "model": model, "num_prompts": options.num_prompts, "steps": options.steps}
    fixed |= {"trials": options.trials, "content_score": options.content_score or "sqnr", "weighed": options.weigh}
    candidates = "; ".join(describe(of_width(bits).main_spec()) for bits in WIDTHS)
    fixed |= {"scored": options.scored, "kept_steps": options.kept_steps, "candidates": candidates}
    done = [row for row in stored() if options.since and fixed.items() <= row.items() and row["created"] >= options.since]
    left = [bits for bits in options.bits if not any(row.get("bits") == bits and row["variant"] == "exchanged" for row in done)]
    if not left:
        return
    world = World(model, options, work)
    (in_order, several), (to_the_floor, _) = world.monotone
    if not any(row["variant"] == "sensitivity" for row in done):
        row = {"monotone": in_order, "monotone_to_the_floor": to_the_floor, "sites": several, "widths": list(WIDTHS)}
        append(fixed | {"variant": "sensitivity"} | row)
    uniform = {width: world.judged(picked_of(world.plans[width])) for width in {w for bits in left for w in around(bits)}}
    num_weights = sum(choice.site.num_weights for choice in world.plans[4].choices)
    for bits in left:
        low, high = around(bits)
        one = None
        for variant, picked in answers(world, bits).items():
            row = fixed | {"bits": bits, "variant": variant}
            if picked is None:
                share = (bits - low) / (high - low)
                line = [
                    (1 - share) * getattr(uniform[low], kind) + share * getattr(uniform[high], kind) for kind in ("psnr", "oracle")
                ]
                judged, row["stored_bits"] = SimpleNamespace(psnr=line[0], oracle=line[1]), None
            else:
                judged = uniform[low] if variant == UNIFORM else world.judged(picked)
                choices = [dqtk_choice(world, site, spec) for site, spec in picked.items()]
                row["stored_bits"] = round(8 * sum(choice.bytes_after for choice in choices) / num_weights, 3)
                words = Counter(16 if spec is None else spec.weight.bits for spec in picked.values())
                row["layers"] = {str(width): words[width] for width in sorted(words)}
                row["sqnr_search"] = round(-10 * float(torch.tensor(world.search(picked)).log10()), 3)
            row["psnr"], row["oracle_change"] = interval(judged.psnr), interval(judged.oracle)
            row["gain"] = interval(judged.psnr - uniform[low].psnr)
            one = judged if variant == ONE else one
            row |= {"gain_over_one": interval(judged.psnr - one.psnr)} if one is not None and one is not judged else {}
            over = f" over one program {row['gain_over_one']}" if "gain_over_one" in row else ""
            said = f"PSNR {row['psnr']} gain {row['gain']}{over} oracle {row['oracle_change']} {row['stored_bits']} bits stored"
            print(f"{model:22} {bits:5} {variant:22} {said}", flush=True)
            append(row)


def painted(pipe, prompts: list[str], kwargs: dict, oracle) -> SimpleNamespace:
    """The pictures of all prompts: tensor [P, 3, H, W], and the oracle's means [P]."""
    tasks, images = make_tasks(prompts, 0, 1), []
    for start in range(0, len(tasks), 8):
        images += generate(pipe, tasks[start : start + 8], kwargs).images
    said = [oracle(image, prompt).mean for image, prompt in zip(images, prompts, strict=True)]
    return SimpleNamespace(images=to_tensor(images), oracle=torch.tensor(said, dtype=torch.float64))


def dqtk_choice(world: World, site: str, spec):
    """A choice of some plan with this spec, for its bytes."""
    for plan in world.plans.values():
        for choice in plan.choices:
            if choice.site.id == site and choice.spec == spec:
                return choice
    kept = next(choice for choice in world.plans[4].choices if choice.site.id == site)
    return SimpleNamespace(bytes_after=kept.bytes_before)


def interval(values: torch.Tensor) -> list[float | None]:
    found = paired_bootstrap(values)
    return [None if value is None else round(value, 3) for value in (found.estimate, found.low, found.high)]


def markdown(models: list[str]) -> str:
    """The newest row of every model, budget and variant, a table per model."""
    newest = {
        (r["model"], r["bits"], r["variant"]): r
        for r in stored()
        if r.get("benchmark") == NAME and "bits" in r and not r.get("weighed")
    }
    lines = []
    for model in models:
        mine = {key[1:]: row for key, row in newest.items() if key[0] == model}
        if not mine:
            continue
        some = next(iter(mine.values()))
        lines += ["", f"### {model}, {some['num_prompts']} prompts, {some['steps']} steps, {some['trials']} exchanges", ""]
        lines += ["| bits | " + " | ".join(VARIANTS) + " |", "|---" * (1 + len(VARIANTS)) + "|"]
        for bits in sorted({key[0] for key in mine}, reverse=True):
            lines.append(f"| {bits:g} | " + " | ".join(cell(mine.get((bits, variant))) for variant in VARIANTS) + " |")
    return "\n".join(lines[1:])


def cell(row: dict | None) -> str:
    """PSNR, its gain over one width with its interval, the oracle's change."""
    if row is None:
        return ""
    gain, oracle = row["gain"], row["oracle_change"]
    words = "" if row["variant"] == UNIFORM else f" ({gain[0]:+.1f}: {gain[1]:+.1f} to {gain[2]:+.1f})"
    return f"{row['psnr'][0]:.1f}{words}, {oracle[0]:+.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-sdxl", "tiny-pixart-stressed", "tiny-sdxl-stressed"])
    parser.add_argument("--bits", type=float, nargs="+", default=[5, 4.5, 4, 3.66, 3])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scored", type=int, choices=range(1, 5), default=4, help="captions that layers are scored on")
    parser.add_argument("--kept-steps", type=int, default=5, help="of every run whose calls layers and plans are judged on")
    parser.add_argument("--trials", type=int, default=200, help="exchanges per budget")
    parser.add_argument("--weigh", action="store_true", help="noise counts by its harm")
    parser.add_argument("--content-score", metavar="NAME", help="of pictures, for the content group, such as ssim; slow")
    parser.add_argument(
        "--work", type=Path, help="folder of what was scored; an interrupted run goes on there (default: forgotten)"
    )
    parser.add_argument("--since", metavar="TIME", help="leave out budgets that were measured since (ISO time)")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what is in results.jsonl as Markdown")
    options = parser.parse_args()
    if options.table:
        print(markdown(options.models))
        return
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            run(model, options, options.work or Path(folder))


if __name__ == "__main__":
    sys.exit(main())
