"""Which tile, or torch's own kernel, is the fastest for a shape: a table per device, measured there by ``benchmarks/gpu_check.py``.

A JSON file in the cache folder (``DQTK_CACHE_DIR``), named by the device:

    {"version": 1, "rows": [{"kind": "int8", "t": 256, "n": 3072, "k": 3072, "tile": [64, 64, 128, 4, 4]},
                            {"kind": "decoded4", "t": 4096, "n": 3072, "k": 3072, "tile": null}]}

``kind``: int8, int4, decoded8 or decoded4; ``tile``: the fields of ``Tile``, or null where torch's own kernel is faster. A shape
takes the row of its outputs and inputs whose number of rows is nearest, as a ratio; without one, the default of ``tiles``. Of
attention (attention16-64 and so on: bits, keys of a block) the three numbers are tokens, queries of a block and channels, and
``tile`` is a ``Pass``.
"""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import cache
from math import log2
from pathlib import Path

import torch
from torch import Tensor

from dqtk.native.library import cache_folder

from .tiles import PASSES, TILES, Pass, Tile, by_rows, default_pass

VERSION = 1
SMALLEST = 99 << 10  # bytes of shared memory of a thread block, on the smallest of the devices that are served

_KINDS: dict[str, tuple[Tile, ...] | tuple[Pass, ...]] = {**TILES, **PASSES}


@dataclass(frozen=True, slots=True)
class Row:
    """The best of what was measured for ``t`` rows, ``n`` outputs and ``k`` inputs (attention: tokens, block, channels)."""

    kind: str
    t: int
    n: int
    k: int
    tile: Tile | Pass | None


def chosen(kind: str, t: int, n: int, k: int, device: torch.device) -> Tile | None:
    """The tile for a product, or None for torch's own kernel."""
    row = _nearest(kind, t, n, k, device)
    tile = by_rows(t, TILES[kind]) if row is None else row.tile
    assert not isinstance(tile, Pass)
    return tile


def chosen_pass(q: Tensor, v: Tensor, block_q: int, block_k: int, qk_bits: int, pv_bits: int) -> Pass:
    """How attention over q [B, H, N, D] and v [B, H, N, D'] runs."""
    channels, widths = max(q.shape[3], v.shape[3]), {bits == 16 for bits in (qk_bits, pv_bits)}
    if len(widths) == 1 and q.dtype != torch.float32:
        row = _nearest(f"attention{16 if True in widths else 8}-{block_k}", max(q.shape[2], 1), block_q, channels, q.device)
        if row is not None and isinstance(row.tile, Pass):
            return row.tile
    sizes = [q.element_size() if given == 16 else 1 for given in (qk_bits, pv_bits)]
    return default_pass(min(block_q, 128), block_k * channels * sum(sizes), shared_memory(q.device))


def _nearest(kind: str, t: int, n: int, k: int, device: torch.device) -> Row | None:
    measured = _of(device.index).get((kind, n, k)) if device.type == "cuda" else None
    return min(measured, key=lambda row: abs(log2(row.t / t))) if measured else None


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a thread block may take."""
    if device.type != "cuda":
        return SMALLEST
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALLEST)


def path_of(device_name: str) -> Path:
    """Where the table of a device lies, or would."""
    return cache_folder() / f"gpu-{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def current() -> Path | None:
    """The table of the current CUDA device, if it has one."""
    path = path_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return path if path is not None and path.is_file() else None


def save(path: Path, rows: Iterable[Row]) -> None:
    """Write a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [{"kind": r.kind, "t": r.t, "n": r.n, "k": r.k, "tile": r.tile and list(astuple(r.tile))} for r in rows]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"version": VERSION, "rows": listed}), encoding="utf-8")
    os.replace(temporary, path)
    forget()


def load(path: Path) -> list[Row]:
    """The rows of a table. Raises ``ValueError`` for a file that is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}")
        rows = [Row(r["kind"], r["t"], r["n"], r["k"], r["tile"] and type(_KINDS[r["kind"]][0])(*r["tile"])) for r in found["rows"]]
        for row in rows:
            if row.tile not in (None, *_KINDS[row.kind]) or row.t < 1:
                raise ValueError(f"{row}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: it must be a table of version {VERSION}, got another file. Remove it: {error!r}") from error
    return rows


def forget() -> None:
    """Read tables again at the next call."""
    _of.cache_clear()


@cache
def _of(index: int | None) -> dict[tuple[str, int, int], list[Row]]:
    """The table of a CUDA device: (kind, outputs, inputs) -> rows."""
    path = path_of(torch.cuda.get_device_name(index))
    table: dict[tuple[str, int, int], list[Row]] = {}
    for row in load(path) if path.is_file() else ():
        table.setdefault((row.kind, row.n, row.k), []).append(row)
    return table
