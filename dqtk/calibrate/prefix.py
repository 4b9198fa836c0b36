"""The same calls again and again, each time with another layer changed: blocks in front of it answer what they answered before.

A call is a sequence: a block that it has left before it first comes to the changed layer cannot know of the change. So of every
call the answers of all blocks are kept, and while a layer is changed the model's own forward runs with those blocks answering at
once: half of a model in the mean, when its layers are changed one by one. What has changed is seen by looking (other modules,
other tensors, writes that torch counts), not told. Blocks that write to what they are given, or hand each other something aside,
would break this; so a call is made in full as well whenever other blocks are left out than before, or of other sizes, and unless
both give the same bits, calls are made in full from then on, and a warning says so.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dqtk.checkpoint import digest
from dqtk.nn.correction import output_of
from dqtk.sites import repeated_block

from .replay import Call, made
from .stub import MISFITS, answering, copied, plain


@dataclass(slots=True)
class _Seen:
    """Of one call: when it first came to a module, when it left a block, what the block answered; times are numbers of events."""

    begun: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)


class Prefix:
    """Of a denoiser and its kept calls.

    exact: first output of every call as the denoiser was at the beginning, on the CPU. trusted: as long as blocks may be left out.
    """

    def __init__(self, module: nn.Module, calls: Sequence[Call], limit: int):
        """limit: bytes of answers that may be kept; calls beyond it are made in full."""
        self.module, self.calls, self.trusted = module, calls, True
        self._left, self._were = limit, _tensors(module)
        self._seen: list[_Seen] = []
        self._checked: set[tuple[tuple[str, ...], torch.Size]] = set()
        self.exact: list[Tensor] = []
        for call in calls:
            with self._recording():
                self.exact.append(_output(module, call))

    def outputs(self) -> list[Tensor]:
        """First output of every call as the denoiser is now, on the CPU."""
        changed = self._changed()
        return [self._again(index, call, changed) for index, call in enumerate(self.calls)]

    def left_out(self, index: int, changed: Sequence[str]) -> list[str]:
        """Blocks that need not compute in the call of this number while these modules are changed; none inside another."""
        if not self.trusted:
            return []
        seen = self._seen[index]
        first = min((_first(seen.begun, path) for path in changed), default=len(seen.begun) + len(seen.ended))
        before = [path for path in seen.answers if seen.ended[path] < first]
        return [path for path in before if not any(path.startswith(f"{other}.") for other in before)]

    def _again(self, index: int, call: Call, changed: Sequence[str]) -> Tensor:
        paths = self.left_out(index, changed)
        case = tuple(paths), self.exact[index].shape
        if not paths or case in self._checked:
            return self._shortened(index, call, paths)
        self._checked.add(case)
        full = _output(self.module, call)
        try:
            same = digest(self._shortened(index, call, paths)) == digest(full)
        except MISFITS:
            same = False
        if not same:
            self.trusted, self._seen = False, []
            warnings.warn(
                f"dqtk: blocks of {type(self.module).__name__} depend on each other's calls; all are computed", stacklevel=2
            )
        return full

    def _shortened(self, index: int, call: Call, paths: Sequence[str]) -> Tensor:
        with ExitStack() as stubs:
            for path in paths:
                stubs.enter_context(answering(self.module.get_submodule(path), self._seen[index].answers[path]))
            return _output(self.module, call)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """While open, one call is made, and what is to be known of it is kept: all answers, or none if there is no room."""
        seen, left = _Seen(), self._left

        def begins(path: str) -> Callable:
            def see(block: nn.Module, args: Any) -> None:
                seen.begun.setdefault(path, len(seen.begun) + len(seen.ended))

            return see

        def ends(path: str) -> Callable:
            def see(block: nn.Module, args: Any, output: Any) -> None:
                nonlocal left
                again = path in seen.ended  # a block that is called twice answers twice
                seen.ended[path] = len(seen.begun) + len(seen.ended)
                seen.answers.pop(path, None)
                left -= _size(output)
                if left < 0:
                    seen.answers.clear()
                elif plain(output) and not again:
                    seen.answers[path] = copied(output)

            return see

        with ExitStack() as hooks:
            for path, part in self.module.named_modules():
                if path:
                    hooks.callback(part.register_forward_pre_hook(begins(path)).remove)
                if "." in path and path == repeated_block(path):
                    hooks.callback(part.register_forward_hook(ends(path)).remove)
            yield
        if left >= 0:
            self._left = left
        self._seen.append(seen)

    def _changed(self) -> list[str]:
        """Paths of modules that are not what they were."""
        now = _tensors(self.module)
        return [path for path in {**self._were, **now} if not _same(self._were.get(path), now.get(path))]


def _tensors(module: nn.Module) -> dict[str, tuple]:
    """Path -> module, its kind, its own tensors and how often they were written to."""
    found = {}
    for path, part in module.named_modules():
        own = [tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in own]
        found[path] = (part, type(part), *own, *versions)
    return found


def _same(was: tuple | None, now: tuple | None) -> bool:
    if was is None or now is None or len(was) != len(now):
        return False
    return all(a == b if isinstance(a, int) else a is b for a, b in zip(was, now, strict=True))


def _first(begun: dict[str, int], path: str) -> int:
    """When a call first comes to a module, or to what holds it; 0 if that is not known."""
    while path and path not in begun:
        path = path.rpartition(".")[0]
    return begun.get(path, 0)


def _size(answer: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(answer) if isinstance(leaf, Tensor))


def _output(module: nn.Module, call: Call) -> Tensor:
    (found,) = made(module, [call])
    return output_of(found).detach().cpu()
