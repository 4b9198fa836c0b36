"""Formats, solvers and transforms against each other and against what users would pick: same layers, same prompts and seeds.

    python benchmarks/methods.py [MODEL ...] [--num-prompts 16] [--steps 20] [--only SETTING ...] [--methods WORD ...] [--no-peers]

MODEL is a pipeline, or an embedded one with ``-stressed`` behind its name. Every variant quantizes the same linear layers of the
denoiser (what ``w8a8`` would, without convolutions and modulation, which no peer takes), so weights and bytes compare. Solvers
learn on 16 other captions. Peers run where they are installed (torchao, optimum-quanto, sdnq); a setting that a peer lacks is left
out and said so. Appends one JSON line per variant to benchmarks/results.jsonl; seconds are not measured here.
"""

import argparse
import importlib
import json
import sys
import warnings
from pathlib import Path

import torch
from dqtk.pipelines.tiny.stress import stress

import dqtk
from dqtk.prompt_sets import read_prompts
from dqtk.report.compare import compare
from dqtk.report.environment import hardware, now, versions
from dqtk.resolve import call_kwargs_for, oracle_for
from dqtk.sources import load_pipeline
from dqtk.spec import (
    GPTQ,
    MSE,
    AdaRound,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerGroup,
    PerToken,
    Smooth,
    TensorSpec,
    TwoLevel,
)

RESULTS = Path(__file__).parent / "results.jsonl"
PROMPTS = Path(__file__).parent.parent / "pipelines" / "tiny" / "prompts.txt"
CALIBRATION = slice(150, 166)  # captions that no measurement uses
STRESSED = "-stressed"

E2M1 = Float(exponent=2, mantissa=1)
A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())
A4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64), range=Dynamic())
W4 = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64))
W4_GROUP = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64), range=MSE())
WFP4 = TensorSpec(format=E2M1, granularity=PerGroup(size=64), range=MSE(steps=28, least=0.6, most=2.0))
NV, NV_PLAIN = (TensorSpec(format=E2M1, granularity=E4M3Group(), **how) for how in ({"range": MSE()}, {}))
ANV = TensorSpec(format=E2M1, granularity=E4M3Group(), range=Dynamic())
MX = TensorSpec(format=E2M1, granularity=E8M0Group(), range=MSE())
AMX = TensorSpec(format=E2M1, granularity=E8M0Group(), range=Dynamic())
BRANCH = LowRank(rank=2)  # 0.3 bits per weight at the widths of the embedded models

SETTINGS = {
    "W4A8 INT": {
        "rtn": LayerSpec(weight=W4, input=A8),
        "adaround": LayerSpec(weight=W4, input=A8, solver=AdaRound(iterations=400)),
        "gptq": LayerSpec(weight=W4, input=A8, solver=GPTQ()),
        "smooth + rtn": LayerSpec(weight=W4, input=A8, transforms=(Smooth(),)),
        "rotate + gptq": LayerSpec(weight=W4, input=A8, solver=GPTQ(), transforms=(Hadamard(),)),
        "smooth + gptq": LayerSpec(weight=W4, input=A8, solver=GPTQ(), transforms=(Smooth(),)),
    },
    "W4A8 FP": {
        "rtn": LayerSpec(weight=WFP4, input=AFP8),
        "adaround": LayerSpec(weight=WFP4, input=AFP8, solver=AdaRound(iterations=400)),
        "gptq": LayerSpec(weight=WFP4, input=AFP8, solver=GPTQ()),
        "smooth + gptq": LayerSpec(weight=WFP4, input=AFP8, solver=GPTQ(), transforms=(Smooth(),)),
    },
    "W4A4 INT": {
        "rtn": LayerSpec(weight=W4_GROUP, input=A4),
        "gptq": LayerSpec(weight=W4_GROUP, input=A4, solver=GPTQ()),
        "smooth + gptq": LayerSpec(weight=W4_GROUP, input=A4, solver=GPTQ(), transforms=(Smooth(),)),
        "rotate + gptq": LayerSpec(weight=W4_GROUP, input=A4, solver=GPTQ(), transforms=(Hadamard(),)),
        "smooth + rotate + gptq": LayerSpec(weight=W4_GROUP, input=A4, solver=GPTQ(), transforms=(Smooth(), Hadamard())),
        "smooth + rank 2 + gptq": LayerSpec(weight=W4_GROUP, input=A4, solver=GPTQ(), transforms=(Smooth(),), low_rank=BRANCH),
    },
    "NVFP4": {
        "rtn, no sweep": LayerSpec(weight=NV_PLAIN, input=ANV),
        "rtn": LayerSpec(weight=NV, input=ANV),
        "gptq": LayerSpec(weight=NV, input=ANV, solver=GPTQ()),
    },
    "MXFP4": {"rtn": LayerSpec(weight=MX, input=AMX), "gptq": LayerSpec(weight=MX, input=AMX, solver=GPTQ())},
}


def load(model: str):
    """A pipeline of one's own; embedded ones also as their stressed twins."""
    pipe = load_pipeline(model.removesuffix(STRESSED))
    if not model.endswith(STRESSED):
        return pipe
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says which outliers this pipeline cannot have
        return stress(pipe)


def plan_for(pipe, spec: LayerSpec) -> dqtk.Plan:
    """The linear layers that every variant and peer takes, with this spec."""
    usual = dqtk.plan(pipe, "w8a8")
    taken = [c.site.path for c in usual.choices if c.spec is not None and c.site.kind == "linear" and c.spec.input is not None]
    rules = tuple(dqtk.Rule(pattern=path, spec=spec, why="benchmark") for path in taken)
    return dqtk.plan(pipe, dqtk.Recipe(name="benchmark", rules=rules))


# --- peers -----------------------------------------------------------------------------------------------------------


def torchao_w4a8(module, paths: set[str]) -> None:
    torchao = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity")
    config = torchao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=granularity.PerGroup(64))
    torchao.quantize_(module, config, filter_fn=lambda layer, path: path in paths)


def quanto_w4a16(module, paths: set[str]) -> None:
    quanto = importlib.import_module("optimum.quanto")
    quanto.quantize(module, weights=quanto.qint4, include=sorted(paths))
    quanto.freeze(module)


def sdnq_w4(module, paths: set[str], **options) -> None:
    sdnq = importlib.import_module("sdnq")
    others = [path for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear) and path not in paths]
    sdnq.sdnq_post_load_quant(module, modules_to_not_convert=others, quant_conv=False, group_size=64, **options)


PEERS = {
    "W4A8 INT": {
        "torchao int8 dynamic, int4 group 64": torchao_w4a8,
        "quanto int4 group 128, 16-bit inputs": quanto_w4a16,
        "sdnq int4 group 64, 16-bit inputs": lambda m, p: sdnq_w4(m, p, weights_dtype="int4"),
    },
    "W4A8 FP": {"sdnq fp4 group 64, 16-bit inputs": lambda m, p: sdnq_w4(m, p, weights_dtype="float4_e2m1fn")},
}


def quantize_peer(pipe, plan: dqtk.Plan, function) -> None:
    (component,) = plan.components
    paths = {c.site.path for c in plan.choices if c.spec is not None}
    function(pipe.components[component.name], paths)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["tiny-pixart", "tiny-pixart-stressed", "tiny-sdxl", "tiny-sdxl-stressed"])
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", metavar="WORD", help="only methods whose name has one of these words")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    everything = read_prompts([str(PROMPTS)], None)
    prompts = everything[: options.num_prompts]
    for model in options.models:
        reference = load(model)
        kwargs = call_kwargs_for(reference) | {"num_inference_steps": options.steps}
        stats = None
        for setting in options.only:
            variants = {f"dqtk {name}": spec for name, spec in SETTINGS[setting].items()}
            peers = {} if options.no_peers else PEERS.get(setting, {})
            words = options.methods or [""]
            for name in (name for name in [*variants, *peers] if any(word in name for word in words)):
                pipe = load(model)
                plan = plan_for(pipe, variants.get(name, SETTINGS[setting]["rtn"]))
                if name in peers:
                    try:
                        quantize_peer(pipe, plan, peers[name])
                    except (ImportError, NotImplementedError, AssertionError, RuntimeError, TypeError, ValueError) as error:
                        print(f"{model:22} {setting:9} {name:38} not measured: {type(error).__name__}: {str(error)[:120]}")
                        continue
                else:
                    if plan.needs_stats and stats is None:  # calls of the unquantized model serve every variant
                        calls = {"num_inference_steps": options.steps}
                        stats = dqtk.calibrate(pipe, everything[CALIBRATION], plan, batch_size=8, call_kwargs=calls, progress=False)
                        stats.run = {}
                    dqtk.quantize(pipe, plan, stats if plan.needs_stats else None, progress=False)
                row = {"benchmark": "methods", "model": model, "setting": setting, "method": name}
                row |= measure(reference, pipe, prompts, kwargs)
                weights = sum(c.site.num_weights for c in plan.choices if c.spec is not None)
                taken = sum(c.bytes_after for c in plan.choices if c.spec is not None)
                row |= {"bits_per_weight": None if name in peers else round(8 * taken / weights, 3)}
                row |= {"num_prompts": len(prompts), "steps": options.steps, "created": now()}
                row |= {"versions": versions(), "hardware": hardware()}
                with RESULTS.open("a") as file:
                    print(json.dumps(row), file=file)
                print(
                    f"{model:22} {setting:9} {name:38} PSNR {row['psnr']} SQNR {row['sqnr_same']} {row['bits_per_weight']} bit",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
