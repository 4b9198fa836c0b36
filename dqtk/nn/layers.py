"""Runtime layers: ``nn.Linear`` and ``nn.ConvNd`` subclasses over packed codes.

Buffers, which are the checkpoint format (N output features, K = C_in * taps, channel innermost; G groups):

    qweight      int8 [N, K] | float8_e4m3fn [N, K] | uint8 [N, packed_width(bits, K)]   codes, see numerics/packing.py
    scale        float32 [N, G] | [N, 1] | [1, 1]                                        never cast by .to(dtype)
    group_scale  uint8 [N, G]          two-level granularity only
    zero         uint8 as scale        asymmetric weights only
    input_scale  float32 [1]           static inputs only
    input_zero   int32 [1]             static integer inputs only; x ~ input_scale * (code - input_zero)
    bias         parameter [N] in the compute dtype, if the layer has one
    anchor       parameter [0] in the compute dtype, if it has none

``bias`` or ``anchor`` is the layer's one floating parameter: its dtype is the compute dtype. ``weight`` is a read-only view that
decodes when used (``lazy_weight.py``); no forward touches it.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtk.kernels import conv_int8, from_matrix, linear_fp8, linear_int8, report_of
from dqtk.numerics.packing import Packed, dequantize, empty_packed, storage_bits
from dqtk.spec import Float, Int, LayerSpec, describe

from .lazy_weight import LazyWeight, read_only

BUFFERS = ("qweight", "scale", "group_scale", "zero", "input_scale", "input_zero")  # their dtypes never change


class Quantized:
    """What quantized linears and convolutions share; mixed in before the torch class."""

    spec: LayerSpec

    def _setup(self, spec: LayerSpec, n: int, k: int, bias: bool, dtype: torch.dtype | None, device: Any) -> None:
        """Register empty storage of the right shapes. Called instead of the torch class's own ``__init__``."""
        nn.Module.__init__(self)  # type: ignore[arg-type]
        module: Any = self
        module.spec, module.n, module.k = spec, n, k
        dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else device
        packed = empty_packed(spec.weight, n, k, device)
        for name in BUFFERS[:4]:
            module.register_buffer(name, getattr(packed, name))
        static = spec.needs_stats
        integer = static and isinstance(spec.input.format, Int)  # type: ignore[union-attr]
        module.register_buffer("input_scale", torch.empty(1, dtype=torch.float32, device=device) if static else None)
        module.register_buffer("input_zero", torch.empty(1, dtype=torch.int32, device=device) if integer else None)
        module.register_parameter(
            "bias", nn.Parameter(torch.empty(n, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        if not bias:
            module.anchor = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def fill(self, packed: Packed, bias: Tensor | None, input_scale: Tensor | None, input_zero: Tensor | None) -> None:
        """Put the solver's result in place."""
        module: Any = self
        for name in BUFFERS[:4]:
            setattr(module, name, getattr(packed, name))
        if module.input_scale is not None:
            assert input_scale is not None
            module.input_scale = input_scale.float().view(1)
        if module.input_zero is not None:
            assert input_zero is not None
            module.input_zero = input_zero.to(torch.int32).view(1)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of activations: that of the bias or anchor."""
        module: Any = self
        return (module.anchor if module.bias is None else module.bias).dtype

    @property
    def weight(self) -> Tensor:
        """Read-only logical weight in the compute dtype; decodes when used."""
        if torch.compiler.is_compiling():
            return self.dequantize()  # traceable; where only metadata is asked for, the compiler drops the computation
        module: Any = self
        return LazyWeight(self, self.weight_shape, self.compute_dtype, module.qweight.device)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise read_only(self, "assignment")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's, except that nothing may take the place of ``weight``."""
        if name == "weight":
            raise read_only(self, "assignment")
        module: Any = self
        nn.Module.register_parameter(module, name, param)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        module: Any = self
        return (module.n, module.k)

    def dequantize_matrix(self) -> Tensor:
        """The stored weight as float32 [N, K]."""
        module: Any = self
        packed = Packed(qweight=module.qweight, scale=module.scale, group_scale=module.group_scale, zero=module.zero)
        return dequantize(packed, self.spec.weight, module.k)

    def dequantize(self) -> Tensor:
        """The stored weight in its logical shape and the compute dtype."""
        return self.dequantize_matrix().to(self.compute_dtype).view(self.weight_shape)

    def plain(self) -> nn.Module:
        """An ordinary torch layer with the decoded weight."""
        module: Any = self
        base = base_class(type(self))
        new: Any = base.__new__(base)
        nn.Module.__init__(new)
        skip = ("spec", "n", "k")
        new.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_") and name not in skip})
        if isinstance(new, nn.modules.conv._ConvNd):
            padding: Any = new.padding
            new._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
        new.weight = nn.Parameter(self.dequantize().contiguous(), requires_grad=False)
        new.register_parameter("bias", module.bias)
        return new

    @property
    def op(self) -> str:
        """The dqtk:: op that ``forward`` calls, or "weight_only"."""
        if self.spec.input is None:
            return "weight_only"
        return "linear_fp8" if isinstance(self.spec.input.format, Float) else "linear_int8"

    def kernel(self) -> str:
        """What runs, in words: ``linear_int8: integer matmul through torch._int_mm``."""
        module: Any = self
        return f"{self.op}: {report_of(self.op, module.qweight.device.type)}"

    @property
    def stored_width(self) -> int:
        """Bits per stored code."""
        return storage_bits(self.spec.weight.bits)

    def _apply(self, fn, recurse: bool = True):
        # Module.to(dtype) casts every floating buffer (and Module.type every buffer); codes and scales keep their exact values and
        # only change device.
        module: Any = self
        kept = {name: tensor for name in BUFFERS if (tensor := getattr(module, name)) is not None}
        nn.Module._apply(module, fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(module, name)
            if moved.dtype != tensor.dtype:
                setattr(module, name, tensor.to(moved.device))
        return self

    def extra_repr(self) -> str:
        module: Any = self
        return f"{module.k}, {module.n}, bias={module.bias is not None}, {describe(self.spec)}"

    def reset_parameters(self) -> None:
        """Nothing: codes come from a solver or a checkpoint, never from an initializer."""


class QuantLinear(Quantized, nn.Linear):
    """``y = Q(x) Q(W)^T + b``. Buffers: module docstring."""

    def __init__(self, in_features: int, out_features: int, bias: bool, spec: LayerSpec, dtype=None, device=None):
        self._setup(spec, out_features, in_features, bias, dtype, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, layer: nn.Linear, spec: LayerSpec, dtype=None, device=None) -> "QuantLinear":
        """Empty storage for the same layer."""
        new = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            spec,
            dtype or layer.weight.dtype,
            device or layer.weight.device,
        )
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, torch's name
        if self.spec.input is None:
            return F.linear(
                input, self.dequantize_matrix().to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)
            )
        if isinstance(self.spec.input.format, Float):
            return linear_fp8(input, self.qweight, self.scale, self.bias, self.input_scale)
        return linear_int8(
            input, self.qweight, self.scale, self.group_scale, self.bias, self.input_scale, self.input_zero, self.stored_width
        )


class _QuantConv(Quantized):
    """Forward and construction of the three convolution classes. ``like`` makes one.

    Called with a convolution's arguments, the class makes an ordinary convolution: PEFT builds adapters from ``type(layer)``.
    """

    def __new__(cls, *args, **kwargs) -> Any:
        return base_class(cls)(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def like(cls, layer, spec: LayerSpec, dtype=None, device=None):
        """Empty storage for the same layer. Raises ``ValueError`` for a Float input: there is no FP8 convolution."""
        if spec.input is not None and isinstance(spec.input.format, Float):
            raise ValueError(
                f"{cls.__name__}: input must be Int or None, got {spec.input.format}. Use LayerSpec(weight=..., input=None)."
            )
        new: Any = cls.__new__(cls)
        k = layer.in_channels * math.prod(layer.kernel_size)
        new._setup(spec, layer.out_channels, k, layer.bias is not None, dtype or layer.weight.dtype, device or layer.weight.device)
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            setattr(new, name, getattr(layer, name))
        new.transposed, new.output_padding = False, (0,) * len(layer.kernel_size)
        return new.train(layer.training)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        module: Any = self
        return (module.n, module.in_channels, *module.kernel_size)

    def dequantize(self) -> Tensor:
        module: Any = self
        return from_matrix(self.dequantize_matrix().to(self.compute_dtype), module.kernel_size)

    @property
    def op(self) -> str:
        return "weight_only" if self.spec.input is None else "conv_int8"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, torch's name
        module: Any = self
        dims = len(module.kernel_size)
        if self.spec.input is None:
            weight = from_matrix(self.dequantize_matrix().to(input.dtype), module.kernel_size)
            bias = None if module.bias is None else module.bias.to(input.dtype)
            conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
            return conv(input, weight, bias, module.stride, module.padding, module.dilation)
        output = conv_int8(
            input if input.ndim > dims + 1 else input[None],
            module.qweight,
            module.scale,
            module.group_scale,
            module.bias,
            module.input_scale,
            module.input_zero,
            self.stored_width,
            list(module.kernel_size),
            list(module.stride),
            list(module.padding),
            list(module.dilation),
        )
        return output if input.ndim > dims + 1 else output[0]


class QuantConv1d(_QuantConv, nn.Conv1d):
    """1-d convolution over packed codes. Buffers: module docstring."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """2-d convolution over packed codes. Buffers: module docstring."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """3-d convolution over packed codes. Buffers: module docstring."""


CLASS_OF = {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d}
"""Runtime class of a layer, by the exact or base torch class."""


def runtime_class(layer: nn.Module) -> type | None:
    """The class that replaces ``layer``, or None where there is none."""
    return next((new for base, new in CLASS_OF.items() if isinstance(layer, base)), None)


def base_class(kind: type) -> Any:
    """The torch class that a runtime class stands for."""
    return next(base for base, quantized in CLASS_OF.items() if issubclass(kind, quantized))
