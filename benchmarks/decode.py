"""What decoding costs in a step of a denoiser: recipes whose layers decode their weights, which are kept decoded or not.

    python benchmarks/decode.py layer [--dtype float32] [--threads 1]
    python benchmarks/decode.py step [--model pixart-xl] [--size 512] [--layers 4] [--repeats 7] [--recipes NAME ...]
                                     [--dtype float32] [--budget SIZE] [--threads 1]

layer: one layer of 1152 inputs and outputs. Billions of numbers decoded per second, by the native library and through torch;
milliseconds of a product with one and two tokens: as the layer does it (decoded and multiplied at once), in chunks that torch
multiplies, and with the weight kept. The least of some calls, all methods in turn.

step: one step of a model of published size with random weights and codes; the speed of decoding does not depend on their values. In
every round the unquantized model, every recipe, and every recipe that keeps its decoded weights (``nn.keep_decoded``) run once, in
an order drawn anew. Ratios are taken within a round; ``share`` is what a step loses when nothing is decoded.

With one thread, seconds are those of the process's own CPU time, which others on the machine disturb least. Appends one JSON line
per recipe to benchmarks/results.jsonl.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from models import MODELS
from rows import append

import dqtk
from dqtk import native
from dqtk.bench.timing import Spread, interleaved
from dqtk.bench.variants import data_free, in_dtype, quantized, shared_copy
from dqtk.kernels.decoded import decode_reference
from dqtk.kernels.on_cpu import linear_in_chunks
from dqtk.kernels.trellis import decode_trellis_reference
from dqtk.kernels.vectors import decode_through_torch
from dqtk.nn import keep_decoded
from dqtk.numerics.trellis import TILE
from dqtk.recipes import recipe_named
from dqtk.report.sizes import bytes_in_memory
from dqtk.sources import MetaPipeline

RECIPES = ("trellis-2bit", "trellis-3bit", "trellis-4bit", "vqdm-2bit", "vqdm-3bit", "vq4dit-2bit", "vq4dit-3bit", "w4a16")


# --- one layer -------------------------------------------------------------------------------------------------------

WIDTH = 1152


def least(methods: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of the fastest call: what others do on the machine only adds."""
    times = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in methods.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return {name: min(values) for name, values in times.items()}


def through_torch(layer, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    how = layer.decoding()
    if layer.op == "vectors_only":
        return lambda: decode_through_torch(layer.qweight, how.codebook, how.scale, WIDTH, dtype)
    if layer.op == "trellis_only":
        form = how.trellis
        given = layer.qweight, how.scale, WIDTH, WIDTH, *TILE, form.state_bits, form.bits, form.vector, dtype
        return lambda: decode_trellis_reference(*given)
    return lambda: decode_reference(layer.qweight, *how.arguments(), WIDTH, dtype)


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    return time.process_time if options.threads == 1 else time.perf_counter


def decoder_of(layer) -> native.Decoder:
    how, library = layer.decoding(), native.load()
    assert library is not None
    if layer.op == "vectors_only":
        return native.vector_decoder(library, layer.qweight, how.codebook, how.scale, WIDTH)
    if layer.op == "trellis_only":
        return native.trellis_decoder(library, layer.qweight, how.scale, WIDTH, WIDTH, TILE, how.trellis)
    return native.weight_decoder(library, layer.qweight, *how.arguments(), WIDTH)


def one_layer(options: argparse.Namespace) -> None:
    dtype, clock = getattr(torch, options.dtype), clock_of(options)
    torch.manual_seed(0)
    plain = torch.nn.Linear(WIDTH, WIDTH).to(dtype).requires_grad_(False)
    for name in options.recipes:
        layer = data_free(plain, recipe_named(name).main_spec())
        decoder, bias, room = decoder_of(layer), plain.bias, torch.empty(WIDTH, WIDTH, dtype=dtype)
        kept = layer.stored_matrix(dtype)
        torch_seconds = least({"torch": through_torch(layer, dtype)}, 5, clock)["torch"]
        methods: dict[str, Callable[[], object]] = {"decode": partial(decoder.rows, 0, room)}
        for tokens in (1, 2):
            x = torch.randn(tokens, WIDTH, dtype=dtype)
            methods[f"{tokens}, as decoded"] = partial(decoder.linear_few, x, bias)
            methods[f"{tokens}, in chunks"] = partial(linear_in_chunks, decoder, x, bias)
            methods[f"{tokens}, kept"] = partial(F.linear, x, kept, bias)
        found = least(methods, options.repeats * 10, clock)
        rates = {"native": WIDTH**2 / found.pop("decode") / 1e9, "torch": WIDTH**2 / torch_seconds / 1e9}
        row = {"benchmark": "decode layer", "recipe": name, "shape": [WIDTH, WIDTH], "dtype": options.dtype}
        row |= {"billions_per_second": {key: round(value, 3) for key, value in rates.items()}}
        row |= {"milliseconds": {key: round(value * 1e3, 3) for key, value in found.items()}, "threads": options.threads}
        row |= {"clock": clock.__name__}
        append(row | {"kernels": native.describe()[1]})
        print(f"{name:14} {row['billions_per_second']} {row['milliseconds']}", flush=True)


# --- one step --------------------------------------------------------------------------------------------------------


def numbers(values: list[float], digits: int = 4) -> list[float]:
    """Median and quartiles."""
    spread = Spread.of(values)
    return [round(value, digits) for value in (spread.median, spread.low, spread.high)]


def one_step(options: argparse.Namespace) -> None:
    dtype = getattr(torch, options.dtype)
    step = MODELS[options.model](options.size, options.layers)
    plain = in_dtype(step.module, dtype)
    variants, sizes, kept = {"plain": plain}, {"plain": bytes_in_memory(plain)}, {}
    for name in options.recipes:
        plan = dqtk.plan(MetaPipeline({step.component: step.module}), name)
        variants[name] = quantized(plain, plan.choices)
        sizes[name] = bytes_in_memory(variants[name])
        variants[f"{name}, kept"] = shared_copy(variants[name])
        kept[name] = keep_decoded(variants[f"{name}, kept"], options.budget)
    runs = {name: step.runner(module, dtype) for name, module in variants.items()}
    clock = clock_of(options)
    times = interleaved(runs, options.repeats, clock=clock, done=partial(print, end=".", flush=True))
    print(f"\n{options.dtype}: {statistics.median(times['plain']):.3f} s")
    for name in options.recipes:
        decoding, keeping = times[name], times[f"{name}, kept"]
        row = {"benchmark": "decode", "model": options.model, "size": options.size, "layers": options.layers, "recipe": name}
        row |= {"dtype": options.dtype, "seconds_plain": numbers(times["plain"]), "seconds": numbers(decoding)}
        row |= {"seconds_kept": numbers(keeping)}
        row |= {"over_plain": numbers([a / b for a, b in zip(decoding, times["plain"], strict=True)])}
        row |= {"kept_over_plain": numbers([a / b for a, b in zip(keeping, times["plain"], strict=True)])}
        row |= {"share": numbers([1 - b / a for a, b in zip(decoding, keeping, strict=True)])}
        row |= {"bytes_plain": sizes["plain"], "bytes": sizes[name], "bytes_kept": kept[name].num_bytes}
        row |= {"layers_kept": len(kept[name].paths), "layers_left": len(kept[name].left)}
        row |= {"repeats": options.repeats, "threads": options.threads, "clock": clock.__name__}
        append(row | {"kernels": native.describe()[1]})
        said = {key: f"{row[key][0]:.3f} ({row[key][1]:.3f} to {row[key][2]:.3f})" for key in ("over_plain", "kept_over_plain")}
        print(
            f"{name:14} x plain {said['over_plain']}, kept {said['kept_over_plain']}, decoding {100 * row['share'][0]:.1f} %",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["layer", "step"])
    parser.add_argument("--model", choices=sorted(MODELS), default="pixart-xl")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="NAME")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--budget", default="1000GB", metavar="SIZE", help="of decoded weights (default: all of them)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        (one_layer if options.what == "layer" else one_step)(options)


if __name__ == "__main__":
    main()
