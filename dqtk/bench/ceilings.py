"""What this machine can do at best, measured on the spot: matmul rates and memory bandwidth; and how near a layer comes.

Nominal numbers say little about a shared or throttled machine. A ceiling is the best of some runs of the best kernel at hand on a
large square product, so it is what was reached and not what a data sheet promises.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from dqtk.costs import LayerShape
from dqtk.kernels import linear_int8
from dqtk.numerics.storage import layer_bytes
from dqtk.ops import op_of
from dqtk.spec import LayerSpec

from .timing import interleaved, waiter

Methods = dict[tuple[str, str], Callable[[], Any]]
INTEGER = "int8"
_SIDES = {"cpu": 2048, "cuda": 8192}
_SMALL, _LONGEST = 256, 2.0  # side of a first try; seconds that one product may take
_MOVED = {"cpu": 2**27, "cuda": 2**30}  # bytes: several times the last cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """rates: dtype name -> operations per second of a matmul (a multiplication and an addition are two). bandwidth: bytes per
    second. by: what reached each."""

    rates: dict[str, float]
    bandwidth: float
    by: dict[str, str]

    def seconds(self, shape: LayerShape, spec: LayerSpec | None, dtype: torch.dtype) -> float:
        """The least time of a layer (Williams et al. 2009, the roofline model): its operations at the rate of its op, or its bytes
        (stored weight, input, output) at the bandwidth, whichever takes longer."""
        op = None if spec is None else op_of(spec, shape.kind)
        rate = self.rates[INTEGER if op in ("linear_int8", "conv_int8") else str(dtype).removeprefix("torch.")]
        width = dtype.itemsize
        weight = shape.n * shape.k * width if spec is None else layer_bytes(spec, shape.n, shape.k, shape.weight[1])
        moved = weight + (torch.Size(shape.input).numel() + shape.rows * shape.n) * width
        return max(shape.operations / rate, moved / self.bandwidth)


@torch.no_grad()
def measure_ceilings(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, side: int | None = None, repeats: int = 5
) -> Ceilings:
    """Rates in float32, ``dtype`` and int8, and the bandwidth.

    Args:
        device: where.
        dtype: the 16-bit dtype.
        side: of the square matrices; None: 2048 on the CPU, 8192 on CUDA, half of that and so on down to 256 where one of the
            products would take more than two seconds (bfloat16 on a CPU without units for it).
        repeats: of which the best counts.
    """
    side = side or _fitting(device, dtype)
    numbers = torch.ones(_MOVED.get(device.type, 2**27) // 8, device=device)
    target = torch.empty_like(numbers)
    methods = _products(device, dtype, side) | {
        ("bandwidth", "copy"): lambda: target.copy_(numbers),
        ("bandwidth", "read"): lambda: numbers.sum(),
    }
    work = {"copy": 2 * numbers.nbytes, "read": numbers.nbytes}
    times = _timed(methods, repeats, device)
    best: dict[str, tuple[float, str]] = {}
    for (what, how), each in times.items():
        rate = work.get(how, 2 * side**3) / min(each)
        best[what] = max(best.get(what, (0.0, "")), (rate, how))
    rates = {what: rate for what, (rate, _) in best.items() if what != "bandwidth"}
    return Ceilings(rates=rates, bandwidth=best["bandwidth"][0], by={what: how for what, (_, how) in best.items()})


def _products(device: torch.device, dtype: torch.dtype, side: int) -> Methods:
    """Of square matrices, by what is multiplied and how."""
    x, w = (torch.randn(side, side, device=device) for _ in range(2))
    half, half_w = x.to(dtype), w.to(dtype)
    codes, scale = (w * 20).clamp(-127, 127).to(torch.int8), torch.ones(side, 1, device=device)
    left, name = codes.clone(), str(dtype).removeprefix("torch.")
    return {
        ("float32", "torch"): lambda: F.linear(x, w),
        (name, "torch"): lambda: F.linear(half, half_w),
        (INTEGER, "torch._int_mm"): lambda: torch._int_mm(left, codes.T),
        (INTEGER, "dqtk, rounding of its input included"): lambda: linear_int8(half, codes, scale, None, None, None, None, 8),
    }


def _fitting(device: torch.device, dtype: torch.dtype) -> int:
    """The side of matrices none of whose products takes long, by what small ones take."""
    side, times = _SIDES.get(device.type, 2048), _timed(_products(device, dtype, _SMALL), 1, device)
    slowest = max(min(each) for each in times.values())
    while side > _SMALL and slowest * (side / _SMALL) ** 3 > _LONGEST:
        side //= 2
    return side


def _timed(methods: Methods, repeats: int, device: torch.device) -> dict[tuple[str, str], list[float]]:
    """Seconds of every method, in rounds."""
    times = interleaved({"|".join(key): call for key, call in methods.items()}, repeats, wait=waiter(device))
    return {key: times["|".join(key)] for key in methods}
