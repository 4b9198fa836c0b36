"""dqtk:: op of an installed SageAttention: dense attention whose queries and keys are rounded to INT8 by its own CUDA kernels.

An adapter, no copy: it is asked for in the spec (``spec.Sage``) and never chosen by itself. What it would drop without a word
(masks) or raise about from inside (devices, dtypes, channels) is refused here, and its first answer of every kind is compared with
torch's.
"""

import torch
from torch import Tensor

from dqtk.gpu.sage import PACKAGE, require_sage, sage_version

from .attention import through_torch
from .attention_check import Kernel, check_kernel

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
MOST_CHANNELS = 128
LIMIT = 0.2  # of the difference: INT8 queries and keys, and FP8 probabilities on some devices


@torch.library.custom_op("dqtk::sage_attention", mutates_args=())
def sage_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(q k^T * scale) v as SageAttention rounds it.

    Args:
        q, k, v: bfloat16 or float16 [B, H, N, D] on a CUDA device, at most 128 channels.
        scale: of the scores.
    Returns:
        [B, H, N, D].
    Raises:
        ValueError: it is not installed, does not take these, or answers something else than attention.
    """
    require_sage("attention")
    for what, fits, allowed, got in (
        ("device", q.device.type in DEVICES, " or ".join(DEVICES), q.device.type),
        ("dtype", q.dtype in DTYPES, "bfloat16 or float16", str(q.dtype).removeprefix("torch.")),
        ("channels of a head", q.shape[3] <= MOST_CHANNELS, f"at most {MOST_CHANNELS}", q.shape[3]),
        ("shapes", q.shape == k.shape == v.shape, "the same", [tuple(t.shape) for t in (q, k, v)]),
    ):
        if not fits:
            raise ValueError(f"attention: {what} must be {allowed} for {PACKAGE}, got {got}. Plan another attention for it.")
    check_kernel(_SAGE, _plain, q, k, v, None, None, None, 64, 64, scale, 16, 16, "row", "none")
    return _through_sage(q, k, v, scale)


@sage_attention.register_fake
def _(q, k, v, scale):
    return torch.empty_like(q)


def _through_sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from sageattention import sageattn  # one of the user's packages, and seconds

    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale).contiguous()


def _plain(q: Tensor, k: Tensor, v: Tensor, order, live, mask, block_q, block_k, scale: float, *settings) -> Tensor:
    return through_torch(q, k, v, None, scale)


_SAGE = Kernel(
    run=lambda q, k, v, order, live, mask, block_q, block_k, scale, *settings: _through_sage(q, k, v, scale),
    which=PACKAGE,
    name=lambda: f"{PACKAGE} {sage_version()}",
    remedy="Another version of it may be right, or plan another attention.",
    limit=LIMIT,
)
