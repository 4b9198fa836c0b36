"""Runtime layers: ``nn.Linear`` and ``nn.ConvNd`` subclasses over packed codes.

Buffers, which are the checkpoint format: ``numerics/storage.py`` lists them with shapes and dtypes, which ``.to(dtype)`` never
changes. Beside them, in the compute dtype:

    bias         parameter [N], if the layer has one
    anchor       parameter [0], if it has none

``bias`` or ``anchor`` is the layer's one floating parameter: its dtype is the compute dtype. ``weight`` is a read-only view that
decodes when used (``lazy_weight.py``); no forward touches it. Where the noise level decides how a layer computes (``ByLevel``),
every different way is a ``Way``, and the denoiser's hook says which one serves the call in progress (``steps.py``).

forward:  x -> smooth -> rotate -> z;   y = Q(z) Q(W)^T + (z down^T) up^T + bias
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtk.kernels import (
    Decoding,
    activated,
    conv_int8,
    decode_weight,
    from_matrix,
    linear_decoded,
    linear_fp8,
    linear_int8,
    report_of,
)
from dqtk.numerics.inputs import round_input
from dqtk.numerics.packing import Packed, empty
from dqtk.numerics.storage import BUFFERS, layer_layout
from dqtk.spec import ByLevel, SiteSpec, describe, kinds_of, level_edges

from .basis import Basis
from .lazy_weight import LazyWeight, read_only
from .noise import following
from .steps import choosing
from .ways import Way, ways_of

WEIGHT = tuple(Packed.__slots__)  # type: ignore[attr-defined]


class Quantized:
    """What quantized linears and convolutions share; mixed in before the torch class."""

    spec: SiteSpec

    def _setup(self, spec: SiteSpec, n: int, k: int, channels: int, bias: bool, dtype: torch.dtype | None, device: Any) -> None:
        """Register empty storage of the right shapes. Called instead of the torch class's own ``__init__``."""
        nn.Module.__init__(self)  # type: ignore[arg-type]
        module: Any = self
        module.spec, module.n, module.k = spec, n, k
        module.ways = ways_of(spec, "linear" if isinstance(self, nn.Linear) else "conv", channels)
        module.finest = max(module.ways, key=lambda name: module.ways[name].spec.weight.bits)
        module.noise, module.steps = {}, None
        dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else device
        tensors = empty(layer_layout(spec, n, k, channels), device)
        for suffix in dict.fromkeys(way.suffix for way in module.ways.values()):
            for name in BUFFERS:
                module.register_buffer(name + suffix, tensors.get(name + suffix))
        module.register_parameter(
            "bias", nn.Parameter(torch.empty(n, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        if not bias:
            module.anchor = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def fill(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Put the solver's result in place: exactly the buffers that the spec has, in their shapes and dtypes."""
        module: Any = self
        for name, wanted in list(module._buffers.items()):
            given = tensors.get(name)
            assert (wanted is None) == (given is None), name
            if given is not None:
                assert (wanted.shape, wanted.dtype) == (given.shape, given.dtype), name
                setattr(module, name, given)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def edges(self) -> tuple[float, ...]:
        """Between the intervals of the noise level with different ranges of the input; none for most layers."""
        module: Any = self
        return next((edges for way in module.ways.values() if (edges := level_edges(way.spec))), ())

    def follow(self, denoiser: nn.Module) -> None:
        """Know the noise level of this denoiser's calls from now on, if anything here depends on it."""
        module: Any = self
        known = {way.suffix: edges for way in module.ways.values() if (edges := level_edges(way.spec))}
        module.noise = {suffix: following(denoiser, edges) for suffix, edges in known.items()}
        module.steps = choosing(denoiser, self.spec) if isinstance(self.spec, ByLevel) else None

    def way(self) -> Way:
        """How the call in progress is computed. Raises ``ValueError`` for a layer with several ways that stands in no denoiser."""
        module: Any = self
        if module.steps is not None:
            return module.ways[module.steps.kind]
        if len(module.ways) > 1:
            raise self._lost(f"{len(module.ways)} specs, one per kind of noise level")
        return module.ways["0"]

    def _lost(self, what: str) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: the layer must follow a denoiser's calls, as it has {what}; got none. "
            "Call layer.follow(denoiser), or load the whole model."
        )

    def part(self, name: str, way: Way) -> Tensor | None:
        """One of ``BUFFERS`` as this way reads it."""
        return getattr(self, name + way.suffix)

    def input_tables(self, way: Way | None = None) -> tuple[Tensor | None, Tensor | None]:
        """``input_scale`` and ``input_zero`` [1] for the call in progress.

        Raises ``ValueError`` for a layer with a table that stands in no denoiser.
        """
        way = way or self.way()
        if not way.static:
            return None, None
        module: Any = self
        scale, zero = self.part("input_scale", way), self.part("input_zero", way)
        if scale is None or len(scale) == 1:
            return scale, zero
        if way.suffix not in module.noise:
            raise self._lost(f"{len(scale)} scales of its input, one per interval of the noise level")
        index = module.noise[way.suffix].index(scale.device)
        return scale.index_select(0, index), None if zero is None else zero.index_select(0, index)

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

    @property
    def basis(self) -> Basis:
        """Of the finest weight."""
        module: Any = self
        return module.ways[module.finest].basis

    def decoding(self, way: Way | None = None) -> Decoding:
        """How the stored codes become numbers, as the ops take it; of the finest weight where there are several."""
        module: Any = self
        way = way or module.ways[module.finest]
        return Decoding.of(Packed(**{name: self.part(name, way) for name in WEIGHT}), way.spec.weight)  # type: ignore[arg-type]

    def stored_matrix(self, dtype: torch.dtype = torch.float32, way: Way | None = None) -> Tensor:
        """The stored weight [N, K] in ``dtype``, in the basis of the transformed input and without the branch."""
        module: Any = self
        way = way or module.ways[module.finest]
        return decode_weight(self.part("qweight", way), *self.decoding(way).arguments(), module.k, dtype)

    def dequantize_matrix(self) -> Tensor:
        """The weight that this layer stands for, float32 [N, K]: stored codes and branch, in the basis of the layer's own input.

        Where there are several weights for different noise levels, the finest.
        """
        module: Any = self
        way = module.ways[module.finest]
        weight, down, up = self.stored_matrix(way=way), self.part("down", way), self.part("up", way)
        if down is not None and up is not None:
            weight = weight + up.float() @ down.float()
        return way.basis.undo(weight, self.part("smooth", way), self.part("signs", way))

    def dequantize(self) -> Tensor:
        """The weight that this layer stands for, in its logical shape and the compute dtype."""
        return self.dequantize_matrix().to(self.compute_dtype).view(self.weight_shape)

    def plain(self) -> nn.Module:
        """An ordinary torch layer with the decoded weight."""
        module: Any = self
        base = base_class(type(self))
        new: Any = base.__new__(base)
        nn.Module.__init__(new)
        skip = ("spec", "n", "k", "ways", "finest", "noise", "steps")
        new.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_") and name not in skip})
        if isinstance(new, nn.modules.conv._ConvNd):
            padding: Any = new.padding
            new._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
        new.weight = nn.Parameter(self.dequantize().contiguous(), requires_grad=False)
        new.register_parameter("bias", module.bias)
        return new

    @property
    def op(self) -> str:
        """What ``forward`` runs; see ``ops.py``."""
        return self.way().op

    def kernel(self) -> str:
        """What runs, in words: ``linear_int8: integer matmul through torch._int_mm``."""
        module: Any = self
        ops = dict.fromkeys(way.op for way in module.ways.values())
        return "; ".join(f"{op}: {report_of(op, module.qweight.device.type)}" for op in ops)

    @property
    def stored_width(self) -> int:
        """Bits per stored code, of the finest weight."""
        module: Any = self
        return module.ways[module.finest].spec.weight.bits

    def _apply(self, fn, recurse: bool = True):
        # Module.to(dtype) casts every floating buffer (and Module.type every buffer); codes and scales keep their exact values and
        # only change device.
        module: Any = self
        kept = {name: tensor for name, tensor in module._buffers.items() if tensor is not None}
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

    def __init__(self, in_features: int, out_features: int, bias: bool, spec: SiteSpec, dtype=None, device=None):
        self._setup(spec, out_features, in_features, in_features, bias, dtype, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, layer: nn.Linear, spec: SiteSpec, dtype=None, device=None) -> "QuantLinear":
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

    def forward(self, input: Tensor, activation: str = "none", active_from: int = 0) -> Tensor:  # noqa: A002, torch's name
        """[..., N]. ``activation``, one of ``kernels.ACTIVATIONS``, is applied to the outputs from ``active_from`` on."""
        module: Any = self
        way = self.way()
        smooth, signs, down = (self.part(name, way) for name in ("smooth", "signs", "down"))
        trains = torch.is_grad_enabled() and (input.requires_grad or (module.bias is not None and module.bias.requires_grad))
        if way.op == "linear_int8" and signs is None and down is None and not trains:
            return self._product(input, way, smooth, activation, active_from)  # all in one pass
        z = way.basis.apply(input, smooth, signs)
        y = self._product(z, way).to(input.dtype)
        up = self.part("up", way)
        if down is not None and up is not None:
            y = y + F.linear(F.linear(z, down.to(z.dtype)), up.to(z.dtype))
        return activated(y, activation, active_from)

    def _product(self, z: Tensor, way: Way, smooth: Tensor | None = None, activation: str = "none", active_from: int = 0) -> Tensor:
        """Q(z) Q(W)^T + bias by the layer's op; what else may be asked for is left to integer kernels."""
        module: Any = self
        bias, qweight, scale = module.bias, self.part("qweight", way), self.part("scale", way)
        assert qweight is not None
        input_scale, input_zero = self.input_tables(way)
        if way.op == "linear_int8":
            scales = (scale, self.part("group_scale", way), bias, input_scale, input_zero)
            return linear_int8(z, qweight, *scales, way.spec.weight.bits, smooth, activation, active_from)
        if way.op == "linear_fp8":
            return linear_fp8(z, qweight, scale, bias, input_scale)
        if way.op == "weight_only":
            return linear_decoded(z, qweight, bias, *self.decoding(way).arguments())
        # Rounded numbers and their products are float32, as in kernels, autocast or not.
        assert way.spec.input is not None
        z = round_input(z.float(), way.spec.input, input_scale, input_zero, z.ndim - 1)
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.stored_matrix(way=way), None if bias is None else bias.float())


class _QuantConv(Quantized):
    """Forward and construction of the three convolution classes. ``like`` makes one.

    Called with a convolution's arguments, the class makes an ordinary convolution: PEFT builds adapters from ``type(layer)``.
    """

    def __new__(cls, *args, **kwargs) -> Any:
        return base_class(cls)(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def like(cls, layer, spec: SiteSpec, dtype=None, device=None):
        """Empty storage for the same layer. Raises ``ValueError`` for what convolutions do not have: a low-rank branch."""
        branch = next((part.low_rank for part in kinds_of(spec) if part.low_rank is not None), None)
        if branch is not None:
            raise ValueError(f"{cls.__name__}: low_rank must be None for convolutions, got {branch}. Leave it out.")
        new: Any = cls.__new__(cls)
        k = layer.in_channels * math.prod(layer.kernel_size)
        bias, dtype, device = layer.bias is not None, dtype or layer.weight.dtype, device or layer.weight.device
        new._setup(spec, layer.out_channels, k, layer.in_channels, bias, dtype, device)
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

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, torch's name
        module: Any = self
        dims = len(module.kernel_size)
        x = input if input.ndim > dims + 1 else input[None]
        way = self.way()
        if way.basis.transforms:
            x = way.basis.apply(x.movedim(1, -1), self.part("smooth", way), self.part("signs", way)).movedim(-1, 1)
        y = self._convolved(x, dims, way)
        return y if input.ndim > dims + 1 else y[0]

    def _convolved(self, x: Tensor, dims: int, way: Way) -> Tensor:
        module: Any = self
        input_scale, input_zero = self.input_tables(way)
        if way.op == "conv_int8":
            return conv_int8(
                x,
                self.part("qweight", way),
                self.part("scale", way),
                self.part("group_scale", way),
                module.bias,
                input_scale,
                input_zero,
                way.spec.weight.bits,
                list(module.kernel_size),
                list(module.stride),
                list(module.padding),
                list(module.dilation),
            )
        conv, where = (F.conv1d, F.conv2d, F.conv3d)[dims - 1], (module.stride, module.padding, module.dilation)
        given = way.spec.input
        dtype = x.dtype if given is None else torch.float32
        weight = from_matrix(self.stored_matrix(dtype, way), module.kernel_size)
        bias = None if module.bias is None else module.bias.to(dtype)
        if given is None:
            return conv(x, weight, bias, *where)
        # A sample is a token: convolution inputs have no others.
        rounded = round_input(x.movedim(1, -1).float(), given, input_scale, input_zero).movedim(-1, 1)
        with torch.autocast(x.device.type, enabled=False):
            return conv(rounded, weight, bias, *where).to(x.dtype)


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
