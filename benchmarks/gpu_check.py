"""The GPU kernels on the GPU of this machine: whether they are right, which tiles are best here, how fast linear
layers and attention are.

    make gpu-check          or          python benchmarks/gpu_check.py [--minutes 9] [--no-tune]

Needs a checkout, a CUDA build of torch (Triton comes with it) and a device; neither diffusers nor an installed dqtk. First come the
cases of tests/gpu/triton_cases.py: a wrong kernel is not timed. Then every tile of every kind of product, and torch's own kernel,
for some shapes: the best go into the device's table in the cache folder (dqtk/gpu/table.py). Then linear layers beside bfloat16,
and attention over live blocks (gpu_attention.py) beside torch's, in rounds: a JSON line per shape in benchmarks/results.jsonl,
and a short table.

Times are the device's: before each call the device sleeps, so that launches wait for nothing, and overwrites its cache, so that
weights come from memory as they do in a model. "called" is the time of calls from Python one behind the other, cache warm.
"""

import argparse
import random
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import gpu_attention
import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parents[1]
ROWS, SIZES = (16, 256, 4096), ((3072, 3072), (6144, 6144), (12288, 3072))  # tokens; outputs and inputs
GROUP = 64
Calls = dict[object, Callable[[], Tensor]]


def open_rooms() -> None:
    """Make the kernel rooms importable. The front door of dqtk is left out: it wants packages that a GPU machine may lack."""
    package = types.ModuleType("dqtk")
    package.__path__ = [str(ROOT / "dqtk")]
    sys.modules["dqtk"] = package
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))


def refuse(why: str) -> None:
    raise SystemExit(f"gpu_check: {why}")


def random_bytes(device: str, *shape: int, low: int = 0, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(low, high, shape, dtype=dtype, device=device)


def stored(kind: str, n: int, k: int, device: str) -> tuple:
    """Arguments of the op behind its input (decoded: behind input, codes and bias, codes in front)."""
    scale = torch.full((n, 1), 0.01, device=device)
    if kind == "int8":
        return random_bytes(device, n, k, low=-127, high=128, dtype=torch.int8), scale, None, None, None, None, 8
    if kind == "int4":
        return random_bytes(device, n, k // 2), scale, random_bytes(device, n, k // GROUP, low=1, high=16), None, None, None, 4
    if kind == "decoded8":
        return random_bytes(device, n, k, low=-127, high=128, dtype=torch.int8), scale, None, None, None, None, 8, True
    steps, zero = scale.repeat(1, k // GROUP), random_bytes(device, n, k // GROUP, high=16)
    return random_bytes(device, n, k // 2), steps, zero, None, None, None, 4, False


def candidates(kind: str, x: Tensor, weight: tuple) -> Calls:
    """Tile, or None for torch's own kernel -> the product."""
    from dqtk.gpu import decoded, integer
    from dqtk.gpu.tiles import TILES
    from dqtk.kernels.decoded import decode_reference
    from dqtk.kernels.int8 import matmul_padded
    from dqtk.kernels.linear import _linear_int8

    if kind.startswith("int"):
        found: Calls = {tile: lambda tile=tile: integer.linear_int8(x, *weight, tile=tile) for tile in TILES[kind]}
        return found | {None: lambda: _linear_int8(x, *weight, matmul_padded)}
    how = decoded.Stored(*weight)
    found = {tile: lambda tile=tile: decoded.linear_decoded(x, None, how, tile) for tile in TILES[kind]}
    return found | {None: lambda: F.linear(x, decode_reference(*weight, x.shape[1], x.dtype))}


def microseconds(call: Callable[[], Tensor]) -> float:
    """Time of one call on the device, its cache cold."""
    if not hasattr(microseconds, "memory"):
        microseconds.memory = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    microseconds.memory.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def called(call: Callable[[], Tensor], times: int = 20) -> float:
    """Microseconds of a call from Python, of some one behind the other."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / times


def runs(call: Callable[[], Tensor]) -> bool:
    """Whether a kernel fits onto this device; compiles it."""
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources as error:
        print(f"left out: {error}", flush=True)
        return False
    return True


def tune(device: str, rows, sizes, seconds_left: Callable[[], float], measure=microseconds, repeats: int = 9) -> list:
    """The best tile, or None for torch, of every kind and shape, as rows of a table; of fewer shapes when time is up."""
    from dqtk.gpu.table import Row
    from dqtk.gpu.tiles import TILES

    found = []
    for n, k in sizes:
        for kind in TILES:
            weight = stored(kind, n, k, device)
            for t in rows:
                if seconds_left() < 0:
                    print(f"not tuned, time is up: {kind} {t}x{n}x{k}", flush=True)
                    continue
                x = torch.randn(t, k, device=device, dtype=torch.bfloat16)
                calls = {tile: call for tile, call in candidates(kind, x, weight).items() if runs(call)}
                times = {tile: statistics.median(measure(call) for _ in range(repeats)) for tile, call in calls.items()}
                found.append(Row(kind, t, n, k, min(times, key=times.__getitem__)))
    return found


def methods(t: int, n: int, k: int, device: str) -> Calls:
    """Linear layers as dqtk's ops run them here, beside torch's own ways."""
    from dqtk import gpu

    ops, x = torch.ops.dqtk, torch.randn(t, k, device=device, dtype=torch.bfloat16)
    plain = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    weights = {kind: stored(kind, n, k, device) for kind in ("int8", "int4", "decoded8", "decoded4")}
    found: Calls = {"bfloat16": lambda: F.linear(x, plain)}
    for name, kind in {"W8A8": "int8", "W4A8": "int4"}.items():
        found[name] = lambda weight=weights[kind]: ops.linear_int8(x, *weight)
    for name, kind in {"W8A16": "decoded8", "W4A16": "decoded4"}.items():
        found[name] = lambda weight=weights[kind]: ops.linear_decoded(x, weight[0], None, *weight[1:])
    if gpu.no_scaled_matmul() is None:
        codes, scale = plain.clamp(-448, 448).to(torch.float8_e4m3fn), torch.full((n, 1), 0.01, device=device)
        found["FP8"] = lambda: ops.linear_fp8(x, codes, scale, None, None)
    found["W8A8 torch"] = candidates("int8", x, weights["int8"])[None]
    found["W4A16 torch"] = candidates("decoded4", x, weights["decoded4"])[None]
    return found


def compare(calls: Calls, repeats: int, base: str = "bfloat16") -> dict:
    """Medians of times, and of their ratios to those of ``base`` in the same round; orders are drawn anew."""
    times: dict = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(microseconds(calls[name]))
    return {
        "microseconds": {name: round(statistics.median(values), 1) for name, values in times.items()},
        f"times_faster_than_{base}": {
            name: round(statistics.median(a / b for a, b in zip(times[base], values, strict=True)), 3)
            for name, values in times.items()
        },
        "microseconds_called": {name: round(called(call), 1) for name, call in calls.items()},
        "repeats": repeats,
    }


def check() -> None:
    """Refuse to go on where a kernel is wrong."""
    import triton_cases

    begun = time.monotonic()
    wrong = {name: text for name, text in triton_cases.failures("cuda").items() if text}
    for name, text in wrong.items():
        print(f"--- {name}\n{text}", flush=True)
    print(
        f"{len(triton_cases.CASES) - len(wrong)} of {len(triton_cases.CASES)} cases passed in {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    if wrong:
        refuse(f"these kernels must be right before they are timed: {', '.join(wrong)}")


def check_graphs() -> None:
    """Refuse to go on where an op of a linear layer, recorded into a CUDA graph, does not compute the same of new inputs."""
    t, (n, k) = 16, SIZES[0]
    x, fresh = (torch.randn(t, k, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    int8, decoded4 = stored("int8", n, k, "cuda"), stored("decoded4", n, k, "cuda")
    ops = torch.ops.dqtk
    calls: dict[str, Callable[[Tensor], list[Tensor]]] = {
        "W8A8": lambda x: [ops.linear_int8(x, *int8)],
        "W8A8, three layers": lambda x: ops.linears_int8(x, *[[value] * 3 for value in int8[:4]], *int8[4:]),
        "W4A16": lambda x: [ops.linear_decoded(x, decoded4[0], None, *decoded4[1:])],
    }
    for name, call in calls.items():
        recorded, graph = x.clone(), torch.cuda.CUDAGraph()
        call(recorded)  # compiled before it is recorded
        with torch.cuda.graph(graph):
            outputs = call(recorded)
        recorded.copy_(fresh)
        graph.replay()
        if not all(torch.equal(a, b) for a, b in zip(outputs, call(fresh), strict=True)):
            refuse(f"{name} must compute the same in a CUDA graph, got other numbers")
    print(f"{len(calls)} ops compute the same in a CUDA graph", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="when tuning stops early: after two thirds of them")
    parser.add_argument("--no-tune", action="store_true", help="time with the table that is there, or the defaults")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        refuse("a CUDA device must be here, got none. Tests run the kernels without one: pytest tests/gpu")
    begun = time.monotonic()
    open_rooms()
    from rows import append

    from dqtk import gpu
    from dqtk.gpu import table

    served, by = gpu.describe()
    if not served:
        refuse(f"Triton kernels must run here, got: {by}")
    import triton

    check()
    check_graphs()
    path, device = table.path_of(torch.cuda.get_device_name()), torch.device("cuda", torch.cuda.current_device())
    if not options.no_tune:
        limit = begun + options.minutes * 40
        attention = gpu_attention.tune("cuda", lambda: limit - time.monotonic(), microseconds, runs)
        table.save(path, [*attention, *tune("cuda", ROWS, SIZES, lambda: limit - time.monotonic())])
        print(f"table: {path}", flush=True)
    lines = []
    for n, k in SIZES:
        for t in ROWS:
            row = compare(methods(t, n, k, "cuda"), 30)
            tiles = {kind: str(table.chosen(kind, t, n, k, device)) for kind in table.TILES}
            append({"benchmark": "gpu-linear", "shape": [t, k, n], **row, "tiles": tiles}, {"triton": triton.__version__}, "cuda")
            lines.append(line(f"{t:5} {k:6} {n:6}", row, "bfloat16"))
    print(f"\n{gpu.describe()[1]}, {torch.cuda.get_device_name()}; times faster than bfloat16")
    print(headings(f"{'T':>5} {'K':>6} {'N':>6}", row, "bfloat16"), *lines, sep="\n")
    for shape in gpu_attention.SHAPES:
        row = compare(gpu_attention.methods(shape, "cuda", microseconds), 20, "SDPA")
        name = " x ".join(map(str, shape))
        how = str(gpu_attention.chosen(shape, device))
        append({"benchmark": "gpu-attention", "shape": list(shape), **row, "how": how}, {"triton": triton.__version__}, "cuda")
        print(f"\nattention, {name}: heads, tokens, channels, queries and keys of a block; times faster than torch's")
        print(headings("", row, "SDPA"), line("", row, "SDPA"), sep="\n")
    print(f"\n{time.monotonic() - begun:.0f} s")


def headings(first: str, row: dict, base: str) -> str:
    names = [name for name in row["microseconds"] if name != base]
    return f"{first} {base + ' us':>11}" + "".join(f"{name:>14}" for name in names)


def line(first: str, row: dict, base: str) -> str:
    faster = row[f"times_faster_than_{base}"]
    return f"{first} {row['microseconds'][base]:11.1f}" + "".join(f"{faster[name]:14.2f}" for name in faster if name != base)


if __name__ == "__main__":
    main()
