"""Tensors in, tensors out: the native functions with the arguments of the dqtk:: ops. Structures mirror those of the sources."""

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .decoder import TYPES, Decoder

ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2}
_Int, _Wide, _Pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Input(ctypes.Structure):
    """``stride``: elements from row to row, or sample to sample. ``smooth`` [K], ``scale`` and ``zero`` [1], or null."""

    _fields_ = (
        ("x", _Pointer),
        ("stride", _Wide),
        ("type", _Int),
        ("threads", _Int),
        ("smooth", _Pointer),
        ("scale", _Pointer),
        ("zero", _Pointer),
    )


class _Weight(ctypes.Structure):
    """``stride``: bytes per row. ``bits`` 0: int8 as it is."""

    _fields_ = (
        ("codes", _Pointer),
        ("stride", _Wide),
        ("n", _Wide),
        ("k", _Wide),
        ("bits", _Int),
        ("is_signed", _Int),
        ("group_scale", _Pointer),
        ("group_size", _Wide),
    )


class _Output(ctypes.Structure):
    """``scale_step``: 1 for a scale per output, 0 for one scale. ``activation`` of the outputs from ``active_from`` on."""

    _fields_ = (
        ("y", _Pointer),
        ("scale", _Pointer),
        ("scale_step", _Wide),
        ("bias", _Pointer),
        ("active_from", _Wide),
        ("activation", _Int),
    )


class _Decoding(ctypes.Structure):
    """Steps and zeros of group g of row n stand at ``n * row_step + g * group_step``."""

    _fields_ = (
        ("weight", _Weight),
        ("steps", _Pointer),
        ("zeros", _Pointer),
        ("row_step", _Wide),
        ("group_step", _Wide),
        ("levels", _Pointer),
        ("selector", _Pointer),
        ("selector_stride", _Wide),
        ("selector_bits", _Int),
        ("threads", _Int),
    )


class _Window(ctypes.Structure):
    """Sizes of a convolution, leading dimensions of size 1 in front."""

    _fields_ = (
        ("batch", _Wide),
        ("channels", _Wide),
        *((name, _Wide * 3) for name in ("size", "kernel", "stride", "padding", "dilation", "out")),
        ("channels_last", _Int),
    )


class _Tensor4(ctypes.Structure):
    """Strides of batch, head and row, in elements."""

    _fields_ = (("data", _Pointer), ("batch", _Wide), ("head", _Wide), ("row", _Wide))


class _Attention(ctypes.Structure):
    """``mask``: float32, added to the scaled scores, or null; strides may be 0. ``order``, ``live``: those of block_attention."""

    _fields_ = (
        *((name, _Tensor4) for name in ("q", "k", "v", "out")),
        ("mask", _Pointer),
        *((f"mask_{name}", _Wide) for name in ("batch", "head", "row", "key")),
        *((name, _Wide) for name in ("batch", "heads", "key_heads", "queries", "keys", "channels", "value_channels")),
        ("order", _Pointer),
        ("live", _Pointer),
        ("block_q", _Wide),
        ("block_k", _Wide),
        ("scale", ctypes.c_float),
        ("type", _Int),
        ("threads", _Int),
    )


class _Rounded(ctypes.Structure):
    """Bits 16: as they are. ``smooth_keys``, ``smooth_queries``: 1 to take means away before they are rounded."""

    _fields_ = (("attention", _Attention), *((name, _Int) for name in ("qk_bits", "pv_bits", "smooth_keys", "smooth_queries")))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype).contiguous()


class IntegerLayer(NamedTuple):
    """What the dqtk:: ops of integer layers have in common, in their order; they say what each is."""

    qweight: Tensor
    scale: Tensor
    group_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    bits: int


class _Arguments:
    """What linear and convolution share. Keeps converted tensors alive during the call."""

    def __init__(
        self, x: Tensor, stride: int, layers: Sequence[IntegerLayer], k: int, ys: Sequence[Tensor], smooth=None, activation="none",
        active_from=0,
    ):  # fmt: skip
        first = layers[0]
        self.kept: list[Tensor | None] = [x, *ys]
        smooth, input_scale, zero = _dense(smooth), _dense(first.input_scale), _dense(first.input_zero, torch.int32)
        self.kept += [smooth, input_scale, zero]
        self.input = _Input(
            _address(x),
            stride,
            TYPES[x.dtype],
            torch.get_num_threads(),
            _address(smooth),
            _address(input_scale),
            None if input_scale is None else _address(zero),
        )
        self.weights = (_Weight * len(layers))(*[self._weight(layer, k) for layer in layers])
        ends = active_from, ACTIVATIONS[activation]
        self.outputs = (_Output * len(layers))(*[self._output(layer, y, ends) for layer, y in zip(layers, ys, strict=True)])

    def _weight(self, layer: IntegerLayer, k: int) -> _Weight:
        qweight, group_scale = layer.qweight.contiguous(), _dense(layer.group_scale, torch.uint8)
        self.kept += [qweight, group_scale]
        size = 0 if group_scale is None else k // group_scale.shape[1]
        bits = 0 if qweight.dtype == torch.int8 else layer.bits
        return _Weight(_address(qweight), qweight.stride(0), qweight.shape[0], k, bits, 1, _address(group_scale), size)

    def _output(self, layer: IntegerLayer, y: Tensor, ends: tuple[int, int]) -> _Output:
        scale, bias = _dense(layer.scale), _dense(layer.bias)
        self.kept += [scale, bias]
        return _Output(_address(y), _address(scale), int(layer.scale.numel() > 1), _address(bias), *ends)


def linear_int8(
    library: ctypes.CDLL,
    x_TK: Tensor,
    layers: Sequence[IntegerLayer],
    smooth: Tensor | None = None,
    activation: str = "none",
    active_from: int = 0,
) -> list[Tensor]:
    """For each layer [T, N] in the dtype of ``x_TK`` [T, K], which is one of ``TYPES`` and rounded once, as the first layer has it.

    ``smooth``: [K], multiplied with the input, which is rounded to its dtype. ``activation``: one of ``ACTIVATIONS``, of outputs
    from ``active_from`` on.
    """
    t, k = x_TK.shape
    x = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    ys = [torch.empty((t, layer.qweight.shape[0]), dtype=x.dtype) for layer in layers]
    a = _Arguments(x, x.stride(0), layers, k, ys, smooth, activation, active_from)
    library.dqtk_linear_int8(ctypes.byref(a.input), a.weights, a.outputs, _Wide(len(layers)), _Wide(t))
    return ys


def conv_int8(
    library: ctypes.CDLL,
    x: Tensor,
    layer: IntegerLayer,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Sequence[int],
) -> Tensor:
    """[B * prod(out), N] in the dtype of ``x`` [B, C, *S], which is one of ``TYPES``: a row per output position."""
    batch, channels = x.shape[:2]
    channels_last = x.movedim(1, -1).is_contiguous()
    x = x if channels_last else x.contiguous()
    y = torch.empty((batch * math.prod(out), layer.qweight.shape[0]), dtype=x.dtype)
    a = _Arguments(x, math.prod(x.shape[1:]), [layer], channels * math.prod(kernel), [y])
    sizes = [_three(x.shape[2:], 1), _three(kernel, 1), _three(stride, 1), _three(padding, 0), _three(dilation, 1), _three(out, 1)]
    window = _Window(batch, channels, *sizes, int(channels_last))
    library.dqtk_conv_int8(ctypes.byref(a.input), a.weights, a.outputs, ctypes.byref(window))
    return y


def _three(values: Sequence[int], fill: int) -> ctypes.Array:
    return (_Wide * 3)(*[fill] * (3 - len(values)), *values)


class _Blocks(NamedTuple):
    """Which blocks are seen, as block_attention has it; nothing: all tokens, as they lie."""

    order: Tensor | None = None
    live: Tensor | None = None
    block_q: int = 0
    block_k: int = 0


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, blocks: _Blocks, scale: float) -> tuple[_Attention, tuple]:
    """The structure of a call, and what must live as long; the last of it is the output, whose rows lie as [B, Q, H, D']."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    order, live = _dense(blocks.order, torch.int32), _dense(blocks.live, torch.uint8)
    out = torch.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype).transpose(1, 2)
    sizes = (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    tensors = [_Tensor4(_address(t), *t.stride()[:3]) for t in (q, k, v, out)]
    which = _address(order), _address(live), blocks.block_q, blocks.block_k
    call = _Attention(*tensors, _address(mask), *strides, *sizes, *which, scale, TYPES[q.dtype], torch.get_num_threads())
    return call, (q, k, v, mask, order, live, out)


def attention(library: ctypes.CDLL, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, H, Q, D'] = softmax(q k^T * scale + mask) v, whose rows lie as [B, Q, H, D'], ready to be merged.

    q [B, H, Q, D], k [B, G, K, D], v [B, G, K, D'] of one of ``TYPES``, H a multiple of G; mask float32 [B, H, Q, K], or expanded
    to it.
    """
    call, kept = _attention(q, k, v, mask, _Blocks(), scale)
    library.dqtk_attention(ctypes.byref(call))
    return kept[-1]


def block_attention(
    library: ctypes.CDLL, q, k, v, order, live, mask: Tensor | None, block_q, block_k, scale, qk_bits, pv_bits, smooth
) -> Tensor:
    """The op of that name, probabilities rounded by row; ``mask`` as for ``attention``. ``takes_blocks`` says what is served."""
    call, kept = _attention(q, k, v, mask, _Blocks(order, live, block_q, block_k), scale)
    if (qk_bits, pv_bits) == (16, 16) and _in_chunks(live is not None, block_k):
        library.dqtk_attention(ctypes.byref(call))
        return kept[-1]
    rounded = _Rounded(call, qk_bits, pv_bits, int(smooth != "none"), int(smooth == "qk"))
    library.dqtk_rounded_attention(ctypes.byref(rounded))
    return kept[-1]


def takes_blocks(sparse: bool, block_k: int, channels: int, qk_bits: int, pv_bits: int, pv_mode: str) -> bool:
    """Whether ``block_attention`` serves these: else sums of products may not be exact, or a block not fit."""
    if (qk_bits, pv_bits) == (16, 16) and _in_chunks(sparse, block_k):
        return True
    return block_k <= 256 and channels <= 1024 and (pv_bits == 16 or pv_mode == "row")


def _in_chunks(sparse: bool, block_k: int) -> bool:
    """Whether live blocks are whole chunks of keys, as attention without rounding takes them."""
    return not sparse or block_k % 64 == 0


def weight_decoder(
    library: ctypes.CDLL, qweight, steps, zero, group_scale, selector, levels, bits: int, signed: bool, k: int
) -> Decoder:
    """A weight [N, K] of a code per number. Arguments as the dqtk::decode_weight op has them."""
    n = qweight.shape[0]
    kept = qweight, steps, zero, group_scale, selector, levels = (
        qweight.contiguous(),
        _dense(steps),
        _dense(zero, torch.uint8),
        _dense(group_scale, torch.uint8),
        _dense(selector, torch.uint8),
        _dense(levels),
    )
    groups = (steps if group_scale is None else group_scale).shape[1]
    selector_bits = 0 if levels is None else (levels.shape[0] - 1).bit_length()
    raw = qweight.dtype != torch.uint8
    decoding = _Decoding(
        _Weight(_address(qweight), qweight.stride(0), n, k, 0 if raw else bits, int(signed), _address(group_scale), k // groups),
        _address(steps),
        _address(zero),
        steps.shape[1] if steps.shape[0] > 1 else 0,
        int(steps.shape[1] > 1),
        _address(levels),
        _address(selector),
        0 if selector is None else selector.stride(0),
        selector_bits,
        torch.get_num_threads(),
    )
    return Decoder(library=library, kind="weight", weight=decoding, n=n, k=k, kept=kept)
