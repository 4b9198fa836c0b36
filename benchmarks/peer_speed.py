"""One denoising step of one model: dqtk, PyTorch itself and peers, W8A8 wherever each can. ``peers.py speed`` runs this.

Every variant runs in a process of its own, which also times the same model in eager bfloat16 (and float32, for ours) in the same
rounds, in an order drawn anew: ratios are taken within a round of one process, so neither a peer's settings nor a slow moment can
bend another's. Each method quantizes all layers that it can: torchao and optimum-quanto linear layers, with those left alone that
dqtk's w8a8 keeps; dqtk, SDNQ and OpenVINO convolutions too. *Compiled* is ``torch.compile`` of the repeated blocks, as diffusers'
``compile_repeated_blocks`` does it.

Whose error it is: a process says whether it is in our code or in a peer's. What a peer raises is its row, as is a peer that dies or
is not installed; an error of ours ends the whole run.
"""

import copy
import gc
import importlib.metadata
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import quanto, torchao
from models import MODELS
from rows import append
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import dqtk
from dqtk.bench.memory import NotMeasured, available, rise
from dqtk.bench.step import Step, record_step
from dqtk.bench.timing import Spread, interleaved, times_faster
from dqtk.bench.variants import in_dtype, quantized
from dqtk.report.sizes import bytes_in_memory
from dqtk.sources import MetaPipeline, load_pipeline

BASE, FLOAT32 = "bfloat16", "float32"
PACKAGES = {"torchao": "torchao", "quanto": "optimum-quanto", "sdnq": "sdnq", "openvino": "openvino", "nncf": "nncf"}
Prepared = Callable[..., Any]  # takes the denoiser's arguments by name


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to run the model.

    prepare: step -> what is called; may change ``step.module``, a copy. peer: not ours, nor are its errors. native: PyTorch's.
    """

    prepare: Callable[[Step], Prepared]
    peer: bool = True
    native: bool = False


# --- ours and torch's ------------------------------------------------------------------------------------------------


def plan_of(step: Step, recipe: str, attention: str | None = None) -> dqtk.Plan:
    return dqtk.plan(MetaPipeline({step.component: step.module}), recipe, attention=attention)


def ours(step: Step, recipe: str = "w8a8", *, compiled: bool = False, attention: str | None = None) -> Prepared:
    plan = plan_of(step, recipe, attention)
    made = quantized(step.module, plan.choices, plan.attention)
    return compile_blocks(made) if compiled else made


def plain(step: Step, dtype: torch.dtype, *, compiled: bool = False) -> Prepared:
    made = in_dtype(step.module, dtype)
    return compile_blocks(made) if compiled else made


def compile_blocks(module: Any) -> Prepared:
    """The repeated blocks compiled in place; of a model that names none, the whole."""
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks(dynamic=False)
        return module
    return torch.compile(module, dynamic=False)


# --- peers -----------------------------------------------------------------------------------------------------------


def by_peer(step: Step, quantize: Callable[..., None], *, compiled: bool = False, **options: Any) -> Prepared:
    """The linear layers that dqtk's w8a8 multiplies in integers, quantized by a peer; in place."""
    chosen = plan_of(step, "w8a8").choices
    paths = {c.site.path for c in chosen if c.spec is not None and c.spec.input is not None and c.site.kind == "linear"}
    quantize(step.module, paths, **options)
    return compile_blocks(step.module) if compiled else step.module


def by_sdnq(step: Step) -> Prepared:
    """SDNQ's int8 matmul, convolutions too."""
    keep = [c.site.path for c in plan_of(step, "w8a8").choices if c.spec is None]
    from sdnq import sdnq_post_load_quant

    convolutions = {"quant_conv": True, "use_quantized_matmul_conv": True}
    how = {"weights_dtype": "int8", "use_quantized_matmul": True, "modules_to_not_convert": keep, **convolutions}
    return sdnq_post_load_quant(step.module, **how)


class Positional(nn.Module):
    """A denoiser whose tensors come by position, which is what exporters take; its other arguments are fixed."""

    def __init__(self, module: nn.Module, call: dict[str, Any]):
        super().__init__()
        self.module = module
        self.values, self.structure = tree_flatten(call)

    def tensors(self, call: dict[str, Any]) -> list[torch.Tensor]:
        return [value for value in tree_flatten(call)[0] if isinstance(value, torch.Tensor)]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = iter(tensors)
        values = [next(given) if isinstance(value, torch.Tensor) else value for value in self.values]
        return first_tensor(self.module(**tree_unflatten(values, self.structure)))


def by_openvino(step: Step) -> Prepared:
    """OpenVINO with INT8 weights and inputs (NNCF, static per tensor, calibrated on one random step): traced from float32."""
    import nncf
    import openvino as ov

    wrapper = Positional(in_dtype(step.module, torch.float32), as_float32(step))
    example = wrapper.tensors(as_float32(step))
    with torch.no_grad():
        model = ov.convert_model(wrapper, example_input=tuple(example))
    arrays = [tensor.numpy() for tensor in example]
    del wrapper
    gc.collect()
    data = nncf.Dataset([dict(enumerate(arrays))])
    model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    made = ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"})
    request = made.create_infer_request()
    return lambda **call: torch.from_numpy(request.infer(arrays)[made.output(0)])


def as_float32(step: Step) -> dict[str, Any]:
    (call,) = step.calls
    values, structure = tree_flatten(dict(call))
    wide = [v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]
    return tree_unflatten(wide, structure)


DYNAMIC = {"config": "Int8DynamicActivationInt8WeightConfig"}
QUANTO = {"weights": "qint8"}
VARIANTS = {
    "bfloat16 compiled": Variant(prepare=partial(plain, dtype=torch.bfloat16, compiled=True), native=True),
    "float32 compiled": Variant(prepare=partial(plain, dtype=torch.float32, compiled=True), native=True),
    "dqtk w8a8": Variant(prepare=ours, peer=False),
    "dqtk w8a8 compiled": Variant(prepare=partial(ours, compiled=True), peer=False),
    "dqtk w8a8 own attention": Variant(prepare=partial(ours, attention="dense"), peer=False),
    "dqtk w8a8 own attention compiled": Variant(prepare=partial(ours, attention="dense", compiled=True), peer=False),
    "dqtk w4a8": Variant(prepare=partial(ours, recipe="w4a8"), peer=False),
    "torchao int8 dynamic": Variant(prepare=partial(by_peer, quantize=torchao, **DYNAMIC), native=True),
    "torchao int8 dynamic compiled": Variant(prepare=partial(by_peer, quantize=torchao, compiled=True, **DYNAMIC), native=True),
    "quanto int8 weights": Variant(prepare=partial(by_peer, quantize=quanto, **QUANTO), native=True),
    "quanto int8 weights and inputs": Variant(
        prepare=partial(by_peer, quantize=quanto, activations="qint8", **QUANTO), native=True
    ),
    "sdnq int8 matmul": Variant(prepare=by_sdnq, native=True),
    "openvino int8": Variant(prepare=by_openvino),
}


# --- one process -----------------------------------------------------------------------------------------------------


def step_of(model: str, size: int, layers: int | None) -> Step:
    """A step of a published size with random weights, or of a pipeline's folder."""
    if model in MODELS:
        return MODELS[model](size, layers)
    if layers is not None:
        raise SystemExit(f"--layers is for {', '.join(MODELS)}: {model} is as deep as it is")
    return record_step(load_pipeline(model, "bfloat16"), height=size, width=size)


def measure_here(model: str, name: str, result: Path, size: int, layers: int | None, repeats: int) -> None:
    """Measure one variant in this process, and leave its row in ``result``; before that, whose code is running."""
    step, variant = step_of(model, size, layers), VARIANTS[name]
    methods = {BASE: step.runner(step.module, torch.bfloat16)}
    exact = first_tensor(methods[BASE]()[0])
    room = available(step.device)
    parameters = sum(p.numel() for p in step.module.parameters())
    if not variant.peer and room is not None and 6 * parameters < 0.8 * room:
        methods[FLOAT32] = step.runner(in_dtype(step.module, torch.float32), torch.float32)
    copied = replace(step, module=copy.deepcopy(step.module)) if variant.peer else step
    note(result, theirs=variant.peer)
    made = variant.prepare(copied)
    dtype = torch.float32 if name.startswith(FLOAT32) else torch.bfloat16
    run = step.runner(made, dtype)
    output = first_tensor(run()[0])
    error = float((output.float() - exact.float()).norm() / exact.float().norm())
    times = interleaved(methods | {name: run}, repeats, seed=random.randrange(2**31))
    working: int | None
    try:
        working = rise(run, step.device)
    except NotMeasured:
        working = None
    note(result, theirs=False)
    half = times_faster(times[BASE], times[name])
    row = {
        "seconds": Spread.of(times[name]).median,
        "seconds_bfloat16": Spread.of(times[BASE]).median,
        "times_faster_than_bfloat16": numbers(half),
        "times_faster_than_float32": numbers(times_faster(times[FLOAT32], times[name])) if FLOAT32 in times else None,
        "float32_over_bfloat16": numbers(times_faster(times[FLOAT32], times[BASE])) if FLOAT32 in times else None,
        "relative_difference_to_bfloat16": error,
        "weight_bytes": bytes_in_memory(made) if isinstance(made, nn.Module) else None,
        "working_bytes": working,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
    }
    result.write_text(json.dumps({"row": row}))


def note(result: Path, *, theirs: bool) -> None:
    result.write_text(json.dumps({"theirs": theirs}))


def first_tensor(output: Any) -> torch.Tensor:
    """A denoiser's output: a tensor, or one in ``sample`` or first in a tuple."""
    if isinstance(output, torch.Tensor):
        return output
    return output.sample if hasattr(output, "sample") else output[0]


def numbers(spread: Spread) -> list[float]:
    return [round(value, 3) for value in (spread.median, spread.low, spread.high)]


# --- all of them -----------------------------------------------------------------------------------------------------


def measure_all(options: Any) -> list[dict[str, Any]]:
    """A row per variant, each from a process of its own."""
    wanted = {name: v for name, v in VARIANTS.items() if any(word in name for word in options.only)}
    rows = []
    for name, variant in wanted.items():
        row = {"benchmark": "peer speed", "model": options.model, "variant": name, "size": options.size, "layers": options.layers}
        row |= in_a_process(options, name, variant)
        rows.append(row)
        print(line_of(row), flush=True)
        if not options.dry:
            append(row, package_versions())
    return rows


def in_a_process(options: Any, name: str, variant: Variant) -> dict[str, Any]:
    """The row, or why a peer has none. Ends the run for an error of ours."""
    result = Path(options.folder) / f"{name.replace(' ', '-')}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).parent / "peers.py"), "speed", options.model, "--variant", name]
    command += ["--result", str(result), "--size", str(options.size), "--repeats", str(options.repeats)]
    command += ["--threads", str(options.threads)] + ([] if options.layers is None else ["--layers", str(options.layers)])
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=options.timeout, check=False)
    except subprocess.TimeoutExpired:
        said, code = f"took longer than {options.timeout} s", 1
    else:
        said, code = last_line(done.stderr) or f"exit status {done.returncode}", done.returncode
        sys.stderr.write("" if code == 0 or variant.peer else done.stderr)
    found = json.loads(result.read_text()) if result.exists() else {}
    if code == 0:
        return found["row"]
    if not found.get("theirs"):
        raise SystemExit(f"{name}: an error of ours: {said}")
    return {"not_measured": said[:300]}


def last_line(text: str) -> str:
    """Of a traceback: what was raised."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception", "Failed"))]
    return (raised or lines or [""])[-1]


def package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES.values():
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def line_of(row: dict[str, Any]) -> str:
    if "not_measured" in row:
        return f"{row['variant']:32} not measured: {row['not_measured']}"
    half, full = row["times_faster_than_bfloat16"], row["times_faster_than_float32"]
    more = "" if full is None else f", x float32 {full[0]:.2f} ({full[1]:.2f} to {full[2]:.2f})"
    return (
        f"{row['variant']:32} {row['seconds']:.3f} s, x bfloat16 {half[0]:.2f} ({half[1]:.2f} to {half[2]:.2f}){more}, "
        f"difference {row['relative_difference_to_bfloat16']:.1e}"
    )


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """How ours stands against the best peer of each kind, through eager bfloat16, which ran beside both."""
    speed = {row["variant"]: row["times_faster_than_bfloat16"][0] for row in rows if "not_measured" not in row}
    mine = {name: value for name, value in speed.items() if not VARIANTS[name].peer and "w8a8" in name}
    groups = {
        "the best PyTorch-native": {name: value for name, value in speed.items() if VARIANTS[name].native},
        "OpenVINO": {name: value for name, value in speed.items() if name.startswith("openvino")},
    }
    lines = []
    for name, value in mine.items():
        for what, others in groups.items():
            if others:
                best = max(others, key=lambda other: others[other])
                lines.append(f"{name}: {value / others[best]:.2f} x {what} ({best})")
    return lines
