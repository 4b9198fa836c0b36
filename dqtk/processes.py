"""The processes that share one command: who takes which piece of work, and where they wait for each other."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .sources import find_device

PATIENCE = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Processes:
    """``rank`` of ``world``; ``wait`` returns when all have come. ``total`` puts the sum over all in place of a tensor on
    ``device``.

    Collectives are used for waiting, and for what learns together (``refine/``).
    """

    rank: int
    world: int
    device: torch.device
    wait: Callable[[], None]
    total: Callable[[Tensor], None] = lambda tensor: None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> None:
        """The sum over all processes in place of the tensor, wherever it lies; the same bits in each."""
        there = tensor.to(self.device)
        self.total(there)
        if there is not tensor:
            tensor.copy_(there)

    def mine(self, work: Sequence[Any]) -> list[tuple[int, Any]]:
        """Every ``world``-th piece with its index."""
        return [(index, piece) for index, piece in enumerate(work) if index % self.world == self.rank]


ALONE = Processes(0, 1, torch.device("cpu"), lambda: None)


def processes() -> Processes:
    """This process among those that ``torchrun`` or ``accelerate launch`` started; alone without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState  # sets up torch.distributed, which a single process does not need

        # They meet between stages, which take as long as the slowest share: torch gives up after 10 or 30 minutes otherwise.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return Processes(state.process_index, state.num_processes, state.device, state.wait_for_everyone, _summed)
    return Processes(0, 1, find_device(), lambda: None)


def _summed(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)  # ends on every process with the same bits
