"""Attention modules whose products are computed in blocks, reordered and rounded.

The module keeps its projections, norms, rotary embedding and processor: only its call of ``scaled_dot_product_attention`` is
answered here, through a ``TorchFunctionMode`` that is open while the module runs. So one file serves every family whose processor
ends in that call, masks are seen and honoured, nothing global is changed, and ``torch.compile`` traces it as one graph. What a
processor hands to another kernel (a backend chosen with ``set_attention_backend``) never arrives here, which is an error.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqtk.calls import LayoutRule, given_arguments, layout_rule, layouts_of
from dqtk.gpu.sage import PACKAGE, require_sage
from dqtk.kernels.block_attention import block_attention
from dqtk.kernels.sage import sage_attention
from dqtk.numerics.block_masks import above, carried, counts, guards, near, pack, pooled, radial, unpack
from dqtk.numerics.layout import Layout
from dqtk.ops import pv_mode_of
from dqtk.sites import heads_of
from dqtk.spec import (
    AttentionSpec,
    PooledBlocks,
    Radial,
    Sage,
    SkipSoftmax,
    SlidingTile,
    SmoothBoth,
    SmoothKeys,
    StaticBlocks,
    describe_attention,
)

from .noise import NoiseState, following

_SMOOTH = {type(None): "none", SmoothKeys: "k", SmoothBoth: "qk"}
IN_CALLS = PooledBlocks, SkipSoftmax  # masks that are made anew in every call
NAME = "blocks"  # of the module that holds orders and masks, within an attention module


class LayoutState:
    """What the sequences of the call in progress are. One per denoiser, owned by a hook on it."""

    def __init__(self, rule: LayoutRule) -> None:
        self.rule = rule
        self.layouts: dict[int, Layout] = {}
        self._indices: dict[tuple, Tensor] = {}

    def see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """The hook."""
        self.layouts = layouts_of(module, given_arguments(module, args, kwargs), self.rule)

    def index(self, orders: tuple[int, ...], layout: Layout, device: torch.device) -> Tensor:
        """int32 [H, N]: the token at every place, per head. Attentions with equal orders share it."""
        key = orders, layout.numbers, device
        if key not in self._indices:
            if any(known[1:] != key[1:] for known in self._indices):
                self._indices.clear()  # another size: those of the last are not needed
            each = {which: layout.index(which, device) for which in set(orders)}
            self._indices[key] = torch.stack([each[which] for which in orders])
        return self._indices[key]


def layout_state(module: nn.Module) -> LayoutState:
    """The state that follows this denoiser's calls: the one that is there, or a new one."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, LayoutState):
            return owner
    state = LayoutState(layout_rule(module))
    module.register_forward_pre_hook(state.see, with_kwargs=True)
    return state


class Blocks(nn.Module):
    """Masks of one attention: a buffer ``live`` uint8 [G, H, R, ceil(C / 8)] (``numerics.block_masks.pack``), per interval of the
    noise level and head, where blocks are static."""

    live: Tensor | None

    def __init__(self, spec: AttentionSpec, heads: int, device: torch.device | str | None = None):
        super().__init__()
        self.spec, self.heads = spec, heads
        live = None
        if isinstance(spec.mask, StaticBlocks):
            rows, columns = counts(Layout(*spec.layout), spec.block)
            shape = (len(spec.mask.edges) + 1, heads, rows, -(-columns // 8))
            live = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.register_buffer("live", live)
        self._layouts: LayoutState | None = None
        self._noise: NoiseState | None = None
        self._made: tuple[Any, Tensor | None] = (None, None)  # masks, or guards of masks in calls, of the last layout and device
        self._share: Tensor | None = None  # that calls choose, of the last
        self._picked: dict[tuple, Tensor] = {}

    def follow(self, denoiser: nn.Module) -> None:
        """Know what the calls of this denoiser look like."""
        self._layouts = layout_state(denoiser)
        if isinstance(self.spec.mask, StaticBlocks) and self.spec.mask.edges:
            self._noise = following(denoiser, self.spec.mask.edges)

    def density(self, layout: Layout | None = None) -> float:
        """Share of blocks that are computed, over heads and intervals, of a layout: by default calibration's, else the last call's.

        Where calls choose, that of the last call. Before any, and without data or layout, what calibration found, else what was
        asked for, and NaN where that is a threshold.
        """
        spec = self.spec
        if spec.mask is None:
            return 1.0
        if isinstance(spec.mask, IN_CALLS) and self._share is not None:
            return float(self._share)
        numbers = layout.numbers if layout is not None else spec.layout or (self._made[0] or ((), None))[0]
        wish = getattr(spec.mask, "density", math.nan)
        if not numbers or (self.live is not None and self.live.is_meta):
            return getattr(spec.mask, "computed", None) or wish
        if isinstance(spec.mask, IN_CALLS):
            return max(wish, float(guards(Layout(*numbers), spec.block).float().mean()))
        live = self._masks(Layout(*numbers), torch.device("cpu"))
        assert live is not None
        return float(unpack(live, counts(Layout(*numbers), spec.block)[1]).float().mean())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """[B, H, N, D'] for q, k [B, H, N, D] and v [B, H, N, D'] of a sequence that the call in progress has.

        Raises:
            ValueError: a sequence of another length.
        """
        if self.spec.kernel is not None:
            return self._by_package(q, k, v, mask, scale)
        assert self._layouts is not None
        layout = self._layouts.layouts.get(q.shape[2])
        if layout is None:
            known = sorted(self._layouts.layouts)
            raise ValueError(
                f"attention: a sequence that attends to itself must have {known} tokens in this call, got {q.shape[2]}. Its "
                "family's adapter must say what they are (docs/attention.md)."
            )
        order = self._layouts.index(self.spec.orders, layout, q.device) if any(self.spec.orders) else None
        live = self.live_blocks(q, k, mask, layout, order, scale)
        if live is not None and self._noise is not None:
            live = live.index_select(0, self._noise.index(q.device))
        if _learns(q, k, v):
            return self._differentiable(q, k, v, order, live, mask, scale)
        live = None if live is None else live[0]
        widths = self.spec.widths()
        if len(widths) == 1:
            return answered(self.spec, q, k, v, order, live, mask, scale, *widths)
        out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)
        for bits, heads in widths.items():
            at = self._heads(heads, q.device)
            rows, blocks = (None if t is None else t.index_select(0, at) for t in (order, live))
            of_q, of_k, of_v = (t.index_select(1, at) for t in (q, k, v))
            y = answered(self.spec, of_q, of_k, of_v, rows, blocks, _of_heads(mask, at), scale, bits)
            out = out.index_copy(1, at, y)
        return out

    def live_blocks(
        self, q: Tensor, k: Tensor, mask: Tensor | None, layout: Layout, order: Tensor | None, scale: float
    ) -> Tensor | None:
        """Packed masks [G, H, R, bytes] of a sequence, None: all blocks. G is 1 where they do not depend on the noise level."""
        spec = self.spec
        if not isinstance(spec.mask, IN_CALLS):
            return self._live(layout, q.device)
        guard = self._guard(layout, q.device)
        if isinstance(spec.mask, PooledBlocks):
            keep = pooled(q, k, order, guard, spec.block, scale, spec.mask.density, mask)
        else:
            keep = above(q, k, order, guard, spec.block, scale, spec.mask.threshold, mask)
        self._share = keep.float().mean()
        return pack(keep)[None]

    def _guard(self, layout: Layout, device: torch.device) -> Tensor:
        """bool [R, C] of a layout, kept for the next call."""
        key = layout.numbers, device
        if self._made[0] != key:
            self._made = key, guards(layout, self.spec.block).to(device)
        guard = self._made[1]
        assert guard is not None
        return guard

    def _heads(self, heads: tuple[int, ...], device: torch.device) -> Tensor:
        """int64: numbers of heads, kept for the next call."""
        key = heads, device
        if key not in self._picked:
            self._picked[key] = torch.tensor(heads, device=device)
        return self._picked[key]

    def _by_package(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if _learns(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        if mask is not None:
            raise ValueError(
                f"attention: a mask must be left out for {PACKAGE}, which drops it, got one of {list(mask.shape)}. Plan another "
                "attention for this model, or prompts without padding."
            )
        return sage_attention(q, k, v, scale)

    def _differentiable(
        self, q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, live: Tensor | None, mask: Tensor | None, scale: float
    ) -> Tensor:
        """The same blocks through torch's attention, which has a gradient; nothing is rounded, and the mask is of all scores."""
        num, size = q.shape[2], self.spec.block
        if live is not None:
            keep = unpack(live[0], -(-num // size[1])).repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)[:, :num, :num]
            if order is not None:
                place = torch.argsort(order.long(), dim=1)
                keep = torch.stack([head[at][:, at] for head, at in zip(keep, place, strict=True)])
            if mask is None:
                mask = keep[None]
            elif mask.dtype == torch.bool:
                mask = keep & mask
            else:
                mask = mask.masked_fill(~keep, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    def _live(self, layout: Layout, device: torch.device) -> Tensor | None:
        """Packed masks [G, H, R, bytes] or None; those that must be made are kept for the next call."""
        if self.live is not None and layout.numbers == self.spec.layout:
            return self.live.to(device)
        key = layout.numbers, device
        if self._made[0] != key:
            self._made = key, self._masks(layout, device)
        return self._made[1]

    def _masks(self, layout: Layout, device: torch.device) -> Tensor | None:
        spec = self.spec
        if spec.mask is None or isinstance(spec.mask, IN_CALLS):
            return None
        orders = self.spec.orders or (0,) * self.heads
        if isinstance(spec.mask, SlidingTile | Radial):
            rule = near if isinstance(spec.mask, SlidingTile) else radial
            each = {order: rule(layout, order, spec.block, spec.mask.density) for order in set(orders)}
            return pack(torch.stack([each[order] for order in orders])[None]).to(device)
        assert self.live is not None
        source = Layout(*spec.layout)
        if layout == source:
            return self.live
        kept = unpack(self.live.cpu(), counts(source, spec.block)[1])
        moved = [carried(kept[:, head], source, layout, order, spec.block) for head, order in enumerate(orders)]
        return pack(torch.stack(moved, dim=1)).to(device)

    def extra_repr(self) -> str:
        return describe_attention(self.spec)


def answered(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    live: Tensor | None,
    mask: Tensor | None,
    scale: float,
    bits: tuple[int, int],
) -> Tensor:
    """dqtk::block_attention as a spec has it; ``bits``: of queries and keys, of probabilities and values."""
    smooth = "none" if bits[0] == 16 else _SMOOTH[type(spec.smooth)]
    return block_attention(q, k, v, order, live, mask, *spec.block, scale, *bits, pv_mode_of(spec), smooth)


def _of_heads(mask: Tensor | None, at: Tensor) -> Tensor | None:
    """Of some heads, of a mask that is broadcastable to [B, H, N, N]."""
    return mask if mask is None or mask.ndim < 3 or mask.shape[-3] == 1 else mask.index_select(-3, at)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Answering(TorchFunctionMode):
    """Answers a sequence's attention to itself while its module runs."""

    def __init__(self, blocks: Blocks):
        super().__init__()
        self.blocks, self.answered = blocks, False

    def __torch_function__(self, function: Any, types: Sequence[type], args: tuple = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **given)
        self.answered = True
        return _answer(self.blocks, *args, **given)


def _answer(
    blocks: Blocks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` in blocks. Raises ``ValueError`` for what blocks have no meaning for."""
    if is_causal or dropout_p or query.shape[2] != key.shape[2] or query.shape[1] != key.shape[1]:
        raise ValueError(
            "attention: an attention in blocks must be of a sequence to itself, without dropout and causal mask, as many heads for "
            f"keys, got queries {tuple(query.shape)}, keys {tuple(key.shape)}, is_causal={is_causal}. Keep this one at 16 bits."
        )
    return blocks(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)


@cache
def _in_blocks(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of an attention module's class that answers in blocks."""
    plain = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = _Answering(self.get_submodule(NAME))
        with mode:
            out = plain(self, *args, **kwargs)
        if not mode.answered:
            raise ValueError(
                f"attention: {kind.__name__} must compute scaled_dot_product_attention in torch, got none. Was another backend "
                "chosen with set_attention_backend? Reset it."
            )
        return out

    def reduced(self: Any, protocol: Any) -> tuple:
        """A class that is made here cannot be found by its name: pickle makes it anew."""
        return (_bare, (kind,), *plain_reduced(self, protocol)[2:])

    plain_reduced: Any = kind.__reduce_ex__
    own = {"forward": forward, "__reduce_ex__": reduced, "__module__": kind.__module__, "plain_class": kind}
    return type(kind.__name__, (kind,), own)


def _bare(kind: type[nn.Module]) -> nn.Module:
    """An attention in blocks whose attributes are still to be filled, of a plain class."""
    made: Any = _in_blocks(kind)  # type: ignore[arg-type]  # mypy says that types do not hash
    return made.__new__(made)


def blocks_of(module: nn.Module) -> dict[str, Blocks]:
    """Path of an attention module -> its blocks."""
    return {path.rpartition(".")[0]: part for path, part in module.named_modules() if isinstance(part, Blocks)}


def check_free(part: Any, path: str, where: str) -> None:
    """Raises ``ValueError`` for an attention that has blocks already, or a forward of its own: a hook's would never come here."""
    if isinstance(getattr(part, NAME, None), Blocks):
        raise ValueError(f"{where}: attention of {path} must be dense, got blocks already. Load the original model.")
    own = vars(part).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(part).forward:  # accelerate leaves the plain one behind
        raise ValueError(
            f"{where}: attention of {path} must have no hooks, got some (offloading, caching, your own). Quantize first, add them "
            "afterwards."
        )


def check_packages(specs: Iterable[AttentionSpec | None], where: str) -> None:
    """Raises ``ValueError`` where a package is not installed whose kernel is planned."""
    if any(spec is not None and isinstance(spec.kernel, Sage) for spec in specs):
        require_sage(where)


def install_blocks(denoiser: nn.Module, path: str, spec: AttentionSpec, where: str = "attention") -> Blocks:
    """Give an attention of a denoiser its blocks, whose buffers are still to be filled.

    Raises:
        ValueError: there is no such attention.
    """
    try:
        part: Any = denoiser.get_submodule(path)
    except AttributeError:
        part = None
    heads = heads_of(part)
    if heads is None:
        raise ValueError(
            f"{where}: {path} must be an attention of {type(denoiser).__name__}, got {type(part).__name__}. "
            "Was the model class changed?"
        )
    check_free(part, path, where)
    device = next((tensor.device for tensor in part.parameters()), None)
    blocks = Blocks(spec, heads, device)
    part.add_module(NAME, blocks)
    vars(part).pop("forward", None)
    kind: Any = type(part)
    part.__class__ = _in_blocks(kind)
    blocks.follow(denoiser)
    return blocks


def remove_blocks(denoiser: nn.Module) -> None:
    """Make all attentions dense again."""
    for path in blocks_of(denoiser):
        part: Any = denoiser.get_submodule(path)
        part.__class__ = type(part).plain_class
        delattr(part, NAME)
    for key, hook in list(denoiser._forward_pre_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), LayoutState):
            del denoiser._forward_pre_hooks[key]
            denoiser._forward_pre_hooks_with_kwargs.pop(key, None)
