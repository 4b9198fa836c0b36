"""Layers that are solved, on the disk: what an interrupted run goes on from, and what several processes hand each other.

A group of layers that are solved together is a safetensors file, and a line in a journal (``journal.py``) once its file is whole.
Processes that ``torchrun`` or ``accelerate launch`` started take every n-th group each, and then read those of the others.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .calibrate import Stats, calibrate
from .journal import Journal, claim, done
from .methods.solve import Solution
from .plan import Choice, Plan
from .processes import ALONE, Processes
from .shards import read_whole, write_whole
from .sources import readable
from .spec import ByLevel, LayerSpec, from_json, to_json


class SolvedFolder:
    """The solved groups of one task in a folder that all processes reach.

    Args:
        folder: made if it is not there.
        task: what decides the solutions; see ``journal.claim``.
        processes: that share the work.
    Raises:
        ValueError: the folder holds other work, or is damaged.
    """

    def __init__(self, folder: Path, task: Mapping[str, Any], processes: Processes = ALONE):
        self.folder, self.processes = folder, processes
        if processes.first:
            claim(folder, task)
        processes.wait()
        if not processes.first:
            claim(folder, task)  # raises where this process has another task than the first
        self.known = frozenset(done(folder))
        processes.wait()  # all have read the same journal before anyone goes on writing it

    def __contains__(self, group: Sequence[Choice]) -> bool:
        return _name(group) in self.known

    def mine(self, groups: Sequence[list[Choice]]) -> list[list[Choice]]:
        """Of those that are not solved yet: the share of this process."""
        return [group for _, group in self.processes.mine([group for group in groups if group not in self])]

    def put(self, solved: Sequence[tuple[Choice, Solution]]) -> None:
        """Keep a solved group; it is on the disk when this returns."""
        name = _name([choice for choice, _ in solved])
        tensors = {f"{i}.{key}": t for i, (_, found) in enumerate(solved) for key, t in found.tensors.items()}
        shifts = {i: found.bias_shift for i, (_, found) in enumerate(solved)}
        tensors |= {f"{i} bias shift": shift for i, shift in shifts.items() if shift is not None}
        specs = json.dumps([to_json(found.spec) for _, found in solved])
        write_whole(self._path(name), tensors, {"specs": specs})
        with Journal(self.folder, self.processes.rank) as journal:
            journal.record(name, {"sites": [choice.site.id for choice, _ in solved]})

    def get(self, group: Sequence[Choice]) -> list[tuple[Choice, Solution]]:
        """A group that this or another process, or an earlier run, has put there. Tensors are on the CPU."""
        path, solved = self._path(_name(group)), []
        with readable(f"quantize: {path}"), safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for i, (choice, stored) in enumerate(zip(group, json.loads(file.metadata()["specs"]), strict=True)):
                spec = from_json(stored, f"quantize: {path}")
                assert isinstance(spec, LayerSpec | ByLevel)
                tensors = {n.partition(".")[2]: file.get_tensor(n) for n in names if n.startswith(f"{i}.")}
                shift = file.get_tensor(f"{i} bias shift") if f"{i} bias shift" in names else None
                solved.append((choice, Solution(spec=spec, tensors=tensors, bias_shift=shift)))
        return solved

    def books(self, learned: Callable[[], Mapping[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
        """Books that layers share, by component and group: learned by the first process, once, and read by all."""
        path = self.folder / "books.safetensors"
        if self.processes.first and not path.is_file():
            tensors = {f"{name}.{group}": book for name, books in learned().items() for group, book in books.items()}
            if tensors:
                write_whole(path, tensors)
        self.processes.wait()
        found: dict[str, dict[str, Tensor]] = {}
        if not path.is_file():
            return found
        for name, book in read_whole(path).items():
            component, _, group = name.partition(".")
            found.setdefault(component, {})[group] = book
        return found

    def wait(self) -> None:
        """Until all processes have solved their shares."""
        self.processes.wait()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _name(group: Sequence[Choice]) -> str:
    return hashlib.sha256("\n".join(choice.site.id for choice in group).encode()).hexdigest()[:16]


def calibrate_together(pipe: Any, prompts: Sequence[str], plan: Plan, file: Path, processes: Processes, **how: Any) -> Stats:
    """``calibrate`` with ``output=file`` in the first process, which the others read; ``how``: its other arguments.

    The file is read back by the first too, so that all have the same numbers whatever they were computed on.
    """
    if processes.first:
        file.parent.mkdir(parents=True, exist_ok=True)
        calibrate(pipe, prompts, plan, output=file, **how)
    processes.wait()
    return Stats.load(file)
