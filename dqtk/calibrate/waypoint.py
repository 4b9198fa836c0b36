"""Where the last replay of a model's calls ended, so that the next one begins there: what the calls had at one of its blocks.

Layers are solved in the order of a call, some at a time; making all calls from their start for each of these stages would run the
first blocks again and again, half of the model in the mean. So of every call the answer of the block in front of the last one that
was looked into is kept. The next replay runs the model's own forward, but blocks up to that one answer at once: the last of them
what was kept, the others zeros. Whether that is enough is not known of a model (later blocks may read what earlier ones answered,
as in a UNet). So the first call of every stage is made in full as well, and unless both ways show the layers the same bits, and
leave the same bits to be kept, replays are made in full from then on. So they are where more would be kept than is allowed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dqtk.checkpoint import digest
from dqtk.sites import repeated_block

from .stub import MISFITS, Kept, answering, copied, plain, zeros

Tell = Callable[[str, Tensor], object]  # (path of a layer, its input)


class Waypoint:
    """Of one module and the calls that are replayed.

    counts: path of a layer or block -> how often the first call reaches it, in order. limit: bytes that may be kept at a time.
    begin: number of the block, of those that a call reaches once, in front of which everything is kept. trusted: as long as replays
    may begin there.
    """

    def __init__(self, module: nn.Module, counts: Mapping[str, int], limit: int):
        self.module, self.counts, self.limit, self.begin, self.trusted = module, counts, limit, 0, True
        self.blocks = [path for path, num in counts.items() if num == 1 and "." in path and path == repeated_block(path)]
        self._kept: dict[int, Any] = {}  # by number of the call
        self._new: dict[int, Any] = {}
        self._zeros: dict[tuple[int, str], Any] = {}

    def replayed(self, index: int, watched: Collection[str], make: Callable[[Tell], None], tell: Tell) -> None:
        """Make the call of this number, from here if that serves; ``make`` makes it, telling what the watched layers see.

        The first one is made in full; and once more from here, told to nobody, to see whether others may be.
        """
        if not index:
            self._new = {}
        serves = self.serves(watched)
        if index or not serves:
            with self._beginning(index) if serves else nullcontext(), self._recording(index, watched):
                make(tell)
            self._kept.pop(index, None)
            return
        full: list[Any] = []
        again: list[Any] = []

        def tell_too(path: str, x: Tensor) -> None:
            full.append((path, digest(x)))
            tell(path, x)

        with self._recording(index, watched):
            make(tell_too)
        kept = self._new.get(index)
        try:
            with self._beginning(index), self._recording(index, watched):
                make(lambda path, x: again.append((path, digest(x))))
            same = (again, _digests(self._new.get(index))) == (full, _digests(kept))
        except MISFITS:
            same = False
        self._new[index] = kept
        if not same:
            self.leave()

    def serves(self, watched: Collection[str]) -> bool:
        """Whether a replay that looks into these layers may begin where the last one ended."""
        known = all(path in self.counts for path in watched)
        return self.trusted and self.begin > 0 and known and min(self._places(watched), default=self.begin) >= self.begin

    def advance(self, watched: Collection[str]) -> None:
        """Behind a replay that looked into these layers: the next may begin in front of the last block with one of them."""
        usable = self.trusted and self._new.get(0) is not None  # by the first call the others are checked
        self.begin, self._kept, self._new = (self._end(watched), self._new, {}) if usable else (0, {}, {})

    def leave(self) -> None:
        """Replay in full from now on, and keep nothing."""
        self.trusted, self.begin = False, 0
        self._kept, self._new, self._zeros = {}, {}, {}

    @contextmanager
    def _beginning(self, index: int) -> Iterator[None]:
        """While open, blocks before ``begin`` answer at once in the call of this number, if what they need was kept of it."""
        before = self.blocks[: self.begin]
        ready = self._kept.get(index) is not None and all((index, path) in self._zeros for path in before)
        with ExitStack() as stubs:
            for path in before if ready else ():
                answer = self._kept[index] if path == before[-1] else self._zeros[index, path]
                stubs.enter_context(answering(self.module.get_submodule(path), answer))
            yield

    @contextmanager
    def _recording(self, index: int, watched: Collection[str]) -> Iterator[None]:
        """While open, keeps what the call of this number has in front of the last block with one of these layers.

        Nothing of a call that reaches the blocks before it more than once or in another order, or where they answer something else
        than tensors and plain numbers.
        """
        before = self.blocks[: self._end(watched)] if self.trusted else []
        seen: list[str] = []
        self._new[index] = None

        def hook(path: str) -> Callable:
            def see(block: nn.Module, args: Any, output: Any) -> None:
                seen.append(path)
                self._new[index] = None
                if not plain(output):
                    return
                self._zeros[index, path] = zeros(output)
                if seen == before and self._fits(output):
                    self._new[index] = copied(output)

            return see

        with ExitStack() as hooks:
            for path in before:
                hooks.callback(self.module.get_submodule(path).register_forward_hook(hook(path)).remove)
            yield

    def _fits(self, output: Any) -> bool:
        """Whether there is room for one more answer; if not, no more is kept of this module's calls."""
        copies = [
            leaf.copy for kept in (self._kept, self._new) for leaf in tree_leaves(list(kept.values())) if isinstance(leaf, Kept)
        ]
        tensors = [*copies, *(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))]
        if sum(x.numel() * x.element_size() for x in tensors) <= self.limit:
            return True
        self.leave()
        return False

    def _places(self, watched: Collection[str]) -> list[int]:
        """Numbers of the blocks around these layers; none for layers around all blocks."""
        order = {path: number for number, path in enumerate(self.blocks)}
        return [order[block] for path in watched if (block := repeated_block(path)) in order]

    def _end(self, watched: Collection[str]) -> int:
        return max(self._places(watched), default=self.begin)


def _digests(answer: Any) -> list[Any]:
    return [digest(leaf.copy) if isinstance(leaf, Kept) else leaf for leaf in tree_leaves(answer)]
