"""dqtk:: op of attention whose tokens are put in another order per head, so that what a head looks at lies in few dense blocks:
blocks that are not live are skipped, the others are multiplied in 16 bits or as integers (PAROAttention, arXiv 2506.16054).

``block_attention_reference`` is the meaning. Where it departs from the paper and its released kernels:
- Blocks are skipped before the softmax: rows sum to one over what is left. Masking probabilities afterwards has 2 to 3.5 times the
  error.
- Integer probabilities have a scale per row of a tile, unsigned: the largest of a row in a tile is known anyway, and the error is a
  sixth of that with a scale per tile, a 24th of that with one scale for all. The other two are there to compare with.

There is no gradient: what learns goes through torch's attention under the same blocks (``nn/attention.py``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import gpu, native
from dqtk.gpu import flex
from dqtk.numerics.block_masks import unpack

from .attention import added, through_torch
from .attention_check import Kernel, check_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = (16, 8, 4)
PV_MODES = ("row", "tile", "static", "fp8")
FP8_MOST = 448.0
SMOOTH = ("none", "k", "qk")


@torch.library.custom_op("dqtk::block_attention", mutates_args=())
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor | None,
    live: Tensor | None,
    mask: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
    qk_bits: int,
    pv_bits: int,
    pv_mode: str,
    smooth: str,
) -> Tensor:
    """softmax(q k^T * scale + mask) v over live blocks of reordered tokens.

    Args:
        q, k, v: float [B, H, N, D], [B, H, N, D] and [B, H, N, D'], one dtype of ``DTYPES``.
        order: int32 [H, N] or None (as they lie): row i of head h in the new order is row ``order[h, i]`` of q, k and v.
        live: uint8 [H, rows, ceil(columns / 8)] or None (all): bit j % 8, least significant first, of byte j // 8 says whether
            query block i sees key block j, blocks of the new order. The last blocks may be short.
        mask: bool (True: the key is seen) or float (added), broadcastable to [B, H, N, N], in the original order.
        block_q, block_k: tokens of a block.
        scale: of the scores.
        qk_bits: 16 (not rounded), or the width of codes, signed: queries have a scale per query block, keys one per key block.
        pv_bits: 16, or the width of codes of probabilities, and of values, with a scale per key block and channel.
        pv_mode: "row": unsigned, relative to the largest of the row in the tile; "tile": signed, with a scale per tile; "static":
            signed, relative to the largest of the row; "fp8" (of 8 bits): E4M3 numbers up to 448, relative to the largest of the
            row in the tile, and values as E4M3 numbers too.
        smooth: "k": rounded keys are without their mean over all tokens; "qk": queries too, without that of their block, whose
            product with the keys is added unrounded.
    Returns:
        [B, H, N, D'] in the original order and the dtype of ``q``; 0 where a query sees no key.
    Raises:
        ValueError: an argument is none of these.
    """
    _check(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth)
    given = q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth
    return _flexed(*given) if _flexes(*given) else _through_torch(*given)


@block_attention.register_kernel("cpu")
def _(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth):
    given = q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth
    _check(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth)
    _check_order(order)
    if _flexes(*given):
        return _flexed(*given)
    served = native.load() is not None and native.takes_blocks(live is not None, block_k, q.shape[3], qk_bits, pv_bits, pv_mode)
    if not served or 0 in (*q.shape, *v.shape):
        return _through_torch(*given)
    kernel = Kernel(
        run=_through_native,
        which=native.load(),
        name=lambda: native.describe()[1],
        remedy="DQTK_NATIVE=off does without it.",
    )
    check_kernel(kernel, _through_torch, *given)
    return _through_native(*given)


def _through_native(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> Tensor:
    library = native.load()
    assert library is not None
    mask = None if mask is None else added(mask, q, k)
    return native.block_attention(library, q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, smooth)


@block_attention.register_kernel("cuda")
def block_attention_on_cuda(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> Tensor:
    """The op on a CUDA device: Triton kernels, else torch's; ``ops.report_of_attention`` says which and why."""
    given = q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth
    _check(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth)
    if _flexes(*given):
        return _flexed(*given)
    plain = live is None and (qk_bits, pv_bits) == (16, 16)  # all of it, as it is: torch's own is the fastest
    served = gpu.serves(q.device) and gpu.takes_blocks(block_q, block_k, max(q.shape[3], v.shape[3]), qk_bits, pv_bits, pv_mode)
    if plain or not served or 0 in (*q.shape, *v.shape):
        return _through_torch(*given)
    check_kernel(_TRITON, _through_torch, *given)
    return _through_triton(*given)


def _through_triton(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> Tensor:
    return gpu.block_attention(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, smooth)


_TRITON = Kernel(run=_through_triton, which="triton", name=lambda: gpu.describe()[1], remedy="DQTK_TRITON=off does without it.")


def _flexes(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> bool:
    return flex.takes(live is not None, block_q, block_k, qk_bits, pv_bits) and 0 not in (*q.shape, *v.shape)


def _flexed(*given) -> Tensor:
    """Looked at at its first call, as kernels of our own are."""
    check_kernel(_FLEX, _through_torch, *given)
    return _through_flex(*given)


def _through_flex(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> Tensor:
    return flex.block_attention(q, k, v, order, live, mask, block_q, block_k, scale)


_FLEX = Kernel(run=_through_flex, which="flex", name=lambda: flex.NAME, remedy="Without DQTK_FLEX it is not used.")


@block_attention.register_fake
def _(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth):
    _check(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def block_attention_reference(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> Tensor:
    """The meaning of ``block_attention``, in float32: one head and one block of queries at a time."""
    most_q, most_p = _largest(qk_bits, signed=True), _largest(pv_bits, signed=pv_mode != "row")
    out = _output(q, v)
    for h, rows, row_blocks in _heads(order, live, q, block_q, block_k):
        q_h, k_h, v_h = (t[:, h].index_select(1, rows).float() for t in (q, k, v))
        if smooth != "none":
            k_h = k_h - k_h.mean(1, keepdim=True, dtype=torch.float64).float()
        k_codes, k_scale = _codes(k_h, block_k, most_q, per_channel=False)
        values = _values(v_h, block_k, pv_bits, pv_mode)
        for some, seen in row_blocks:
            q_i = q_h[:, some]
            shift = q_i.mean(1, keepdim=True, dtype=torch.float64).float() if smooth == "qk" else None
            codes, q_scale = _codes(q_i if shift is None else q_i - shift, block_q, most_q, per_channel=False)
            scores = (codes @ k_codes[:, seen].mT) * (q_scale * k_scale[:, seen].mT * scale)
            if shift is not None:
                scores = scores + shift @ k_h[:, seen].mT * scale
            if mask is not None:
                scores = _masked(scores, _part(mask, q, h, rows[some], rows[seen]))
            out[:, h, rows[some]] = _weighted(scores, values[:, seen], block_k, most_p, pv_mode).to(q.dtype)
    return out


def _largest(bits: int, signed: bool) -> int | None:
    """Code, or None for numbers that are not rounded."""
    return None if bits == 16 else 2 ** (bits - signed) - 1


def _codes(x_BND: Tensor, block: int, most: int | None, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Whole numbers [B, N, D] and their scale [B, N, D or 1], that of each block of tokens repeated; x ~ codes * scale."""
    if most is None:
        return x_BND, x_BND.new_ones((1, x_BND.shape[1], 1))
    scaled, scale = _scaled(x_BND, block, most, per_channel)
    return scaled.round_().clamp_(-most, most), scale


def _scaled(x_BND: Tensor, block: int, most: float, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Numbers of at most ``most`` [B, N, D], and the scale of each block of tokens repeated [B, N, D or 1]."""
    num = x_BND.shape[1]
    blocks = F.pad(x_BND, (0, 0, 0, -num % block)).unflatten(1, (-1, block))
    scale = blocks.abs().amax((2,) if per_channel else (2, 3), keepdim=True) / most
    scale = torch.where(scale <= 1e-30, 1.0, scale)
    return (blocks / scale).flatten(1, 2)[:, :num], scale.expand(-1, -1, block, -1).flatten(1, 2)[:, :num]


def _values(v_BND: Tensor, block: int, bits: int, mode: str) -> Tensor:
    """Values [B, N, D'] as they are multiplied: codes or E4M3 numbers times a scale per block and channel."""
    if mode == "fp8":
        scaled, scale = _scaled(v_BND, block, FP8_MOST, per_channel=True)
        codes = _to_e4m3(scaled)
    else:
        codes, scale = _codes(v_BND, block, _largest(bits, signed=True), per_channel=True)
    return codes * scale


def _to_e4m3(x: Tensor) -> Tensor:
    """The nearest E4M3 numbers of |x| <= 448."""
    return x.to(torch.float8_e4m3fn).float()


def _weighted(scores_BQK: Tensor, values_BKD: Tensor, block_k: int, most: int | None, mode: str) -> Tensor:
    """softmax(scores) values [B, Q, D']; only the last of the blocks of keys may be short."""
    top = _finite(scores_BQK.amax(2, keepdim=True))
    exponentials = (scores_BQK - top).exp()
    total = exponentials.sum(2, keepdim=True)
    if most is not None:
        exponentials = _rounded(scores_BQK, top, block_k, most, mode)
    return torch.where(total == 0, 0.0, exponentials @ values_BKD / total)


def _rounded(scores_BQK: Tensor, top_BQ1: Tensor, block_k: int, most: float, mode: str) -> Tensor:
    """exp(scores - top) [B, Q, K] as codes times scales."""
    num = scores_BQK.shape[2]
    tiles = F.pad(scores_BQK, (0, -num % block_k), value=-torch.inf).unflatten(2, (-1, block_k))
    top = top_BQ1[..., None]
    if mode in ("row", "fp8"):
        tile_top = _finite(tiles.amax(3, keepdim=True))
        most, nearest = (FP8_MOST, _to_e4m3) if mode == "fp8" else (most, torch.round)
        values = nearest((tiles - tile_top).exp() * most) * ((tile_top - top).exp() / most)
    elif mode == "tile":
        values = (tiles - top).exp()
        scale = values.amax((1, 3), keepdim=True) / most
        scale = torch.where(scale <= 1e-30, 1.0, scale)
        values = (values / scale).round_() * scale
    else:
        values = ((tiles - top).exp() * most).round_() / most
    return values.flatten(2)[..., :num]


def _finite(top: Tensor) -> Tensor:
    """Largest scores; 0 where no key is seen, so that nothing is taken from minus infinity."""
    return torch.where(top == -torch.inf, 0.0, top)


def _through_torch(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth) -> Tensor:
    """Keys and values of live blocks gathered, then torch's attention; integers as the reference has them."""
    if (qk_bits, pv_bits) != (16, 16):
        return block_attention_reference(q, k, v, order, live, mask, block_q, block_k, scale, qk_bits, pv_bits, pv_mode, smooth)
    if live is None:  # an order changes nothing
        return through_torch(q, k, v, mask, scale)
    out = _output(q, v)
    for h, rows, row_blocks in _heads(order, live, q, block_q, block_k):
        q_h, k_h, v_h = (t[:, h].index_select(1, rows)[:, None] for t in (q, k, v))
        for some, seen in row_blocks:
            part = None if mask is None else _part(mask, q, h, rows[some], rows[seen])[:, None]
            if part is not None and part.dtype != torch.bool:
                part = part.to(q.dtype)
            y = F.scaled_dot_product_attention(q_h[:, :, some], k_h[:, :, seen], v_h[:, :, seen], part, scale=scale)
            out[:, h, rows[some]] = y[:, 0]
    return out


def _output(q: Tensor, v: Tensor) -> Tensor:
    """Zeros, rows lie as [B, N, H, D'], ready to be merged."""
    return q.new_zeros((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _heads(
    order: Tensor | None, live: Tensor | None, q: Tensor, block_q: int, block_k: int
) -> Iterator[tuple[int, Tensor, Iterator[tuple[slice, Tensor | slice]]]]:
    """Each head, its rows in the new order, and its blocks of queries that see something, with the keys that they see."""
    num = q.shape[2]
    bits = None if live is None else unpack(live, -(-num // block_k))
    for h in range(q.shape[1]):
        rows = torch.arange(num, device=q.device) if order is None else order[h].long()
        yield h, rows, _row_blocks(None if bits is None else bits[h], num, block_q, block_k, q.device)


def _row_blocks(
    bits_RC: Tensor | None, num: int, block_q: int, block_k: int, device: torch.device
) -> Iterator[tuple[slice, Tensor | slice]]:
    within = torch.arange(block_k, device=device)
    for i in range(-(-num // block_q)):
        some = slice(i * block_q, min((i + 1) * block_q, num))
        if bits_RC is None or bits_RC[i].all():
            yield some, slice(None)
        elif bits_RC[i].any():
            seen = (bits_RC[i].nonzero() * block_k + within).flatten()
            yield some, seen[seen < num]


def _part(mask: Tensor, q: Tensor, h: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The mask [B, rows, columns] of a head; only these are ever expanded."""
    whole = mask.expand(q.shape[0], q.shape[1], q.shape[2], q.shape[2])[:, h]
    return whole.index_select(1, rows).index_select(2, columns)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()


# --- arguments ------------------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    what: str
    holds: bool
    allowed: str
    got: object
    remedy: str


def _check(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth) -> None:
    """Raises ValueError for what no kernel may see."""
    for rule in _rules(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth):
        if not rule.holds:
            raise ValueError(f"block_attention: {rule.what} must be {rule.allowed}, got {rule.got}. {rule.remedy}")


def _rules(q, k, v, order, live, mask, block_q, block_k, qk_bits, pv_bits, pv_mode, smooth) -> Iterator[_Rule]:
    shapes, dtypes = [tuple(t.shape) for t in (q, k, v)], [t.dtype for t in (q, k, v)]
    fit = q.ndim == 4 and v.ndim == 4 and q.shape == k.shape and q.shape[:3] == v.shape[:3]
    yield _Rule(
        "q, k and v", fit, "[B, H, N, D], the same and [B, H, N, D']", shapes, "Repeat the heads of keys that several share."
    )
    one = dtypes[0] in DTYPES and len(set(dtypes)) == 1
    yield _Rule("dtypes of q, k and v", one, f"one of {_names(DTYPES)}", _names(dtypes), "Convert them before.")
    heads, num = q.shape[1:3]
    for what, size in (("block_q", block_q), ("block_k", block_k)):
        yield _Rule(what, size > 0, "positive", size, "64 and 128 are fast.")
    rows, columns = -(-num // block_q), -(-num // block_k)
    if order is not None:
        fit = order.dtype == torch.int32 and order.shape == (heads, num)
        yield _Rule("order", fit, f"int32 {[heads, num]}", _described(order), "A row of token numbers for every head.")
    if live is not None:
        shape = (heads, rows, -(-columns // 8))
        fit = live.dtype == torch.uint8 and live.shape == shape
        remedy = f"A bit for each of the {columns} key blocks, padded to bytes, of each of the {rows} query blocks."
        yield _Rule("live", fit, f"uint8 {list(shape)}", _described(live), remedy)
    if mask is not None:
        wanted = (q.shape[0], heads, num, num)
        sizes = zip(reversed(mask.shape), reversed(wanted), strict=False)
        fit = mask.ndim <= 4 and all(a in (1, b) for a, b in sizes) and (mask.dtype == torch.bool or mask.is_floating_point())
        yield _Rule("mask", fit, f"bool or float, broadcastable to {list(wanted)}", _described(mask), "True means seen.")
    for what, bits in (("qk_bits", qk_bits), ("pv_bits", pv_bits)):
        yield _Rule(what, bits in BITS, f"one of {list(BITS)}", bits, "16 rounds nothing.")
    yield _Rule("pv_mode", pv_mode in PV_MODES, f"one of {list(PV_MODES)}", repr(pv_mode), "The most exact is row.")
    yield _Rule("pv_bits", pv_mode != "fp8" or pv_bits != 4, "8 with pv_mode fp8", pv_bits, "E4M3 numbers have 8 bits.")
    yield _Rule("smooth", smooth in SMOOTH, f"one of {list(SMOOTH)}", repr(smooth), "It costs little: k.")


def _check_order(order: Tensor | None) -> None:
    """Raises ValueError where a row does not have every token once. It looks at the numbers: not for devices that would wait."""
    if order is None or order.numel() == 0:
        return
    least, most = order.aminmax()
    met = torch.zeros(order.shape, dtype=torch.bool)
    if least < 0 or most >= order.shape[1] or not met.scatter_(1, order.long(), True).all():
        raise ValueError(
            f"block_attention: order must be a permutation of the {order.shape[1]} tokens in every row, got numbers from {least} "
            f"to {most}, some of them twice or beyond the tokens. Make it anew."
        )


def _names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _described(tensor: Tensor) -> str:
    return f"{_names([tensor.dtype])} {list(tensor.shape)}"
