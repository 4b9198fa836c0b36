"""Compiles the C++ of this folder when it is first needed, and loads it.

Why not torch's extension builder or wheels per platform: the kernels need no torch headers (plain pointers through ctypes), so any
C++ compiler builds them in seconds, and one pure Python wheel serves every torch version. Nothing here runs on ``import dqtk``.

A library is named by a hash of the sources, the flags and the compiler; the flags say the level of the CPU. It is built under a
temporary name and renamed, so that processes may build at once and an interrupted build leaves nothing that loads.

Environment:
    DQTK_NATIVE      "off", or a level to use in place of the best: amx, avx512-bf16, avx512-vnni, avx2, generic
    DQTK_CACHE_DIR   where libraries are kept; else XDG_CACHE_HOME/dqtk, else ~/.cache/dqtk
    CXX              the compiler; else the first found of c++, g++, clang++
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCES = (
    "base.h",
    "weights.h",
    "few.h",
    "int8.cpp",
    "decode.cpp",
    "trellis.cpp",
    "vectors.cpp",
    "attention.h",
    "attention.cpp",
    "block_attention.cpp",
)
COMPILERS = ("c++", "g++", "clang++")
# No fused multiply-add: products must round as torch's do. No errno, no traps: they would keep rounding out of vector code.
EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
LONGEST = 1800  # seconds that a compiler may take for a file, on a busy machine
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-w", *EXACT)


@dataclass(frozen=True, slots=True)
class Level:
    """A kind of CPU: its name, the flags of /proc/cpuinfo that it needs, the compiler's options."""

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]


_NEEDS = frozenset({"avx2", "fma", "f16c"})
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
_VNNI = _NEEDS | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
_TILES = frozenset({"amx_tile", "amx_int8", "amx_bf16"})
LEVELS = (  # best first
    Level("amx", _VNNI | {"avx512_bf16", *_TILES}, (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
    Level("avx512-bf16", _VNNI | {"avx512_bf16"}, (*_AVX512, "-mavx512bf16")),
    Level("avx512-vnni", _VNNI, _AVX512),
    Level("avx2", _NEEDS, _AVX2),
    Level("generic", frozenset(), ()),  # plain C++; only where it is asked for: nobody has measured that it pays
)


class Unavailable(Exception):
    """Why there is no native library: one phrase."""


def describe() -> tuple[bool, str]:
    """Whether native kernels serve the CPU, and which (or why none). Compiles nothing: before first use, what will be tried."""
    try:
        if _failure is not None:
            raise Unavailable(_failure)
        if _library is not None:
            return True, f"native ({_library.dqtk_level().decode()})"
        level = _level()
        _torch_threads()
        _compiler()
    except Unavailable as reason:
        return False, f"native kernels: {reason}"
    return True, f"native ({level.name}), compiled at first use"


_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_failure: str | None = None


def load() -> ctypes.CDLL | None:
    """The library, compiled if need be; None where there can be none, and ``describe`` says why. The answer stays."""
    global _library, _failure
    if _library is None and _failure is None:
        with _lock:
            if _library is None and _failure is None:
                try:
                    _library = _load()
                except Unavailable as reason:
                    _failure = str(reason)
                    if os.environ.get("DQTK_NATIVE") != "off":
                        print(f"dqtk: no native kernels, torch's own are used: {reason}", file=sys.stderr)
    return _library


def converts_bfloat16() -> bool:
    """Whether this is an x86 CPU that has no units for bfloat16: torch's matmul converts then, and is several times slower."""
    flags = cpu_flags()
    return "avx2" in flags and not {"avx512_bf16", "amx_bf16"} & flags


def forget() -> None:
    """Decide again at the next call, as after a change of the environment."""
    global _library, _failure
    with _lock:
        _library = _failure = None


def _load() -> ctypes.CDLL:
    command, path = _wanted()
    threads = _torch_threads()
    library = _open(path) if path.is_file() else None
    if library is None:  # not there, or not whole
        _build(command, path)
        library = _open(path)
    if library is None:
        raise Unavailable(f"{path} was compiled but does not load. Remove it, or set DQTK_NATIVE=off")
    library.dqtk_level.restype = ctypes.c_char_p
    library.dqtk_use_threads_of(ctypes.cast(threads, ctypes.c_void_p))
    return library


def _wanted() -> tuple[list[str], Path]:
    """The compiler's command without files, and the library that it makes."""
    level = _level()
    command = [*_compiler(), *FLAGS, *level.options]
    return command, cache_folder() / f"dqtk-{level.name}-{_digest(command)}.so"


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def cache_folder() -> Path:
    """Where libraries are kept."""
    if given := os.environ.get("DQTK_CACHE_DIR"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "dqtk"
    return Path("~/.cache/dqtk").expanduser()


def _digest(command: list[str]) -> str:
    """Of everything that decides what the library does."""
    found = hashlib.sha256()
    folder = Path(__file__).parent
    for part in (*command, _version(tuple(command)), platform.machine(), platform.system()):
        found.update(part.encode() + b"\0")
    for name in SOURCES:
        found.update((folder / name).read_bytes())
    return found.hexdigest()[:16]


@cache
def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the compiler {command[0]} does not run: {error}") from error
    return done.stdout.splitlines()[0] if done.stdout else ""


def _build(command: list[str], path: Path) -> None:
    print(f"dqtk: compiling native kernels into {path.parent} (once, a minute or two)", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            made = Path(folder) / "library.so"
            sources = [Path(__file__).parent / name for name in SOURCES if name.endswith(".cpp")]
            objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
            pairs = zip(sources, objects, strict=True)
            steps = [pool.submit(_run, [*command, "-c", str(source), "-o", made_of]) for source, made_of in pairs]
            for step in steps:
                step.result()
            _run([*command, *objects, "-o", str(made)])
            os.replace(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"cannot build in {path.parent}: {error}. Set DQTK_CACHE_DIR to a folder that can be written") from error


def _run(command: list[str]) -> None:
    """Raises ``Unavailable`` with the compiler's first error."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, check=False)
    if done.returncode != 0 or not Path(command[-1]).is_file():
        lines = done.stderr.strip().splitlines() or ["nothing"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"the compiler {command[0]} failed with status {done.returncode} and said: {said}")


def _level() -> Level:
    wanted, flags = os.environ.get("DQTK_NATIVE", ""), cpu_flags()
    if "amx_tile" in flags and not _may_use_tiles():
        flags -= _TILES
    names = [level.name for level in LEVELS]
    if wanted == "off":
        raise Unavailable("switched off by DQTK_NATIVE")
    if wanted and wanted not in names:
        raise ValueError(f"DQTK_NATIVE must be off, {', '.join(names)} or unset, got {wanted!r}. Unset it for the best of them.")
    if wanted:
        level = LEVELS[names.index(wanted)]
        if missing := sorted(level.needs - flags):
            raise Unavailable(f"this CPU has no {', '.join(missing)}, which DQTK_NATIVE={wanted} needs")
        return level
    level = next(level for level in LEVELS if level.needs <= flags)
    if not level.needs:
        raise Unavailable("this CPU has neither AVX2 nor AVX512-VNNI, or does not say so in /proc/cpuinfo")
    return level


@cache
def cpu_flags() -> frozenset[str]:
    """What the operating system says that the CPU can do; nothing where there is no /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(errors="replace"), re.MULTILINE) if cpuinfo.is_file() else None
    return frozenset(found[1].split()) if found else frozenset()


@cache
def _may_use_tiles() -> bool:
    """Asks Linux for the registers of AMX, which a process gets on request only (arch_prctl of x86-64: ARCH_REQ_XCOMP_PERM)."""
    system_call, request, tile_data = 158, 0x1023, 18
    return platform.machine() == "x86_64" and ctypes.CDLL(None).syscall(system_call, request, tile_data) == 0


def _compiler() -> list[str]:
    if given := shlex.split(os.environ.get("CXX", "")):
        if not shutil.which(given[0]):
            raise Unavailable(f"the C++ compiler that CXX names was not found: {given[0]}")
        return given
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise Unavailable(f"no C++ compiler found (looked for {', '.join(COMPILERS)}; CXX names another)")
    return [found]


@cache
def _torch_threads():
    """``GOMP_parallel`` of the OpenMP runtime that torch has loaded: a second runtime would bring a second pool of threads."""
    maps = Path("/proc/self/maps")
    paths = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b[^\s/]*", maps.read_text(errors="replace")) if maps.is_file() else []
    beside_torch = str(Path(torch.__file__).parents[1])
    for path in sorted(dict.fromkeys(paths), key=lambda path: not path.startswith(beside_torch)):
        try:
            return ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
    raise Unavailable("torch's OpenMP runtime was not found in this process")
