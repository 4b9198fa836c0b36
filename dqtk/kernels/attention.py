"""dqtk:: op of attention: dense, with or without a mask; what ``F.scaled_dot_product_attention`` computes.

Why one of our own: after integer linear layers, attention is 40 % of a step on a CPU, and torch's reaches a third of what a
bfloat16 matmul does there. On other devices and without native kernels it is torch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk import native


@torch.library.custom_op("dqtk::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) v.

    Args:
        q: float [B, H, Q, D].
        k, v: [B, G, K, D] and [B, G, K, D'], same dtype; H is a multiple of G.
        mask: bool (True: the key is seen) or float (added), broadcastable to [B, H, Q, K], or None.
        scale: of the scores.
    Returns:
        [B, H, Q, D'] in the dtype of ``q``; 0 where a query sees no key. Rows lie as [B, Q, H, D'].
    """
    return through_torch(q, k, v, mask, scale)


def through_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The op on any device."""
    if mask is not None:
        mask = torch.atleast_2d(mask if mask.dtype == torch.bool else mask.to(q.dtype))
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@attention.register_kernel("cpu")
def _(q, k, v, mask, scale):
    library = native.load()
    if library is None or q.dtype not in native.TYPES or 0 in (*q.shape, *k.shape, *v.shape):
        return through_torch(q, k, v, mask, scale)
    return native.attention(library, q, k, v, None if mask is None else added(mask, q, k), scale)


def added(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """float32, to be added to the scores, expanded without copies."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return mask.float().expand(*q.shape[:3], k.shape[2])


@attention.register_fake
def _(q, k, v, mask, scale):
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    q, k, v, mask = ctx.saved_tensors
    with torch.enable_grad():
        leaves = q, k, v = [t.detach().requires_grad_() for t in (q, k, v)]
        found = torch.autograd.grad(through_torch(q, k, v, mask, ctx.scale), leaves, grad)
    return *found, None, None


attention.register_autograd(_backward, setup_context=_save)
