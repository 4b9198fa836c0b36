"""Where the last replay of a model's calls ended, so that the next one begins there: what the calls had at one of its blocks.

Layers are solved in the order of a call, some at a time; making all calls from their start for each of these stages would run the
first blocks again and again, half of the model in the mean. So of every call the answer of the block in front of the last one that
was looked into is kept. The next replay runs the model's own forward, but blocks up to that one answer at once: the last of them
what was kept, the others zeros. Whether that is enough is not known of a model (later blocks may read what earlier ones answered,
as in a UNet). So the first call of every stage is made in full as well, and unless both ways show the layers the same bits, replays
are made in full from then on.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dqtk.sites import repeated_block


class Waypoint:
    """Of one module and the calls that are replayed.

    counts: path of a layer or block -> how often the first call reaches it, in order. limit: bytes that may be kept. begin: number
    of the block, of those that a call reaches once, in front of which everything is kept.
    """

    def __init__(self, module: nn.Module, counts: Mapping[str, int], limit: int):
        self.module, self.counts, self.limit, self.begin, self.trusted = module, counts, limit, 0, True
        self.blocks = [path for path, num in counts.items() if num == 1 and "." in path and path == repeated_block(path)]
        self._kept: dict[int, Any] = {}  # by number of the call
        self._new: dict[int, Any] = {}
        self._shapes: dict[tuple[int, str], Any] = {}

    def serves(self, watched: Collection[str]) -> bool:
        """Whether a replay that looks into these layers may begin where the last one ended."""
        return self.trusted and self.begin > 0 and min(self._places(watched), default=self.begin) >= self.begin

    @contextmanager
    def beginning(self, index: int) -> Iterator[None]:
        """While open, blocks before ``begin`` answer at once in the call of this number, if what they need was kept of it."""
        before = self.blocks[: self.begin]
        ready = index in self._kept and all((index, path) in self._shapes for path in before)
        with ExitStack() as stubs:
            for path in before if ready else ():
                last = path == before[-1]
                stubs.enter_context(self._answering(path, self._kept[index] if last else self._shapes[index, path], zeros=not last))
            yield

    @contextmanager
    def recording(self, index: int, watched: Collection[str]) -> Iterator[None]:
        """While open, keeps what the call of this number has in front of the last block with one of these layers."""
        before, seen = self.blocks[: self._end(watched)] if self.trusted else [], Counter[str]()

        def hook(path: str) -> Callable:
            def see(block: nn.Module, args: Any, output: Any) -> None:
                seen[path] += 1
                self._shapes[index, path] = tree_map(_shape, output)
                if path == before[-1]:
                    self._new[index] = tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, output)

            return see

        with ExitStack() as hooks:
            for path in before:
                hooks.callback(self.module.get_submodule(path).register_forward_hook(hook(path)).remove)
            yield
        plain = all(isinstance(leaf, Tensor | int | float | str | None) for leaf in tree_leaves(self._new.get(index)))
        if not plain or any(num > 1 for num in seen.values()):
            self._new.pop(index, None)

    def advance(self, watched: Collection[str]) -> None:
        """Behind a replay that looked into these layers: the next may begin in front of the last block with one of them."""
        self.begin, self._kept, self._new = self._end(watched), self._new, {}
        tensors = [x for answer in self._kept.values() for x in tree_leaves(answer) if isinstance(x, Tensor)]
        if sum(x.numel() * x.element_size() for x in tensors) > self.limit:
            self.begin, self._kept = 0, {}

    def distrust(self) -> None:
        """Replay in full from now on."""
        self.trusted, self.begin = False, 0
        self._kept, self._new, self._shapes = {}, {}, {}

    def _places(self, watched: Collection[str]) -> list[int]:
        """Numbers of the blocks around these layers; none for layers around all blocks."""
        order = {path: number for number, path in enumerate(self.blocks)}
        return [order[block] for path in watched if (block := repeated_block(path)) in order]

    def _end(self, watched: Collection[str]) -> int:
        return max(self._places(watched), default=self.begin)

    @contextmanager
    def _answering(self, path: str, answer: Any, *, zeros: bool) -> Iterator[None]:
        """While open, the block does not compute, but returns this, or zeros like it."""
        block: Any = self.module.get_submodule(path)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))

        def forward(*args: Any, **kwargs: Any) -> Any:
            def made(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                return torch.zeros(x.shape, dtype=x.dtype, device=device) if zeros else x.to(device, copy=True)

            return tree_map(made, answer)

        own = vars(block).get("forward")
        block.forward = forward
        try:
            yield
        finally:
            del block.forward
            if own is not None:
                block.forward = own


def _shape(x: Any) -> Any:
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x
