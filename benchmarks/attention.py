"""dqtk's attention on the CPU against ``F.scaled_dot_product_attention``: dense, bfloat16 and float32; with ``--sparse``: over live
blocks of reordered tokens, drawn at random, against dense attention of torch.

    python benchmarks/attention.py [--sparse [--flex]] [--repeats 9] [--threads 2]

``--flex``: torch's FlexAttention, compiled, over the same live blocks beside it, reordering included.

In each round every method runs once, in an order drawn anew; times are divided by torch's in the same round, medians of ratios are
printed. Appends one JSON line per shape to benchmarks/results.jsonl.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rows import append

from dqtk import native
from dqtk.gpu import flex
from dqtk.kernels import attention, block_attention

SHAPES = {  # batch, heads, queries, keys, channels, masked
    "PixArt-XL 512, self": (2, 16, 1024, 1024, 72, False),
    "PixArt-XL 512, cross": (2, 16, 1024, 300, 72, True),
    "SDXL 512, self": (2, 10, 1024, 1024, 64, False),
    "SDXL 1024, self": (2, 10, 4096, 4096, 64, False),
    "Flux 1024": (1, 24, 4608, 4608, 128, False),
    "Wan 480p, 1 s": (1, 12, 7800, 7800, 128, False),
}
SPARSE = {  # heads, tokens, channels
    "4608 tokens, 64": (4, 4608, 64),
    "4608 tokens, 128": (4, 4608, 128),
    "17776 tokens, 64": (2, 17776, 64),
}
DENSITIES = (1.0, 0.5, 0.3, 0.2)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(methods: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each method in each round."""
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(repeats):
        for method in random.sample(list(methods), len(methods)):
            seconds[method].append(timed(methods[method]))
    return seconds


def ratio(seconds: dict[str, list[float]], method: str, over: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[method], strict=True))


def milliseconds(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {method: round(1e3 * statistics.median(found), 3) for method, found in seconds.items()}


def dense(options: argparse.Namespace) -> None:
    for name, (b, h, queries, keys, d, masked) in SHAPES.items():
        if options.only and not any(word in name for word in options.only):
            continue
        for dtype in (torch.bfloat16, torch.float32):
            draw = torch.Generator().manual_seed(0)
            q, k, v = (torch.randn(b, n, h, d, generator=draw).to(dtype).transpose(1, 2) for n in (queries, keys, keys))
            mask = torch.zeros(b, 1, 1, keys, dtype=dtype) if masked else None
            if mask is not None:
                mask[..., keys // 2 :] = -10000
            methods = {
                "torch": lambda q=q, k=k, v=v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask),
                "dqtk": lambda q=q, k=k, v=v, mask=mask, d=d: attention(q, k, v, mask, d**-0.5),
            }
            difference = (methods["torch"]().float() - methods["dqtk"]().float()).abs().max().item()
            seconds = rounds(methods, options.repeats)
            times, faster = milliseconds(seconds), ratio(seconds, "dqtk", "torch")
            rate = 2 * b * h * queries * keys * 2 * d / times["dqtk"] / 1e6
            print(
                f"{name:22} {str(dtype)[6:]:9} torch {times['torch']:8.2f} ms  dqtk {times['dqtk']:8.2f} ms  "
                f"{faster:5.2f} times faster, {rate:5.0f} GFLOP/s, largest difference {difference:.1e}"
            )
            row = {"benchmark": "attention", "shape": name, "dtype": str(dtype)[6:], "speedup": round(faster, 3)}
            append(row | {"milliseconds": times})


def sparse(options: argparse.Namespace) -> None:
    """Whole calls, tokens reordered at random per head and back again."""
    for name, (h, n, d) in SPARSE.items():
        if options.only and not any(word in name for word in options.only):
            continue
        draw = torch.Generator().manual_seed(0)
        order = torch.stack([torch.randperm(n, generator=draw) for _ in range(h)]).to(torch.int32)
        inputs = [torch.randn(1, n, h, d, generator=draw).transpose(1, 2) for _ in range(3)]
        tensors = {dtype: [t.to(dtype) for t in inputs] for dtype in (torch.float32, torch.bfloat16)}
        for block in options.blocks:
            size = -(-n // block)
            methods: dict[str, Callable] = {
                f"torch {str(dtype)[6:]}": lambda t=t: F.scaled_dot_product_attention(*t) for dtype, t in tensors.items()
            }
            shares = {}
            for density in DENSITIES:
                seen = torch.rand(h, size, size, generator=draw) < density
                live = torch.zeros(h, size, -(-size // 8) * 8, dtype=torch.uint8)
                live[:, :, :size] = seen
                live = (live.unflatten(2, (-1, 8)) << torch.arange(8, dtype=torch.uint8)).sum(3).to(torch.uint8)
                for dtype, t in tensors.items():
                    for bits in options.bits:
                        method = f"{str(dtype)[6:]} {bits} bits, density {density:g}"
                        shares[method] = seen.float().mean().item()
                        arguments = order, live, None, block, block, d**-0.5, bits, bits, "row", "none" if bits == 16 else "k"
                        methods[method] = lambda t=t, arguments=arguments: block_attention(*t, *arguments)
                    if options.flex:
                        method = f"{str(dtype)[6:]} FlexAttention, density {density:g}"
                        shares[method] = seen.float().mean().item()
                        arguments = order, live, None, block, block, d**-0.5
                        methods[method] = lambda t=t, arguments=arguments: flex.block_attention(*t, *arguments)
                        methods[method]()  # compiled
            seconds = rounds(methods, options.repeats)
            times = milliseconds(seconds)
            for method, share in shares.items():
                over = {str(dtype)[6:]: round(ratio(seconds, method, f"torch {str(dtype)[6:]}"), 3) for dtype in tensors}
                print(
                    f"{name:20} blocks of {block:3} {method:34} {times[method]:9.2f} ms, over dense torch: "
                    + ", ".join(f"{value:5.2f} ({dtype})" for dtype, value in over.items())
                )
                row = {"benchmark": "block attention", "shape": name, "block": block, "method": method, "live": round(share, 4)}
                append(row | {"speedup": over, "milliseconds": times[method]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=[], help="words of the shapes to run")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--flex", action="store_true", help="with --sparse: FlexAttention of torch beside it")
    parser.add_argument("--blocks", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--bits", type=int, nargs="*", default=[16, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(native.describe()[1])
    (sparse if options.sparse else dense)(options)


if __name__ == "__main__":
    main()
