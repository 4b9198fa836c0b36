"""Whether Triton kernels run, decided without importing Triton: that takes a second, and many machines have none.

Environment:
    DQTK_TRITON        "off": torch's own kernels are used
    TRITON_INTERPRET   "1": Triton's interpreter, on any machine and very slowly; for tests
"""

import importlib.util
import os
import shutil
import sysconfig
from functools import cache
from pathlib import Path

import torch

from . import table

LEAST = (8, 0)
"""The least compute capability: the first whose integer and bfloat16 tensor cores Triton supports."""
_FP8 = (8, 9)


class Unavailable(Exception):
    """Why there are no Triton kernels: one phrase."""


def serves(device: torch.device) -> bool:
    """Whether Triton kernels run on a device."""
    return _reason(device.type, device.index) is None


def describe() -> tuple[bool, str]:
    """Whether Triton kernels serve the current CUDA device, and by what (or why none)."""
    reason = _reason("cuda", None)
    if reason is not None:
        return False, f"Triton kernels: {reason}"
    path = table.current()
    return True, "Triton kernels" + (f" (or torch's, where {path.name} has them faster)" if path else "")


def no_scaled_matmul() -> str | None:
    """Why ``torch._scaled_mm`` does not multiply E4M3 numbers on the current CUDA device; None where it does."""
    return _why_no_scaled_matmul(torch.cuda.current_device() if torch.cuda.is_available() else None)


def forget() -> None:
    """Decide again at the next call, as after a change of the environment."""
    _reason.cache_clear()
    _why_no_scaled_matmul.cache_clear()


@cache
def _reason(kind: str, index: int | None) -> str | None:
    try:
        _require(kind, index)
    except Unavailable as reason:
        return str(reason)
    return None


def _require(kind: str, index: int | None) -> None:
    wanted = os.environ.get("DQTK_TRITON", "")
    if wanted not in ("", "off"):
        raise ValueError(f"DQTK_TRITON must be off or unset, got {wanted!r}. Unset it for Triton kernels.")
    if wanted == "off":
        raise Unavailable("switched off by DQTK_TRITON")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    if kind != "cuda":
        raise Unavailable(f"they are for CUDA devices, not for {kind}")
    _require_capability(index, LEAST)
    _require_compiler()


def _require_capability(index: int | None, least: tuple[int, int]) -> None:
    if torch.version.hip is not None:
        raise Unavailable("nobody has tried them on ROCm")
    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device here")
    found = torch.cuda.get_device_capability(index)
    if found < least:
        raise Unavailable(f"this device has compute capability {found[0]}.{found[1]}, below {least[0]}.{least[1]}")


def _require_compiler() -> None:
    """Triton compiles what launches its kernels with the C compiler of the machine, against Python's headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise Unavailable("Triton needs a C compiler and found none (looked for gcc, clang; CC names another)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        raise Unavailable("Triton needs Python's C headers, and Python.h is not installed")


@cache
def _why_no_scaled_matmul(index: int | None) -> str | None:
    try:
        _require_capability(index, _FP8)
    except Unavailable as reason:
        return str(reason)
    return None
