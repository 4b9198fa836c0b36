"""One linear layer on the CPU: native kernels, the path through torch alone, and peers, against F.linear in float32 and bfloat16.

    python benchmarks/linear.py [--repeats 15] [--threads 2] [--no-compile]

Peers (torchao, optimum-quanto) are measured where they are installed. In each round every method runs twice, in an order drawn
anew, and the time of its second call is divided by that of bfloat16 in the same round; medians of these ratios survive a machine
that does other work too. The first call is not timed: it finds the caches and the clock of the CPU as another method has left them.
Inputs and outputs are bfloat16, except for float32's own. Appends one JSON line per shape to benchmarks/results.jsonl.
"""

import argparse
import importlib.metadata
import random
import statistics
import time

import torch
import torch.nn.functional as F
from rows import append
from torch import nn

from dqtk import native
from dqtk.kernels.linear import linears_int8_through_torch
from dqtk.methods.rtn import rtn
from dqtk.nn import QuantLinear
from dqtk.spec import AbsMax, Dynamic, Int, LayerSpec, PerChannel, PerGroup, PerTensor, PerToken, TensorSpec, TwoLevel

SHAPES = [  # tokens, inputs, outputs
    (1024, 1536, 1536),
    (1024, 1152, 4608),
    (4096, 1152, 1152),
    (256, 384, 1536),
    (256, 1152, 1152),
    (1, 1152, 6912),
    (16, 3072, 3072),
]
W8, W4 = TensorSpec(format=Int(bits=8), granularity=PerChannel()), TensorSpec(format=Int(bits=4), granularity=TwoLevel())
W4_GROUPS = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64))
DYNAMIC = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor(), range=AbsMax())
OURS = {
    "dqtk W8A8 dynamic": LayerSpec(weight=W8, input=DYNAMIC),
    "dqtk W8A8 static": LayerSpec(weight=W8, input=STATIC),
    "dqtk W4A8": LayerSpec(weight=W4, input=DYNAMIC),
    "dqtk W8A16": LayerSpec(weight=W8),
    "dqtk W4A16": LayerSpec(weight=W4_GROUPS),
}


def quantized(plain: nn.Linear, spec: LayerSpec) -> QuantLinear:
    """The layer with rounded weights; static inputs get the range of a normal distribution."""
    layer = QuantLinear.like(plain, spec)
    tensors = rtn(plain.weight.detach().float(), spec.weight).tensors()
    if spec.input is STATIC:
        tensors |= {"input_scale": torch.tensor([8 / 255]), "input_zero": torch.tensor([0], dtype=torch.int32)}
    layer.fill(tensors, plain.bias)
    return layer


def through_torch(layer: QuantLinear):
    """The same W8A8 layer without native kernels: rounding in torch, then ``torch._int_mm``."""
    stored = native.IntegerLayer(layer.qweight, layer.scale, None, layer.bias, None, None, 8)  # type: ignore[arg-type]
    return lambda x: linears_int8_through_torch(x, [stored])[0]


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def peers(plain: nn.Linear, compiled: bool) -> dict:
    """Method name -> module or callable, of what is installed."""
    found = {}

    def copy() -> nn.Sequential:
        layer = nn.Linear(plain.in_features, plain.out_features, dtype=plain.weight.dtype)
        layer.load_state_dict(plain.state_dict())
        return nn.Sequential(layer)

    if installed("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        model = copy()
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
        found["torchao W8A8 dynamic"] = model
        if compiled:
            found["torchao W8A8 dynamic, compiled"] = torch.compile(model, dynamic=False)
    if installed("optimum-quanto"):
        from optimum.quanto import freeze, qint4, qint8, quantize

        for name, weights in {"quanto W8A16": qint8, "quanto W4A16": qint4}.items():
            model = copy()
            quantize(model, weights=weights)
            freeze(model)
            found[name] = model
    return found


def measure(methods: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of every method in every round."""
    times = {name: [] for name in methods}
    for call in methods.values():
        call()
        call()
    for _ in range(repeats):
        for name in random.sample(list(methods), len(methods)):
            methods[name]()
            start = time.perf_counter()
            methods[name]()
            times[name].append(time.perf_counter() - start)
    return times


def bench(shape: tuple[int, int, int], repeats: int, compiled: bool) -> dict:
    t, k, n = shape
    torch.manual_seed(0)
    plain = nn.Linear(k, n).requires_grad_(False)
    half, x = nn.Linear(k, n, dtype=torch.bfloat16).requires_grad_(False), torch.randn(t, k)
    half.load_state_dict(plain.state_dict())
    x16 = x.bfloat16()
    layers = {name: quantized(half, spec) for name, spec in OURS.items()}
    calls = layers | {"dqtk W8A8 dynamic, torch alone": through_torch(layers["dqtk W8A8 dynamic"])} | peers(half, compiled)
    methods = {
        "float32": lambda: F.linear(x, plain.weight, plain.bias),
        "bfloat16": lambda: F.linear(x16, half.weight, half.bias),
        **{name: lambda call=call: call(x16) for name, call in calls.items()},
    }
    times = measure(methods, repeats if t > 16 else repeats * 10)

    def over(base: str, name: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[base], times[name], strict=True)), 3)

    return {
        "benchmark": "linear",
        "shape": list(shape),
        "milliseconds": {name: round(statistics.median(values) * 1e3, 3) for name, values in times.items()},
        "times_faster_than_bfloat16": {name: over("bfloat16", name) for name in methods},
        "times_faster_than_float32": {name: over("float32", name) for name in methods},
        "repeats": len(times["bfloat16"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds per shape; ten times as many for up to 16 tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave out compiled peers, which take minutes to compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    packages = {name: importlib.metadata.version(name) for name in ("torchao", "optimum-quanto") if installed(name)}
    native.load()
    for shape in SHAPES:
        torch._dynamo.reset()
        with torch.inference_mode():
            row = bench(shape, options.repeats, not options.no_compile)
        row |= {"kernels": native.describe()[1]}
        append(row, packages)
        print(f"\n{shape}: milliseconds, times faster than bfloat16 / float32")
        for name, value in row["milliseconds"].items():
            fast = row["times_faster_than_bfloat16"][name], row["times_faster_than_float32"][name]
            print(f"  {name:32} {value:9.3f} {fast[0]:6.2f} {fast[1]:6.2f}", flush=True)


if __name__ == "__main__":
    main()
