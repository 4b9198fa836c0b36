"""What blocks of attention cost in pictures and clips: orders of the tokens, masks, densities, integers.

    python benchmarks/attention_quality.py [MODEL ...] [--num-prompts 8] [--steps 8] [--densities 1 0.5 0.3 0.2] [--bits 16 8 4]
        [--only WORD ...]

Only attention is changed; layers stay as they are, in float32. Every variant draws the same prompts from the same noise as the
untouched pipeline. PSNR: of the pictures (or all frames of a clip), mean over prompts. ``gain``: dB over the same mask and bits
with tokens as they lie, paired, with its interval. Cosine: of final latents. Oracle: score of the embedded reader, less the
untouched pipeline's. Computed: share of the blocks, guards included. Calibrated on other captions. Appends JSON lines to
results.jsonl.
"""

import argparse
import copy
import sys

import numpy as np
import torch
from dqtk.metrics.bootstrap import paired_bootstrap
from methods import PROMPTS, load
from rows import append

import dqtk
from dqtk.nn.attention import blocks_of
from dqtk.prompt_sets import read_prompts
from dqtk.report.generate import image_seed, to_tensor
from dqtk.resolve import call_kwargs_for, oracle_for
from dqtk.sites import components_of
from dqtk.spec import (
    Adaptive,
    AttentionSpec,
    Incoherence,
    Int,
    OutputError,
    PooledBlocks,
    Radial,
    Recall,
    SlidingTile,
    SmoothBoth,
    SmoothKeys,
    StaticBlocks,
    WeightedSum,
)

PLAIN = "as they lie"
ORDERS = {PLAIN: None, "reordered": Recall(), "least incoherence": Incoherence(), "weighted sum": WeightedSum()}
BITS = {
    16: {},
    8: {"qk": Int(bits=8), "pv": Int(bits=8), "smooth": SmoothKeys()},
    4: {"qk": Int(bits=4), "pv": Int(bits=4), "smooth": SmoothBoth()},
}
CAPTIONS = [PROMPTS.with_name(name) for name in ("prompts.txt", "calibration.txt")]
MOTION = [PROMPTS.with_name(f"motion_{path.name}") for path in CAPTIONS]
LEARNING = dqtk.Recipe(name="watch", rules=(dqtk.Rule(spec=AttentionSpec(order=Recall()), why="watched"),))


def variants(densities: list[float], widths: list[int]) -> dict[tuple[float, int, str], AttentionSpec]:
    """(density, bits, name) -> spec; tokens as they lie first, for others are judged against them."""
    found = {}
    for density in densities:
        for bits in widths:
            codes = BITS[bits]
            mask = None if density == 1 else StaticBlocks(density=density)
            for name, order in ORDERS.items():
                if name in (PLAIN, "reordered") or bits == 16:
                    found[density, bits, name] = AttentionSpec(order=order, mask=mask, block=(16, 16), **codes)
            if density < 1 and bits == 16:
                found[density, bits, "sliding tile"] = AttentionSpec(mask=SlidingTile(density=density), block=(16, 16))
                found[density, bits, "radial"] = AttentionSpec(mask=Radial(density=density), block=(16, 16))
                found[density, bits, "pooled"] = AttentionSpec(mask=PooledBlocks(density=density), block=(16, 16))
                found[density, bits, "reordered, pooled"] = AttentionSpec(
                    order=Recall(), mask=PooledBlocks(density=density), block=(16, 16)
                )
                each = StaticBlocks(density=density, together=False)
                found[density, bits, "reordered, a share each"] = AttentionSpec(order=Recall(), mask=each, block=(16, 16))
                measured = StaticBlocks(density=density, by=OutputError())
                found[density, bits, "reordered, by error"] = AttentionSpec(order=Recall(), mask=measured, block=(16, 16))
            if bits == 8:  # 4, 8 or 16, as heads need
                adaptive = codes | {"smooth": SmoothBoth(), "adapt": Adaptive()}
                found[density, bits, "reordered, adaptive"] = AttentionSpec(order=Recall(), mask=mask, block=(16, 16), **adaptive)
    return found


def drawn(pipe, prompts: list[str], steps: int) -> tuple[list, list[torch.Tensor]]:
    """What the pipeline draws for every prompt, pictures as lists of one, clips as lists of frames; and its latents."""
    found, latents, decode = [], [], pipe.vae.decode

    def remembered(z: torch.Tensor, *args, **kwargs):
        latents.append(z.float().clone())
        return decode(z, *args, **kwargs)

    pipe.vae.decode = remembered
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(image_seed(0, index))
        made = pipe(prompt, generator=generator, output_type="pil", **(call_kwargs_for(pipe) | {"num_inference_steps": steps}))
        (one,) = made.images if hasattr(made, "images") else made.frames
        found.append(one if isinstance(one, list) else [one])
    pipe.vae.decode = decode
    return found, latents


def run(model: str, options) -> None:
    """Measure every variant of one model; a row each."""
    reference = load(model)
    reference.set_progress_bar_config(disable=True)
    judged, learned = MOTION if model == "tiny-wan" else CAPTIONS
    prompts, calibration = read_prompts([str(judged)], options.num_prompts), read_prompts([str(learned)], 8)
    stats = dqtk.calibrate(
        reference,
        calibration,
        dqtk.plan(reference, LEARNING),
        batch_size=1,
        call_kwargs={"num_inference_steps": options.steps},
        steps_per_run=options.steps,
        progress=False,
    )
    originals, latents = drawn(reference, prompts, options.steps)
    exact = [to_tensor(frames) for frames in originals]
    oracle = oracle_for(reference, prompts)
    says = [score(oracle, frames, prompt) for frames, prompt in zip(originals, prompts, strict=True)]
    plain: dict[tuple[float, int], torch.Tensor] = {}
    for (density, bits, name), spec in variants(options.densities, options.bits).items():
        if options.only and not any(word in name for word in (PLAIN, *options.only)):
            continue
        pipe = copy.deepcopy(reference)
        plan = dqtk.plan(pipe, dqtk.Recipe(name=name, rules=(dqtk.Rule(spec=spec, why=name),)))
        dqtk.quantize(pipe, plan, stats if plan.needs_stats else None, progress=False)
        frames, moved = drawn(pipe, prompts, options.steps)
        values = torch.stack([decibels(to_tensor(a), b) for a, b in zip(frames, exact, strict=True)])
        base = plain.setdefault((density, bits), values)
        pairs = zip(moved, latents, strict=True)
        cosine = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in pairs]
        scores = [score(oracle, each, prompt) - said for each, prompt, said in zip(frames, prompts, says, strict=True)]
        parts = [part for part in components_of(pipe).values() if blocks_of(part)]
        blocks = [each for part in parts for each in blocks_of(part).values()]
        row = {
            "benchmark": "attention quality",
            "model": model,
            "density": density,
            "bits": bits,
            "variant": name,
            "num_prompts": len(prompts),
            "steps": options.steps,
            "computed": round(sum(each.density() for each in blocks) / len(blocks), 4),  # after drawing: calls have chosen
            "mean_bits": mean_bits([each.spec for each in blocks]),
            "psnr": interval(values),
            "gain": interval(values - base),
            "cosine": round(float(torch.stack(cosine).mean()), 5),
            "oracle": interval(torch.tensor(scores, dtype=torch.float64)) if oracle else None,
        }
        print(
            f"{model:16} {density:4} {bits:3} bits {name:24} PSNR {row['psnr'][0]:6.2f} gain {row['gain']} "
            f"cosine {row['cosine']:.4f} oracle {row['oracle']}",
            flush=True,
        )
        append(row)


def mean_bits(specs: list[AttentionSpec]) -> float:
    """Of queries, keys, probabilities and values, over heads."""
    each = [sum(spec.qk_bits + spec.pv_bits) / 2 / len(spec.qk_bits) if spec.qk_bits else sum(*spec.widths()) / 2 for spec in specs]
    return round(sum(each) / len(each), 2)


def decibels(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """PSNR of numbers in [0, 1], at most 100 dB."""
    return -10 * (got - exact).double().square().mean().clamp(min=1e-10).log10()


def score(oracle, frames: list, prompt: str) -> float:
    """What the embedded reader says of a picture, or of the frames of a clip."""
    if oracle is None:
        return 0.0
    return float(oracle(frames[0] if len(frames) == 1 else np.stack([np.asarray(frame) for frame in frames]), prompt).mean)


def interval(values: torch.Tensor) -> list[float | None]:
    found = paired_bootstrap(values)
    return [None if value is None else round(value, 3) for value in (found.estimate, found.low, found.high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart"])
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--densities", type=float, nargs="+", default=[1, 0.5, 0.3, 0.2])
    parser.add_argument("--bits", type=int, nargs="+", choices=tuple(BITS), default=list(BITS))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="of a variant's name")
    options = parser.parse_args()
    for model in options.models or sys.exit("name a model"):
        run(model, options)


if __name__ == "__main__":
    main()
