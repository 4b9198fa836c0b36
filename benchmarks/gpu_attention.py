"""Attention over live blocks on a GPU, for gpu_check.py: which way to walk is the best, and how fast it is beside torch's.

Blocks are drawn at random, tokens are in a random order per head, bfloat16; whole calls: rows put in order, rounded, and answers
put back. "SDPA" is the fastest of torch's backends on this device. "dense" is our own kernel with all blocks.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = (  # heads, tokens, channels, queries and keys of a block
    (24, 4608, 128, 64, 64),
    (24, 4608, 128, 128, 64),
    (8, 17776, 64, 64, 64),
    (8, 17776, 64, 128, 64),
    (8, 17776, 64, 128, 128),
)
DENSITIES = (0.5, 0.3, 0.2)
TUNED_AT = 0.3
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
Shape = tuple[int, int, int, int, int]


def given(shape: Shape, density: float | None, device: str) -> tuple:
    """q, k, v, order, live of the op; density None: all blocks, without a list."""
    heads, num, channels, block_q, block_k = shape
    q, k, v = (torch.randn(1, num, heads, channels, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    order = torch.stack([torch.randperm(num, device=device) for _ in range(heads)]).to(torch.int32)
    if density is None:
        return q, k, v, order, None
    rows, columns = -(-num // block_q), -(-num // block_k)
    seen = torch.zeros(heads, rows, -(-columns // 8) * 8, dtype=torch.uint8, device=device)
    seen[:, :, :columns] = torch.rand(heads, rows, columns, device=device) < density
    live = (seen.unflatten(2, (-1, 8)) << torch.arange(8, dtype=torch.uint8, device=device)).sum(3).to(torch.uint8)
    return q, k, v, order, live


def settings(shape: Shape, bits: int) -> tuple:
    """What the Triton kernel takes behind its tensors."""
    _, _, channels, block_q, block_k = shape
    return None, block_q, block_k, channels**-0.5, bits, bits, "none" if bits == 16 else "k"


def chosen(shape: Shape, device: torch.device) -> dict[int, Any]:
    """Bits -> the way that is taken."""
    from dqtk.gpu.table import chosen_pass

    q = torch.empty(1, *shape[:3], device=device, dtype=torch.bfloat16)
    return {bits: chosen_pass(q, q, *shape[3:], bits, bits) for bits in (16, 8)}


def tune(device: str, seconds_left: Callable[[], float], measure, runs, shapes=SHAPES, repeats: int = 9) -> list:
    """The best way of every shape and width, as rows of a table; of fewer when time is up."""
    from dqtk.gpu.attention import block_attention
    from dqtk.gpu.table import Row
    from dqtk.gpu.tiles import PASSES

    found = []
    for shape in shapes:
        tensors = given(shape, TUNED_AT, device)
        for bits in (16, 8):
            kind = f"attention{bits}-{shape[4]}"
            if seconds_left() < 0:
                print(f"not tuned, time is up: {kind} {shape}", flush=True)
                continue

            def call(how, bits=bits, shape=shape, tensors=tensors) -> Callable[[], Tensor]:
                return lambda: block_attention(*tensors, *settings(shape, bits), how=how)

            calls = {how: call(how) for how in PASSES[kind]}
            times = {how: statistics.median(measure(one) for _ in range(repeats)) for how, one in calls.items() if runs(one)}
            if times:
                found.append(Row(kind, shape[1], shape[3], shape[2], min(times, key=times.__getitem__)))
    return found


def methods(shape: Shape, device: str, measure) -> dict:
    """What is compared; "SDPA" first."""
    from dqtk import gpu

    q, k, v, order, _ = given(shape, None, device)
    found: dict = {"SDPA": fastest(lambda: F.scaled_dot_product_attention(q, k, v), measure)}
    for bits in (16, 8):
        found[f"dense {bits}"] = lambda bits=bits: gpu.block_attention(q, k, v, order, None, *settings(shape, bits))
        for density in DENSITIES:
            live = given(shape, density, device)[4]
            found[f"{density:g} {bits}"] = lambda bits=bits, live=live: gpu.block_attention(
                q, k, v, order, live, *settings(shape, bits)
            )
    return found


def fastest(call: Callable[[], Tensor], measure) -> Callable[[], Tensor]:
    """The call with whichever backend of torch's is the fastest here; where none of them runs, as it is."""
    best, least = call, float("inf")
    for backend in BACKENDS if torch.cuda.is_available() else ():

        def one(backend=backend) -> Tensor:
            with sdpa_kernel(backend):
                return call()

        try:
            one()
        except RuntimeError:  # not for this device or these shapes
            continue
        taken = statistics.median(measure(one) for _ in range(5))
        best, least = (one, taken) if taken < least else (best, least)
    return best
