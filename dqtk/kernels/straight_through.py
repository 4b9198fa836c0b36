"""Gradients through rounded layers, so that adapters (LoRA) train on top of a quantized model.

Rounding has derivative zero almost everywhere. As usual it is passed over (the straight-through estimator, Bengio, Leonard and
Courville 2013, arXiv 1308.3432): the gradient is that of the layer with its decoded weight and an input that was not rounded.
Inputs beyond a static range are passed through too, unlike in quantization-aware training: here nothing learns to stay inside it.
"""

import torch
from torch import Tensor


def input_gradient(grad: Tensor, w_NK: Tensor, w_scale: Tensor) -> Tensor:
    """float32 [..., K] = grad [..., N] @ (w_scale * w_NK), codes in any dtype, scale [N, 1] or [1, 1]."""
    return (grad.float() * w_scale.view(-1)) @ w_NK.float()


def sum_to_bias(grad: Tensor, channel_dim: int) -> Tensor:
    """float32 [N]: the gradient summed over everything but its channels."""
    return grad.float().movedim(channel_dim, -1).reshape(-1, grad.shape[channel_dim]).sum(0)


def conv_input_gradient(grad: Tensor, weight: Tensor, input_shape, stride, padding, dilation) -> Tensor:
    """float32 [B, C, *S] of a convolution with float32 ``weight`` [N, C, *kernel] and ``grad`` [B, N, *S_out]."""
    like_input = grad.new_empty(1, dtype=torch.float32).expand(input_shape)  # only its shape is read
    none = [0] * len(stride)
    return torch.ops.aten.convolution_backward(
        grad.float(), like_input, weight, None, stride, padding, dilation, False, none, 1, [True, False, False]
    )[0]
