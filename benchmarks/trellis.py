"""Trellis codes on Gaussian numbers: what they lose beside other quantizers and the bound, and how fast they are found and decoded.

    python benchmarks/trellis.py [--only quality | speed | encode] [--numbers 65536] [--threads 2]

quality   mean squared error of independent normal numbers (their variance in the sample made 1), as such and times 2^2R: 1 is the
          best code that there can be (rate-distortion theory). Rings of 256 numbers, bits counted whole. "random": 4096 normal
          numbers as the table, searched in the same way, their spread the best of five.
speed     microseconds per number for the search, through torch in one thread and native; gigabytes of bfloat16 per second for
          decoding [576, 1152] in tiles of 16 x 16 and row by row. The least of some rounds.
encode    seconds of the solver (recipe trellis-2bit: rotation, sweep with second moments, descent) for one block of DiT-XL/2, and
          for half the outputs of every layer; by layer, and what memory rises by meanwhile. Weights are normal, inputs correlate
          by 0.9^|i - j|. The whole model is 28 times a block.

Appends JSON lines to benchmarks/results.jsonl.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from rows import append
from torch import Tensor

from dqtk import native
from dqtk.bench.memory import rise
from dqtk.calibrate.gather import Inputs
from dqtk.kernels import decode_trellis, decode_trellis_reference, encode_trellis
from dqtk.methods.solve import solve
from dqtk.numerics.trellis import decode, encode, packed_width
from dqtk.recipes import recipe_named
from dqtk.spec.trellis import Trellis

LENGTH = 256  # numbers of a ring
QUALITY = [(12, 1), (12, 2), (14, 1), (16, 1), (16, 2)]  # state_bits, vector
SPEED = [Trellis(state_bits=12, bits=bits) for bits in (2, 3, 4)]
SPEED += [Trellis(state_bits=12, bits=2, vector=2), Trellis(state_bits=16, bits=2), Trellis(state_bits=16, bits=2, vector=2)]
SHAPE = (576, 1152)


# --- quality ---------------------------------------------------------------------------------------------------------


def lloyd_max(bits: int, rounds: int = 2000) -> Tensor:
    """float64 [2^bits]: the scalar quantizer of least error for the normal distribution, by its two conditions in turn."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    levels = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(rounds):
        edges = torch.cat([torch.tensor([-40.0]), (levels[1:] + levels[:-1]) / 2, torch.tensor([40.0])]).double()
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = (density[:-1] - density[1:]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
    return levels


def error(x: Tensor, numbers: Tensor) -> float:
    return float((x - numbers).square().mean(dtype=torch.float64))


def random_table_error(x: Tensor, bits: int) -> float:
    library, trellis = native.load(), Trellis(state_bits=12, bits=bits)
    if library is None:
        raise SystemExit(f"the row of random values needs the native search: {native.describe()[1]}")
    table = torch.randn(trellis.states, 1, generator=torch.Generator().manual_seed(1))
    errors = []
    for spread in (0.95, 1.0, 1.05, 1.1, 1.15):
        states = native.trellis_search(library, x, None, trellis, table * spread)
        errors.append(error(x, (table * spread)[states.long()].flatten(1)))
    return min(errors)


def quality(numbers: int) -> None:
    x = torch.randn(numbers // LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    x = x / x.square().mean().sqrt()
    for bits in (1, 2, 3, 4):
        levels = lloyd_max(bits)
        nearest = levels[torch.bucketize(x.double(), (levels[1:] + levels[:-1]) / 2)]
        errors = {"scalar Lloyd-Max": error(x, nearest), "trellis L=12, random": random_table_error(x, bits)}
        for state_bits, vector in QUALITY:
            trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
            found = decode(encode_trellis(x, trellis), trellis)
            errors[f"trellis L={state_bits}" + (", V=2" if vector == 2 else "")] = error(x, found)
        errors["bound 2^-2R"] = 4.0**-bits
        print(f"\n{bits} bits: error, times 2^2R")
        for name, value in errors.items():
            print(f"  {name:24} {value:.5f} {value * 4**bits:7.3f}", flush=True)
        rounded = {name: round(value, 6) for name, value in errors.items()}
        append({"benchmark": "trellis quality", "bits": bits, "numbers": x.numel(), "ring": LENGTH, "error": rounded})


# --- speed -----------------------------------------------------------------------------------------------------------


def seconds(call, repeats: int) -> float:
    """The least of some: what others do on the machine meanwhile only adds. So calls are short."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def search_microseconds(trellis: Trellis, threads: int) -> dict[str, float]:
    x = torch.randn(4 if trellis.state_bits <= 12 else 1, LENGTH)
    torch.set_num_threads(1)
    found = {"torch": seconds(lambda: encode(x[:2], trellis), 2) / x[:2].numel() * 1e6}
    for num in dict.fromkeys((1, threads)):
        torch.set_num_threads(num)
        found[f"native, threads: {num}"] = seconds(lambda: encode_trellis(x, trellis), 200) / x.numel() * 1e6
    return {name: round(value, 3) for name, value in found.items()}


def decode_gigabytes(trellis: Trellis, threads: int) -> dict[str, float]:
    found, (n, k), scale = {}, SHAPE, torch.rand(SHAPE[0], 1)
    for name, tile in {"tiles": (16, 16), "rows": (1, k)}.items():
        length = tile[0] * tile[1]
        packed = torch.randint(0, 256, (n * k // length, packed_width(trellis, length)), dtype=torch.uint8)
        how = packed, scale, n, k, *tile, trellis.state_bits, trellis.bits, trellis.vector, torch.bfloat16
        torch.set_num_threads(1)
        found[f"{name}, torch"] = 2e-9 * n * k / seconds(lambda how=how: decode_trellis_reference(*how), 3)
        for num in dict.fromkeys((1, threads)):
            torch.set_num_threads(num)
            found[f"{name}, threads: {num}"] = 2e-9 * n * k / seconds(lambda how=how: decode_trellis(*how), 50)
    return {name: round(value, 3) for name, value in found.items()}


def speed(threads: int) -> None:
    for trellis in SPEED:
        microseconds, gigabytes = search_microseconds(trellis, threads), decode_gigabytes(trellis, threads)
        print(f"\n{trellis}")
        print(f"  search, microseconds per number:  {microseconds}")
        print(f"  decoding, gigabytes per second:   {gigabytes}", flush=True)
        row = {"benchmark": "trellis speed", "state_bits": trellis.state_bits, "bits": trellis.bits, "vector": trellis.vector}
        append(row | {"search_microseconds": microseconds, "decode_gigabytes": gigabytes, "kernels": native.describe()[1]})


# --- a whole block ---------------------------------------------------------------------------------------------------

HIDDEN, BLOCKS = 1152, 28  # of DiT-XL/2
LAYERS = {  # name -> inputs and outputs; those of one name share their input
    "qkv": (HIDDEN, (HIDDEN,) * 3),
    "out": (HIDDEN, (HIDDEN,)),
    "ff.up": (HIDDEN, (4 * HIDDEN,)),
    "ff.down": (4 * HIDDEN, (HIDDEN,)),
    "modulation": (HIDDEN, (6 * HIDDEN,)),
}


def correlated_inputs(k: int) -> Inputs:
    """Second moments 0.9^|i - j|, and a few rows that have them."""
    at = torch.arange(k, dtype=torch.float64)
    gram = 0.9 ** (at[:, None] - at).abs()
    noise = torch.randn(256, k, generator=torch.Generator().manual_seed(1))
    rows = [noise[:, 0]]
    for i in range(1, k):
        rows.append(0.9 * rows[-1] + math.sqrt(1 - 0.9**2) * noise[:, i])
    x = torch.stack(rows, 1)
    return Inputs(gram=gram, mean=x.mean(0), sample=x, low=x.amin(0), high=x.amax(0), peaks=x[:8], count=len(x))


def encode_seconds(share: int, clock: Callable[[], float]) -> dict[str, float]:
    """Of every input's layers; ``share``: every layer has so many times fewer outputs."""
    spec, found = recipe_named("trellis-2bit").main_spec(), {}
    for name, (k, outputs) in LAYERS.items():
        inputs = correlated_inputs(k)
        drawn = torch.Generator().manual_seed(0)
        weights = [torch.randn(n // share, k, generator=drawn) / math.sqrt(k) for n in outputs]
        start = clock()
        solve(weights, spec, inputs)
        found[name] = clock() - start
        print(f"  {name}: {found[name]:.1f} s", flush=True)
    return found


def encode_block(threads: int) -> None:
    clock = time.process_time if threads == 1 else time.perf_counter  # others on the machine disturb the former least
    for share in (1, 2):
        found: dict[str, float] = {}
        peak = rise(lambda found=found, share=share: found.update(encode_seconds(share, clock)), torch.device("cpu"))
        weights = sum(k * n // share for k, outputs in LAYERS.values() for n in outputs)
        total = sum(found.values())
        rounded = {name: round(value, 2) for name, value in found.items()}
        name = "a block" if share == 1 else "half of a block"
        print(f"\n{name}, {weights / 1e6:.1f} M weights: {total:.1f} s, memory rises by {peak / 2**30:.2f} GiB")
        print(f"  {rounded}; {total / weights * 1e6:.2f} microseconds per weight", flush=True)
        row = {"benchmark": "trellis encode", "recipe": "trellis-2bit", "hidden": HIDDEN, "weights": weights, "seconds": rounded}
        row |= {"seconds_block": round(total, 2), "bytes_risen": peak, "threads": threads}
        row |= {"clock": clock.__name__, "kernels": native.describe()[1]}
        append(row | ({"hours_model": round(BLOCKS * total / 3600, 3)} if share == 1 else {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["quality", "speed", "encode"])
    parser.add_argument("--numbers", type=int, default=65536, help="of the sample; a multiple of 256")
    parser.add_argument("--threads", type=int, default=1, help="beside one thread, these; wrong where others use the cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    native.load()
    with torch.inference_mode():
        if options.only in (None, "quality"):
            quality(options.numbers)
        if options.only in (None, "speed"):
            speed(options.threads)
        if options.only in (None, "encode"):
            encode_block(options.threads)


if __name__ == "__main__":
    main()
