"""Blocks of a model that answer what they are told to, without computing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

MISFITS = RuntimeError, ValueError, TypeError, LookupError, AttributeError
"""What a model may raise whose blocks hand each other more than their answers."""


class Zeros:
    """Like a tensor that was answered."""

    def __init__(self, x: Tensor):
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device

    def made(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Kept:
    """A tensor that was answered, on the CPU."""

    def __init__(self, x: Tensor):
        self.copy, self.device = x.detach().to("cpu", copy=True), x.device

    def made(self) -> Tensor:
        return self.copy.to(self.device, copy=True)


def plain(answer: Any) -> bool:
    """Whether what a block answered is made of tensors and plain numbers alone, so that it can be kept."""
    return all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(answer))


def copied(answer: Any) -> Any:
    """What a block answered, to be kept."""
    return tree_map(lambda x: Kept(x) if isinstance(x, Tensor) else x, answer)


def zeros(answer: Any) -> Any:
    """Zeros like what a block answered."""
    return tree_map(lambda x: Zeros(x) if isinstance(x, Tensor) else x, answer)


@contextmanager
def answering(block: Any, answer: Any) -> Iterator[None]:
    """While open, the block does not compute when it is called for the first time, but returns this."""
    own = vars(block).get("forward")
    compute, answers = block.forward, [answer]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            return compute(*args, **kwargs)
        return tree_map(lambda x: x.made() if isinstance(x, Zeros | Kept) else x, answers.pop())

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own
