"""dqtk's attention on the CPU against ``F.scaled_dot_product_attention``: dense, bfloat16 and float32.

    python benchmarks/attention.py [--repeats 9] [--threads 2]

In each round every method runs once, in an order drawn anew; times are divided by torch's in the same round, medians of ratios are
printed. Appends one JSON line per shape to benchmarks/results.jsonl.
"""

import argparse
import random
import statistics
import time

import torch
import torch.nn.functional as F
from rows import append

from dqtk import native
from dqtk.kernels import attention

SHAPES = {  # batch, heads, queries, keys, channels, masked
    "PixArt-XL 512, self": (2, 16, 1024, 1024, 72, False),
    "PixArt-XL 512, cross": (2, 16, 1024, 300, 72, True),
    "SDXL 512, self": (2, 10, 1024, 1024, 64, False),
    "SDXL 1024, self": (2, 10, 4096, 4096, 64, False),
    "Flux 1024": (1, 24, 4608, 4608, 128, False),
    "Wan 480p, 1 s": (1, 12, 7800, 7800, 128, False),
}


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="*", default=[], help="words of the shapes to run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(native.describe()[1])
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
            seconds: dict[str, list[float]] = {method: [] for method in methods}
            for _ in range(options.repeats):
                for method in random.sample(list(methods), len(methods)):
                    seconds[method].append(timed(methods[method]))
            times = {method: statistics.median(found) for method, found in seconds.items()}
            ratio = statistics.median(a / b for a, b in zip(seconds["torch"], seconds["dqtk"], strict=True))
            rate = 2 * b * h * queries * keys * 2 * d / times["dqtk"] / 1e9
            print(
                f"{name:22} {str(dtype)[6:]:9} torch {1e3 * times['torch']:8.2f} ms  dqtk {1e3 * times['dqtk']:8.2f} ms  "
                f"{ratio:5.2f} times faster, {rate:5.0f} GFLOP/s, largest difference {difference:.1e}"
            )
            row = {"benchmark": "attention", "shape": name, "dtype": str(dtype)[6:], "speedup": round(ratio, 3)}
            append(row | {"milliseconds": {method: round(1e3 * value, 3) for method, value in times.items()}})


if __name__ == "__main__":
    main()
