"""What attentions are given while kept calls are made again: queries, keys, values, masks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqtk.calibrate.replay import Call, arguments_for
from dqtk.calls import layouts_of
from dqtk.numerics.layout import Layout
from dqtk.spec import StaticBlocks


class Given(NamedTuple):
    """Arguments of ``scaled_dot_product_attention``: q, k [B, H, N, D], v [B, H, N, D'], a mask that is broadcastable to
    [B, H, N, N] or None, the scale of the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float

    def samples(self) -> Iterator["Given"]:
        """One after the other, without the axis of the batch: [H, N, D]."""
        for i, q in enumerate(self.q):
            yield Given(q, self.k[i], self.v[i], of_sample(self.mask, i, self.q.shape[0]), self.scale)


Seen = Callable[[str, Given], None]
SeenInCall = Callable[[str, Layout, Call, Given], None]


@contextmanager
def watching(module: nn.Module, paths: Sequence[str], seen: Seen) -> Iterator[None]:
    """While open, ``seen`` is told what these attentions give to ``scaled_dot_product_attention``."""
    open_now: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if function is F.scaled_dot_product_attention and open_now:
                names = ("query", "key", "value", "attn_mask")
                found = dict(zip(names, args, strict=False)) | given
                q, scale = found["query"], found.get("scale")
                scale = q.shape[-1] ** -0.5 if scale is None else scale
                seen(open_now[-1], Given(q, found["key"], found["value"], found.get("attn_mask"), scale))
            return function(*args, **given)

    with ExitStack() as stack:
        for path in paths:
            part = module.get_submodule(path)
            stack.callback(part.register_forward_pre_hook(lambda *_, path=path: open_now.append(path)).remove)
            stack.callback(part.register_forward_hook(lambda *_: open_now.pop() and None, always_call=True).remove)
        stack.enter_context(Watch())
        yield


def made_again(module: nn.Module, calls: Sequence[Call], paths: Sequence[str], seen: SeenInCall) -> None:
    """Make kept calls of a denoiser again; ``seen`` is told what these attentions are given in each.

    Raises:
        ValueError: an attention that no call reaches, or of a sequence that nobody described.
    """
    reached = set()
    for call in calls:
        arguments = arguments_for(module, call)
        layouts = layouts_of(module, arguments)

        def see(path: str, given: Given, call: Call = call, layouts: Mapping[int, Layout] = layouts) -> None:
            reached.add(path)
            q, k = given.q, given.k
            if q.shape[2] not in layouts or q.shape[2] != k.shape[2]:
                raise ValueError(
                    f"attention: {path} must be of a sequence of {sorted(layouts)} tokens to itself, got {q.shape[2]} queries and "
                    f"{k.shape[2]} keys. Its family's adapter must say what they are (docs/attention.md)."
                )
            seen(path, layouts[q.shape[2]], call, given)

        with watching(module, paths, see):
            module(**arguments)
    missing = sorted(set(paths) - reached)
    if missing:
        raise ValueError(
            f"attention: {missing[0]} must compute scaled_dot_product_attention in torch in some kept call, got none. Was another "
            "backend chosen with set_attention_backend? Reset it, or keep this one at 16 bits."
        )


def of_sample(mask: Tensor | None, sample: int, batch: int) -> Tensor | None:
    """A sample's mask, [H or 1, N or 1, N], of one that is broadcastable to [B, H, N, N]."""
    if mask is None:
        return None
    whole = mask.view(*[1] * (4 - mask.ndim), *mask.shape)
    return whole.expand(batch, *whole.shape[1:])[sample]


def group_of(call: Call, mask: StaticBlocks) -> int:
    """The interval of the noise level that a call lies in."""
    return int(torch.searchsorted(torch.tensor(mask.edges), torch.tensor(call.time or 0.0), right=True))
