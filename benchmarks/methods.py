"""Formats, solvers and transforms against each other and against what users would pick: same layers, same prompts and seeds.

    python benchmarks/methods.py [MODEL ...] [--num-prompts 16] [--steps 20] [--only SETTING ...] [--methods WORD ...] [--no-peers]
    python benchmarks/methods.py --since 2026-01-31T09:00   # go on with an interrupted run
    python benchmarks/methods.py --table

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. Every variant quantizes the same linear layers of the
denoiser (what ``w8a8`` would, without convolutions and modulation, which no peer takes), so weights and bytes compare. Solvers
learn on 16 other captions. Peers run where they are installed (torchao, optimum-quanto, sdnq); a setting that a peer lacks is left
out and said so. Appends one JSON line per variant to benchmarks/results.jsonl; seconds are not measured here.
"""

import argparse
import importlib
import sys
import warnings
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from dqtk.pipelines.tiny.stress import stress
from rows import append, stored

import dqtk
from dqtk.numerics.codebook import bitmod, nf4
from dqtk.prompt_sets import read_prompts
from dqtk.recipes import recipe_named
from dqtk.report.compare import compare
from dqtk.report.sizes import bytes_at_16_bit
from dqtk.resolve import call_kwargs_for, oracle_for
from dqtk.sources import load_pipeline
from dqtk.spec import (
    GPTQ,
    MSE,
    RTN,
    AdaRound,
    ConstantToken,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Smooth,
    TensorSpec,
    TwoLevel,
)

PROMPTS = Path(__file__).parent.parent / "pipelines" / "tiny" / "prompts.txt"
CALIBRATION = slice(150, 166)  # captions that no measurement uses
STRESSED = "-stressed"

E2M1 = Float(exponent=2, mantissa=1)
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())
A4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64), range=Dynamic())
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
W4_GROUP = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64), range=MSE())
WFP4 = TensorSpec(format=E2M1, granularity=PerGroup(size=64), range=MSE(steps=28, least=0.6, most=2.0))
NV, NV_PLAIN = (TensorSpec(format=E2M1, granularity=E4M3Group(), **how) for how in ({"range": MSE()}, {}))
ANV = TensorSpec(format=E2M1, granularity=E4M3Group(), range=Dynamic())
MX = TensorSpec(format=E2M1, granularity=E8M0Group(), range=MSE())
AMX = TensorSpec(format=E2M1, granularity=E8M0Group(), range=Dynamic())
A8_STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())
W4_SMALL = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=32), range=MSE())
W4_ZERO = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64), range=MSE())
WNF4 = TensorSpec(format=nf4(), granularity=PerGroup(size=64), range=MSE())
WBITMOD = TensorSpec(format=bitmod(4), granularity=PerGroup(size=64), range=MSE())
BRANCH = LowRank(rank=1)  # 0.17 bits per weight where both sides are 192; groups of 32 instead of 64 cost 0.25


def spec(weight: TensorSpec, given: TensorSpec | None, *transforms, solver=RTN(), low_rank=None) -> LayerSpec:  # noqa: B008, frozen
    return LayerSpec(weight=weight, input=given, solver=solver, transforms=transforms, low_rank=low_rank)


LEARNED = AdaRound(iterations=400)
SETTINGS = {
    "8 bit": {name: recipe_named(name).main_spec() for name in ("w8a8", "w8a8-static", "fp8", "fp8-static")}
    | {
        "w8a8 smooth": spec(W8, A8, Smooth()),
        "w8a8-static smooth": spec(W8, A8_STATIC, Smooth()),
        "w8a8-static bias": LayerSpec(weight=W8, input=A8_STATIC, correct_bias=True),
    },
    "W4A16": {
        "rtn": spec(W4_ZERO, None),
        "gptq": spec(W4_ZERO, None, solver=GPTQ()),
        "nf4 rtn": spec(WNF4, None),
        "nf4 gptq": spec(WNF4, None, solver=GPTQ()),
        "bitmod gptq": spec(WBITMOD, None, solver=GPTQ()),
    },
    "W4A8 INT": {
        "rtn": spec(W4, A8),
        "viditq-w4a8": recipe_named("viditq-w4a8").main_spec(),
        "adaround": spec(W4, A8, solver=LEARNED),
        "gptq": spec(W4, A8, solver=GPTQ()),
        "smooth + rtn": spec(W4, A8, Smooth()),
        "rotate + gptq": spec(W4, A8, Hadamard(), solver=GPTQ()),
        "smooth + gptq": spec(W4, A8, Smooth(), solver=GPTQ()),
        "constant token + smooth + gptq": spec(W4, A8, ConstantToken(), Smooth(), solver=GPTQ()),
    },
    "W4A8 FP": {
        "rtn": spec(WFP4, AFP8),
        "adaround": spec(WFP4, AFP8, solver=LEARNED),
        "gptq": spec(WFP4, AFP8, solver=GPTQ()),
        "smooth + gptq": spec(WFP4, AFP8, Smooth(), solver=GPTQ()),
        "fp4 (2500 iterations)": recipe_named("fp4"),
    },
    "W4A4 INT": {
        "rtn": spec(W4_GROUP, A4),
        "gptq": spec(W4_GROUP, A4, solver=GPTQ()),
        "smooth + gptq": spec(W4_GROUP, A4, Smooth(), solver=GPTQ()),
        "rotate + gptq": spec(W4_GROUP, A4, Hadamard(), solver=GPTQ()),
        "w4a4-rot": recipe_named("w4a4-rot"),
        "rotate regular + gptq": spec(W4_GROUP, A4, Hadamard(regular=True), solver=GPTQ()),
        "smooth + rotate + gptq": spec(W4_GROUP, A4, Smooth(), Hadamard(), solver=GPTQ()),
        "constant token + smooth + gptq": spec(W4_GROUP, A4, ConstantToken(), Smooth(), solver=GPTQ()),
        "rotate 64 + gptq": spec(W4_GROUP, A4, Hadamard(block=64), solver=GPTQ()),
        "constant token + rotate 64 + gptq": spec(W4_GROUP, A4, ConstantToken(), Hadamard(block=64), solver=GPTQ()),
        "smooth + rank 1 + gptq": spec(W4_GROUP, A4, Smooth(), solver=GPTQ(), low_rank=BRANCH),
        "smooth + gptq, weights in groups of 32": spec(W4_SMALL, A4, Smooth(), solver=GPTQ()),
        "w4a4-svd (rank 32)": recipe_named("w4a4-svd"),
    },
    "FP4": {
        "llm-fp4": recipe_named("llm-fp4").main_spec(),
        "nvfp4 rtn, no sweep": spec(NV_PLAIN, ANV),
        "nvfp4 rtn": spec(NV, ANV),
        "nvfp4 gptq": spec(NV, ANV, solver=GPTQ()),
        "nvfp4 smooth + gptq": spec(NV, ANV, Smooth(), solver=GPTQ()),
        "mxfp4 rtn": spec(MX, AMX),
        "mxfp4 gptq": spec(MX, AMX, solver=GPTQ()),
        "mxfp4 smooth + gptq": spec(MX, AMX, Smooth(), solver=GPTQ()),
    },
}
# Watches everything that any of them asks for: ranges, and calls to learn from.
WATCHED = spec(W4, A8_STATIC, solver=GPTQ())


def load(model: str):
    """A pipeline of one's own; embedded ones also as their stressed twins."""
    pipe = load_pipeline(model.removesuffix(STRESSED))
    if not model.endswith(STRESSED):
        return pipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says which outliers this pipeline cannot have
        return stress(pipe)


def plan_for(pipe, what: LayerSpec | dqtk.Recipe) -> dqtk.Plan:
    """The linear layers that every variant and peer takes, with this spec or what this recipe has for them."""
    usual = dqtk.plan(pipe, "w8a8").choices
    taken = {c.site.path for c in usual if c.spec is not None and c.site.kind == "linear" and c.spec.input is not None}
    if isinstance(what, dqtk.Recipe):
        return dqtk.plan(pipe, what, overrides={c.site.path: None for c in usual if c.site.path not in taken})
    rules = tuple(dqtk.Rule(pattern=path, spec=what, why="benchmark") for path in sorted(taken))
    return dqtk.plan(pipe, dqtk.Recipe(name="benchmark", rules=rules))


# --- peers -----------------------------------------------------------------------------------------------------------


def torchao(module, paths: set[str], config: str, **options) -> None:
    quantization = importlib.import_module("torchao.quantization")
    source = quantization if hasattr(quantization, config) else importlib.import_module("torchao.prototype.mx_formats")
    quantization.quantize_(module, getattr(source, config)(**options), filter_fn=lambda layer, path: path in paths)


def torchao_int4(module, paths: set[str], config: str, **options) -> None:
    granularity = importlib.import_module("torchao.quantization.granularity").PerGroup(64)
    torchao(module, paths, config, weight_dtype=torch.int4, **options, **{GRANULARITY[config]: granularity})


GRANULARITY = {"Int8DynamicActivationIntxWeightConfig": "weight_granularity", "IntxWeightOnlyConfig": "granularity"}


def quanto(module, paths: set[str], weights: str, activations: str | None = None) -> None:
    found = importlib.import_module("optimum.quanto")
    kinds = {"weights": getattr(found, weights)} | ({} if activations is None else {"activations": getattr(found, activations)})
    found.quantize(module, include=sorted(paths), **kinds)
    found.freeze(module)


def sdnq(module, paths: set[str], **options) -> None:
    found = importlib.import_module("sdnq")
    others = [path for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear) and path not in paths]
    found.sdnq_post_load_quant(module, modules_to_not_convert=others, quant_conv=False, **options)


PEERS = {
    "8 bit": {
        "torchao int8 dynamic": partial(torchao, config="Int8DynamicActivationInt8WeightConfig"),
        "torchao fp8 dynamic": partial(torchao, config="Float8DynamicActivationFloat8WeightConfig"),
        "sdnq int8, matmul in int8": partial(sdnq, weights_dtype="int8", use_quantized_matmul=True),
    },
    "W4A16": {
        "torchao int4 group 64": partial(torchao_int4, config="IntxWeightOnlyConfig"),
        "quanto int4 group 128": partial(quanto, weights="qint4"),
        "sdnq uint4 group 64": partial(sdnq, weights_dtype="uint4", group_size=64),
        "sdnq uint4 group 64, svd rank 1": partial(sdnq, weights_dtype="uint4", group_size=64, use_svd=True, svd_rank=1),
    },
    "W4A8 INT": {
        "torchao int8 dynamic, int4 group 64": partial(torchao_int4, config="Int8DynamicActivationIntxWeightConfig"),
        "sdnq int4 group 64, matmul in int8": partial(sdnq, weights_dtype="int4", group_size=64, use_quantized_matmul=True),
    },
    "W4A8 FP": {
        "sdnq fp4 group 64, 16-bit inputs": partial(sdnq, weights_dtype="float4_e2m1fn", group_size=64),
    },
    "FP4": {
        "torchao nvfp4": partial(torchao, config="NVFP4DynamicActivationNVFP4WeightConfig"),
        "torchao mxfp4": partial(torchao, config="MXDynamicActivationMXWeightConfig"),
    },
}
# What peers raise for a missing package or name, device, type or shape.
PEER_ERRORS = (ImportError, AttributeError, NotImplementedError, AssertionError, RuntimeError, TypeError, ValueError)
NO_PEER = {"W4A4 INT": "torchao has no 4-bit inputs on the CPU, optimum-quanto's inputs are 8 bits, sdnq's matmul is in 8 bits"}


def refusal(pipe, plan: dqtk.Plan, function, prompt: list[str], kwargs: dict) -> str | None:
    """Quantize by a peer and paint one step; what it said where it cannot do that here, None where it can."""
    (component,) = plan.components
    try:
        function(pipe.components[component.name], {c.site.path for c in plan.choices if c.spec is not None})
        pipe(prompt, **(kwargs | {"num_inference_steps": 1}))
    except PEER_ERRORS as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


# --- the run ---------------------------------------------------------------------------------------------------------


def measure(reference, pipe, prompts, kwargs) -> dict:
    """PSNR, SQNR of the denoiser on the original's inputs, and the oracle's change, each with its interval."""
    found = compare(
        reference,
        pipe,
        prompts,
        call_kwargs=kwargs,
        scores=("psnr",),
        num_trajectory=min(8, len(prompts)),
        oracle=oracle_for(reference, prompts),
        progress=False,
    )
    row = {}
    for name in ("psnr", "sqnr_same", "oracle_change"):
        estimate = next((m.estimate for m in found.measures if m.name == name), None)
        row[name] = None if estimate is None else [round(v, 3) for v in (estimate.value, estimate.low, estimate.high)]
    return row


def bits_of(pipe, plan: dqtk.Plan) -> float:
    """Bits per weight that the layers of the plan hold in memory with 16-bit compute: codes, scales, transforms, branches

    What wrappers of peers hold counts as it lies there.
    """
    (component,) = plan.components
    sites = [c.site for c in plan.choices if c.spec is not None]
    layers = [pipe.components[component.name].get_submodule(site.path) for site in sites]
    taken = sum(bytes_at_16_bit(layer) for layer in layers) - sum(2 * site.n for site in sites if site.bias)
    taken += plan.book_bytes(component.name)
    return round(8 * taken / sum(site.num_weights for site in sites), 3)


def variants_of(setting: str, words: list[str], without: list[str], peers: bool) -> dict:
    """Name -> spec, recipe or function of a peer: names with one of the words, and none of those to be left out."""
    found = {f"dqtk {name}": spec for name, spec in SETTINGS[setting].items()} | (PEERS.get(setting, {}) if peers else {})
    wanted = {name: what for name, what in found.items() if any(word in name for word in words)}
    return {name: what for name, what in wanted.items() if not any(word in name for word in without)}


def run(model: str, options) -> None:
    reference, everything = load(model), read_prompts([str(PROMPTS)], None)
    prompts = everything[: options.num_prompts]
    steps = {"num_inference_steps": options.steps}
    kwargs = call_kwargs_for(reference) | steps
    watched = plan_for(reference, WATCHED)
    stats = dqtk.calibrate(reference, everything[CALIBRATION], watched, batch_size=8, call_kwargs=steps, progress=False)
    for setting in options.only:
        for name, what in variants_of(setting, options.methods, options.without, not options.no_peers).items():
            row = {"benchmark": "methods", "model": model, "setting": setting, "method": name}
            row |= {"num_prompts": len(prompts), "steps": options.steps}
            if options.since and any(row.items() <= r.items() and r["created"] >= options.since for r in stored()):
                continue
            pipe, plan = load(model), watched
            if isinstance(what, LayerSpec | dqtk.Recipe):
                plan, refused = plan_for(pipe, what), None
                dqtk.quantize(pipe, plan, stats, progress=False)
            else:
                refused = refusal(pipe, plan, what, prompts[:1], kwargs)
            if refused is None:
                row |= measure(reference, pipe, prompts, kwargs) | {"bits_per_weight": bits_of(pipe, plan)}
                said = f"PSNR {row['psnr']} SQNR {row['sqnr_same']} {row['bits_per_weight']} bit"
            else:
                row["not_measured"], said = refused, f"not measured: {refused[:120]}"
            print(f"{model:22} {setting:9} {name:42} {said}", flush=True)
            append(row, peer_versions())


def peer_versions() -> dict[str, str]:
    return {
        name: version(name) for name in ("torchao", "optimum-quanto", "sdnq") if find_spec(name.replace("-", ".").split(".")[0])
    }


def markdown(models: list[str]) -> str:
    """The newest row of every setting, method and model, as one table per setting."""
    newest = {(r["setting"], r["method"], r["model"]): r for r in stored() if r.get("benchmark") == "methods"}
    lines = []
    for setting in SETTINGS:
        lines += ["", f"### {setting}", "", "| method | bits | " + " | ".join(models) + " |", "|---" * (2 + len(models)) + "|"]
        methods = [f"dqtk {name}" for name in SETTINGS[setting]] + list(PEERS.get(setting, ()))
        for method in methods:
            found = [newest.get((setting, method, model)) for model in models]
            if not any(found):
                continue
            bits = next((f"{r['bits_per_weight']:.2f}" for r in found if r and r.get("bits_per_weight")), "")
            lines.append(f"| {method.removeprefix('dqtk ')} | {bits} | " + " | ".join(cell(r) for r in found) + " |")
        lines += refusals([newest.get((setting, method, model)) for method in methods for model in models])
        if setting in NO_PEER:
            lines += ["", f"Peers: {NO_PEER[setting]}."]
    return "\n".join(lines[1:])


def refusals(rows: list[dict | None]) -> list[str]:
    """A line for each thing that a peer said where it could not run, with its models."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row is not None and "not_measured" in row:
            said.setdefault((row["method"], " ".join(row["not_measured"].split())), []).append(row["model"])
    return [line for (method, why), models in said.items() for line in ("", f"{method} on {', '.join(models)}: `{why}`")]


def cell(row: dict | None) -> str:
    """PSNR with its interval, SQNR, and the oracle's change."""
    if row is None:
        return ""
    if "not_measured" in row:
        return "cannot"
    psnr, sqnr, oracle = row["psnr"], row["sqnr_same"], row.get("oracle_change")
    said = "" if oracle is None else f", {oracle[0]:+.2f}"
    return f"{psnr[0]:.1f} ({psnr[1]:.1f} to {psnr[2]:.1f}), {sqnr[0]:.1f}{said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-pixart-stressed", "tiny-sdxl", "tiny-sdxl-stressed"])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=[""], metavar="WORD", help="only methods whose name has one of these words")
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="but none of these")
    parser.add_argument("--since", metavar="TIME", help="leave out what was measured since (ISO time), as after an interruption")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what is in results.jsonl as Markdown")
    options = parser.parse_args()
    if options.table:
        print(markdown(options.models))
        return
    for model in options.models:
        run(model, options)


if __name__ == "__main__":
    sys.exit(main())
