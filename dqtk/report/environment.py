"""Where a measurement was taken: versions of what computes, and the machine."""

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from dqtk.native import cpu_flags

_PACKAGES = ("dqtk", "torch", "diffusers", "transformers", "torchmetrics", "numpy")
_UNITS = ("avx2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # as /proc/cpuinfo names them
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DQTK_NATIVE", "DQTK_FLEX")


def versions() -> dict[str, str]:
    """Package name -> installed version, with Python's own; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device | str = "cpu") -> dict[str, str]:
    """Processor, its units for products, threads and, for a CUDA ``device``, the accelerator's name.

    ``limits``: variables of the environment that keep libraries from some of these units, where they are set.
    """
    found = {"processor": _processor(), "machine": platform.machine(), "threads": str(torch.get_num_threads())}
    if units := [unit for unit in _UNITS if unit in cpu_flags()]:
        found["units"] = " ".join(units)
    if limits := [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]:
        found["limits"] = " ".join(limits)
    device = torch.device(device)
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    elif device.type != "cpu":
        found["accelerator"] = device.type
    return found


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
