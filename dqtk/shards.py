"""The safetensors files of one component: read a tensor at a time, and written at places that are fixed before their contents.

A file is eight bytes (length of the header, little-endian), the header (JSON: name -> dtype, shape and place of the data, and
metadata), and the data without gaps. Names, shapes and sizes of all tensors of a quantized component follow from its plan, so the
files get their final size at once and every tensor its place: layers may be solved in any order, by any process, and be stopped at
any of them. Headers are written last, with the digests; until then the files begin with zeros, which nothing loads.

Headers end in spare spaces, as the format allows: a search may decide between dtypes of the same width while layers are solved.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoint import DIGESTS
from .sources import read_json, readable

LIMIT = 5 * 10**9  # bytes of tensors in a file, as the hosts' default
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
SPARE = max(map(len, NAMES.values())) - 1  # what a header may grow by, per tensor
SAMPLE = 64  # bytes of a tensor, at its beginning and in its middle


# --- reading ---------------------------------------------------------------------------------------------------------


class StoredTensors:
    """Tensors of a saved component: where they are, of what shape and dtype. Contents are read when asked for.

    Raises ``ValueError`` if a file is missing or damaged, or if there are none in the safetensors format.
    """

    def __init__(self, folder: Path, stem: str):
        self.folder = folder
        self.files = _weight_files(folder, stem)
        self._place: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            with readable(f"model: {file}"), safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                    part, self._place[name] = tensors.get_slice(name), file
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{name} is of dtype {part.get_dtype()}, which no plain model has")
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor. The file is opened for it alone, so that what was mapped of it is given back with the tensor."""
        file = self._place[name]
        with readable(f"model: {file}"), safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)

    def identity(self) -> dict[str, list[int | str]]:
        """File name -> size, and a digest of its header and of some bytes of every tensor: tells models apart unread."""
        return {file.name: [file.stat().st_size, _fingerprint(file)] for file in self.files}


def _weight_files(folder: Path, stem: str) -> list[Path]:
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "no folder"
        raise ValueError(
            f"model: {folder} must hold {single.name} or {index.name}, got {there}. "
            "Save the model again with save_pretrained, which writes safetensors."
        )
    names = read_json(index, "model").get("weight_map", {}).values()
    files = [folder / Path(name).name for name in sorted(set(names))]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise ValueError(
            f"model: {folder} must hold all {len(files)} files of {index.name}, got none of the name "
            f"{missing[0] if missing else '(the index is empty)'}. Copy or download the folder again."
        )
    return files


def _fingerprint(file: Path) -> str:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        sha = hashlib.sha256(header)
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                for place in (start, (start + end) // 2):
                    stream.seek(8 + length + place)
                    sha.update(stream.read(min(SAMPLE, end - place)))
    return sha.hexdigest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a tensor lies: its file, and the first byte of it behind the file's header."""

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class LaidOutTensors:
    """The files that a component will have: ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` and an index.

    Args:
        folder: where they will be.
        stem: as the host library names them.
        tensors: name -> (shape, dtype), in the order of the state dict.
        aliases: name -> the name of the same tensor that is in ``tensors``; they are in the digests only.
        limit: bytes of tensors in a file; a larger tensor has one of its own.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        aliases: Mapping[str, str],
        limit: int = LIMIT,
    ):
        self.folder, self.stem, self.aliases = folder, stem, dict(aliases)
        self.places = _places(stem, tensors, limit)
        blank = dict.fromkeys(tensors, "0" * 16)
        dtypes = {name: place.dtype for name, place in self.places.items()}
        self._room: dict[str, int] = {}  # bytes of a file's header
        self.sizes: dict[str, int] = {}  # bytes of a file
        for file in dict.fromkeys(place.file for place in self.places.values()):
            inside = [place for place in self.places.values() if place.file == file]
            used = len(self._header(file, blank, dtypes)) + SPARE * len(inside)
            self._room[file] = used + -used % 8  # the data begins at a multiple of 8, as the format's own writer has it
            self.sizes[file] = 8 + self._room[file] + sum(place.num_bytes for place in inside)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(self.sizes.values())

    def reserve(self) -> None:
        """Make the files at their final size, where there is room for them. Raises ``ValueError`` for a disk that is too small."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, size in self.sizes.items():
            with room_for(f"{self.num_bytes / 1e9:.2f} GB in {self.folder}"), (self.folder / file).open("wb") as stream:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size)
                stream.truncate(size)

    def is_reserved(self) -> bool:
        """Whether the files are there as ``reserve`` made them."""
        paths = [(self.folder / file, size) for file, size in self.sizes.items()]
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors at their places; they are on the disk when this returns."""
        by_file: dict[str, list[str]] = {}
        for name in tensors:
            by_file.setdefault(self.places[name].file, []).append(name)
        for file, names in by_file.items():
            with room_for(f"{self.num_bytes / 1e9:.2f} GB in {self.folder}"), (self.folder / file).open("r+b") as stream:
                for name in names:
                    tensor, place = tensors[name].detach().cpu().contiguous(), self.places[name]
                    assert (tuple(tensor.shape), tensor.dtype.itemsize) == (place.shape, place.dtype.itemsize), name
                    stream.seek(8 + self._room[file] + place.start)
                    if tensor.numel():
                        stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                stream.flush()
                os.fsync(stream.fileno())

    def finish(self, digests: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> None:
        """Write the headers, and the index where there are several files.

        Args:
            digests: of every tensor, see ``checkpoint.digest``.
            dtypes: of tensors whose dtype was decided while layers were solved; the others have the expected one.
        """
        decided = {name: dtypes.get(name, place.dtype) for name, place in self.places.items()}
        for file in self.sizes:
            header = self._header(file, digests, decided)
            assert len(header) <= self._room[file]
            with (self.folder / file).open("r+b") as stream:
                stream.write(self._room[file].to_bytes(8, "little") + header.ljust(self._room[file]))
                stream.flush()
                os.fsync(stream.fileno())
        if len(self.sizes) > 1:
            total = sum(place.num_bytes for place in self.places.values())
            index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in self.places.items()}}
            text = json.dumps(index, indent=2, sort_keys=True)
            (self.folder / f"{self.stem}.safetensors.index.json").write_text(text, encoding="utf-8")

    def _header(self, file: str, digests: Mapping[str, str], dtypes: Mapping[str, torch.dtype]) -> bytes:
        marks = {**digests, **{name: f"={owner}" for name, owner in self.aliases.items()}}
        metadata = {"format": "pt", DIGESTS: json.dumps(marks, separators=(",", ":"))}
        header: dict[str, object] = {"__metadata__": metadata}
        for name, place in self.places.items():
            if place.file == file:
                ends = [place.start, place.start + place.num_bytes]
                header[name] = {"dtype": NAMES[dtypes[name]], "shape": list(place.shape), "data_offsets": ends}
        return json.dumps(header, separators=(",", ":")).encode()


def _places(stem: str, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], limit: int) -> dict[str, Place]:
    """Files in the order of the state dict; in each, wide dtypes first, so that every tensor is aligned."""
    groups: list[list[str]] = []
    taken = 0
    for name, (shape, dtype) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if not groups or (groups[-1] and taken + size > limit):
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += size
    places = {}
    for i, names in enumerate(groups):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        start = 0
        for name in sorted(names, key=lambda name: (-tensors[name][1].itemsize, name)):
            shape, dtype = tensors[name]
            places[name] = Place(file=file, start=start, shape=shape, dtype=dtype)
            start += places[name].num_bytes
    return places


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """A full disk as a ``ValueError`` that says for what there must be room, and that nothing is lost."""
    full = (errno.ENOSPC, errno.EDQUOT)
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = error.errno if isinstance(error, OSError) else next((n for n in full if f"(os error {n})" in str(error)), None)
        if code not in full:
            raise
        raise ValueError(
            f"quantize: disk must have room for {what}, got: {os.strerror(code)}. "
            "Make room and run the same command again: it goes on where it stopped."
        ) from error


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A small safetensors file of unfinished work: it appears whole, and is on the disk when this returns.

    Raises ``ValueError`` for a full disk.
    """
    partial = path.with_name(f".{path.name}.partial")
    with room_for(f"{path.name} in {path.parent}"):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_whole(path: Path) -> dict[str, Tensor]:
    """The tensors of such a file, on the CPU. Raises ``ValueError`` that names it when it is missing or damaged."""
    with readable(f"quantize: {path}"):
        return load_file(path)


def same_tensors(names: Iterable[str], tensors: Mapping[str, object]) -> dict[str, str]:
    """Name -> the first name of the same tensor (the same object), for names that are not the first."""
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(tensors[name]), name) for name in names}
    return {name: owner for name, owner in found.items() if owner != name}
