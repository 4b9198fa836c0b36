"""What a sequence of tokens is: a grid of frames, rows and columns, with text tokens before or behind it."""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

# As PAROAttention numbers them: which axis of (frame, row, column) is the outermost, the next, the innermost.
ORDERS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
NAMES = tuple("".join("FHW"[axis] for axis in axes) for axes in ORDERS)


@dataclass(frozen=True, slots=True)
class Layout:
    """A grid of tokens, the columns innermost, with ``before`` text tokens before it and ``after`` behind."""

    frames: int
    rows: int
    columns: int
    before: int = 0
    after: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.frames, self.rows, self.columns

    @property
    def tokens(self) -> int:
        return self.before + self.frames * self.rows * self.columns + self.after

    @property
    def numbers(self) -> tuple[int, ...]:
        """As ``AttentionSpec.layout`` holds it."""
        return astuple(self)

    def orders(self) -> list[int]:
        """Indices into ``ORDERS`` of those that differ: axes of one token do not count."""
        found: dict[tuple[int, ...], int] = {}
        for index, axes in enumerate(ORDERS):
            found.setdefault(tuple(axis for axis in axes if self.grid[axis] > 1), index)
        return list(found.values())

    def index(self, order: int, device: torch.device | None = None) -> Tensor:
        """int32 [tokens]: the token that stands at every place of an order. Text stays where it is."""
        size = self.frames * self.rows * self.columns
        grid = torch.arange(size, dtype=torch.int32, device=device).view(self.grid).permute(ORDERS[order]).reshape(-1)
        first = torch.arange(self.before, dtype=torch.int32, device=device)
        last = torch.arange(self.before + size, self.tokens, dtype=torch.int32, device=device)
        return torch.cat([first, grid + self.before, last])

    def positions(self, order: int) -> Tensor:
        """int64 [tokens, 3]: frame, row and column of the token at every place; -1 for text."""
        index = self.index(order).long() - self.before
        size = self.frames * self.rows * self.columns
        where = torch.stack([index // (self.rows * self.columns), index // self.columns % self.rows, index % self.columns], dim=1)
        return torch.where(((index >= 0) & (index < size))[:, None], where, -1)
