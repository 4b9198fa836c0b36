"""The same model rounded in another way: what a noise floor is made of.

A distance between two pipelines means little until one knows what the same pipeline does to itself when only its rounding changes.
Three such changes: another compute dtype (the caller loads it), other kernels, another number of threads. The last two change the
order of sums and nothing else, so they are the strictest floor: what a user sees from one machine to the next.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS, THREADS = "kernels", "threads"
ROUNDINGS = (KERNELS, THREADS)


def check_rounding(where: str, kind: str | None, device: torch.device | str) -> None:
    """``ValueError`` where a change of rounding changes nothing: a number of CPU threads, for a model on another device."""
    if kind == THREADS and torch.device(device).type != "cpu":
        raise ValueError(f"{where}: floor must change what {device} computes, got 'threads', which are the CPU's. Take 'kernels'.")


@contextmanager
def other_rounding(kind: str | None) -> Iterator[None]:
    """Inside: "kernels" (attention as plain matmuls; no oneDNN, no cuDNN), "threads" (half as many; 2 in place of 1), or no change.

    Raises ``ValueError`` for another word.
    """
    with ExitStack() as changed:
        if kind == KERNELS:
            changed.enter_context(sdpa_kernel(SDPBackend.MATH))
            libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
            for library in libraries:  # their own contexts set other flags too, and warn
                changed.callback(setattr, library, "enabled", library.enabled)
                library.enabled = False
        elif kind == THREADS:
            before = torch.get_num_threads()
            changed.callback(torch.set_num_threads, before)
            torch.set_num_threads(before // 2 if before > 1 else 2)
        elif kind is not None:
            raise ValueError(f"floor: rounding must be one of {', '.join(ROUNDINGS)}, got {kind!r}. Or pass a pipeline.")
        yield
