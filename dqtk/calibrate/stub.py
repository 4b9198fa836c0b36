"""Blocks of a model that answer what they are told to, without computing."""

from collections.abc import Callable, Iterator
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


def made(answer: Any) -> Any:
    """What was kept or is to be zeros, as tensors."""
    return tree_map(lambda x: x.made() if isinstance(x, Zeros | Kept) else x, answer)


@contextmanager
def served(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While open, calls of a module are made by this function."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def answering(block: Any, answer: Any) -> Iterator[None]:
    """While open, the block does not compute when it is called for the first time, but returns this."""
    compute, answers = block.forward, [answer]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return made(answers.pop()) if answers else compute(*args, **kwargs)

    with served(block, forward):
        yield


@contextmanager
def repeating(module: Any) -> Iterator[None]:
    """While open, the module computes when it is called for the first time with tensors of some shapes, and answers the same to
    all such calls from then on."""
    compute, answers = module.forward, dict[tuple[torch.Size, ...], Any]()

    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple(leaf.shape for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if shapes not in answers:
            answers[shapes] = copied(compute(*args, **kwargs))
        return made(answers[shapes])

    with served(module, forward):
        yield
