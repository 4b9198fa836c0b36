"""What a step needs beside the weights: how far memory rises above its rest while one runs.

On CUDA torch's allocator says so. On the CPU the kernels' workspaces are no torch tensors and stay with their threads, so the
process is asked: the system's peak of resident memory is set back (Linux, /proc/self/clear_refs), freed heap is returned first, and
the step runs in a thread of its own, where every workspace is made anew.
"""

import ctypes
import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK = "5"  # proc(5): set the peak of resident memory back to what is resident


class NotMeasured(Exception):
    """Why memory cannot be measured here: one phrase."""


def rise(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that memory rises above its rest while ``run`` runs. What it leaves behind counts too.

    Raises:
        NotMeasured: the system does not say.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    threads = torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(threads)  # a new thread starts from the environment's number
        run()

    gc.collect()
    _return_freed_heap()
    try:
        _CLEAR.write_text(_PEAK)
        before = _resident("VmRSS")
    except OSError as error:
        raise NotMeasured(f"the system does not set the peak of resident memory back ({type(error).__name__})") from error
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(alone).result()
    return max(0, _resident("VmHWM") - before)


def available(device: torch.device) -> int | None:
    """Bytes that can still be had, or None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise NotMeasured(f"the system does not tell {name}")
    return int(found[1]) * 1024


def _return_freed_heap() -> None:
    """glibc keeps freed blocks; what a step takes from them would not show. Elsewhere nothing is done."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
