"""Integer matmul with float scales: what linear and convolution share.

Codes and accumulators are exact integers, so every kernel must equal the reference bit for bit. Inputs are rounded per row with
scale = absmax / 127 (dynamic), or with a given scale and zero point (static). All float arithmetic is float32.
"""

import torch
from torch import Tensor


def quantize_rows(x_TK: Tensor, input_scale: Tensor | None, input_zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes [T, K] and scales [T, 1]; x ~ scale * (code - zero). A row with NaN or infinity gets such a scale."""
    top = x_TK.abs().amax(dim=1, keepdim=True).float()
    own = x_TK.dtype != torch.float32
    x = x_TK.float()  # in place from here on: fresh pages cost as much as the arithmetic
    if input_scale is None:
        scale = top / 127
        scale = torch.where(scale <= 1e-30, torch.ones_like(scale), scale)
        codes = x.div_(scale) if own else x / scale
        return codes.round_().clamp_(-127, 127).to(torch.int8), scale
    codes = (x.div_(input_scale) if own else x / input_scale).round_()
    codes = codes if input_zero is None else codes.add_(input_zero)
    return codes.clamp_(-128, 127).to(torch.int8), torch.where(top.isfinite(), input_scale.view(1, 1), top)


def matmul_reference(a_TK: Tensor, b_NK: Tensor) -> Tensor:
    """int32 [T, N] = a @ b^T, exactly: products of int8 summed in float64 stay below 2^53."""
    return (a_TK.double() @ b_NK.double().T).to(torch.int32)


def matmul_int_mm(a_TK: Tensor, b_NK: Tensor) -> Tensor:
    """The same through ``torch._int_mm`` (on x86: VNNI or AMX through oneDNN)."""
    return torch._int_mm(a_TK.contiguous(), b_NK.T)  # oneDNN refuses overlapping rows, which windows of one sample can be


def matmul_padded(a_TK: Tensor, b_NK: Tensor) -> Tensor:
    """The same on CUDA, whose ``torch._int_mm`` wants more than 16 rows and multiples of 8 elsewhere; zeros add nothing."""
    t, n = a_TK.shape[0], b_NK.shape[0]
    pad_t, pad_n, pad_k = max(0, 32 - t), -n % 8, -a_TK.shape[1] % 8
    a = torch.nn.functional.pad(a_TK, (0, pad_k, 0, pad_t)) if pad_k or pad_t else a_TK
    b = torch.nn.functional.pad(b_NK, (0, pad_k, 0, pad_n)) if pad_k or pad_n else b_NK
    return matmul_int_mm(a, b)[:t, :n]


def epilogue(
    acc_TN: Tensor, x_scale: Tensor, input_zero: Tensor | None, w_NK: Tensor, w_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """float32 [T, N] = x_scale * w_scale * (acc - zero * sum_k w) + bias."""
    if input_zero is not None:
        acc_TN = acc_TN - input_zero.to(torch.int32) * w_NK.sum(dim=1, dtype=torch.int32)
    y = acc_TN.float().mul_(x_scale).mul_(w_scale.view(1, -1))  # in place: fresh output pages cost half of the op's time
    return y if bias is None else y.add_(bias.float())
