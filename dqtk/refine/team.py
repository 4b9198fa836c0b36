"""The processes that learn together, as refiners need them: who takes which calls, and sums of tensors over all.

``dqtk.processes.Processes`` is one; this room stands below it and only says what it asks for.
"""

from typing import Protocol

from torch import Tensor


class Team(Protocol):
    """``rank`` of ``world`` processes."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def add(self, tensor: Tensor) -> None:
        """The sum over all processes in place of the tensor; the same bits in each. All must call it, in one order."""
        ...


class Alone:
    """One process."""

    rank, world = 0, 1

    def add(self, tensor: Tensor) -> None:
        """Nothing to add."""


ALONE = Alone()
