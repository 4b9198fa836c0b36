"""The first text token of a causal encoder, exact whatever the bits (MixDQ, Zhao et al. 2024, arXiv 2405.17873, section 4.1).

It is the same for every prompt and, in SDXL, some sixty times as large as the others. With c token + z for an input row (see
``nn/constant_token.py``) a layer computes c (W token) + Q(W) Q(z): W token is stored, so what is rounded, and what ranges are
calibrated on, is z. MixDQ replaces the first row's output instead, which is wrong where that row is another.
"""

import torch
from torch import Tensor


def token_tensors(weight: Tensor, token: Tensor) -> dict[str, Tensor]:
    """``token`` and ``token_output`` as a layer stores them, of the exact weight [N, K] and the token [K]."""
    stored = token.bfloat16()
    product = weight.double() @ stored.to(weight.device).double()
    return {"token": stored.to(weight.device).clone(), "token_output": product.to(torch.bfloat16)}
