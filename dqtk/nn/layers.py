"""Runtime layers: ``nn.Linear`` and ``nn.ConvNd`` subclasses over packed codes.

Buffers, which are the checkpoint format: ``numerics/storage.py`` lists them with shapes and dtypes, which ``.to(dtype)`` never
changes. Beside them, in the compute dtype:

    bias         parameter [N], if the layer has one
    anchor       parameter [0], if it has none

``bias`` or ``anchor`` is the layer's one floating parameter: its dtype is the compute dtype. ``weight`` is a read-only view that
decodes when used (``lazy_weight.py``); no forward touches it.

forward:  x -> constant token apart -> parts -> smooth -> rotate -> z;   y = Q(z) Q(W)^T + (z down^T) up^T + bias
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels import activated, from_matrix, report_of
from dqtk.numerics.packing import empty
from dqtk.numerics.storage import BUFFERS, layer_layout, parts_of, stored_name
from dqtk.spec import STATIC, ByLevel, LayerSpec, SiteSpec, describe, kinds_of, level_edges

from .basis import Basis
from .books import books_for
from .constant_token import multiples, without
from .lazy_weight import LazyWeight, read_only
from .noise import following
from .products import ConvPart, ConvProduct, LinearPart, LinearProduct, Stored, joined

KEPT = "decoded once and kept in memory, then torch's own matmul"
STEPPED: dict[type, Any] = {}
"""Runtime class -> its subclass for a layer whose precision depends on the noise level (``stepped.py`` fills it)."""


class Quantized(Stored):
    """What quantized linears and convolutions share; mixed in before the torch class."""

    _part: Any
    """Class of a part of a split layer."""

    def _setup(self, spec: LayerSpec, n: int, k: int, channels: int, bias: bool, dtype: torch.dtype | None, device: Any) -> None:
        """Register empty storage of the right shapes. Called instead of the torch class's own ``__init__``."""
        nn.Module.__init__(self)  # type: ignore[arg-type]
        module: Any = self
        module.spec, module.n, module.k = spec, n, k
        module.shared = None
        module.basis = Basis.of(spec, channels)
        module.noise = None
        module.books = None
        dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else device
        module.taps = k // channels
        module.parts = tuple(self._part(module, part, module.taps) for part in parts_of(spec, channels))
        tensors = empty(layer_layout(spec, n, k, channels), device)
        module.stored = tuple(stored_name(name, index) for index in range(max(1, len(module.parts))) for name in BUFFERS)
        for name in module.stored:
            module.register_buffer(name, tensors.get(name))
        module.register_parameter(
            "bias", nn.Parameter(torch.empty(n, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        if not bias:
            module.anchor = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    def fill(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Put the solver's result in place: exactly the buffers that the spec has, in their shapes and dtypes."""
        module: Any = self
        self.release_kept()
        for name in module.stored:
            wanted, given = getattr(module, name), tensors.get(name)
            assert (wanted is None) == (given is None), name
            if given is not None:
                assert (wanted.shape, wanted.dtype) == (given.shape, given.dtype), name
                setattr(module, name, given)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def release_kept(self) -> None:
        """Let go of decoded weights (``keep_decoded``)."""
        module: Any = self
        for stored in (module, *module.parts):
            stored.kept = None

    @property
    def edges(self) -> tuple[float, ...]:
        """Between the intervals of the noise level that this layer tells apart; none for most layers."""
        return level_edges(self.spec)

    def follow(self, denoiser: nn.Module) -> None:
        """Know the noise level of this denoiser's calls from now on, and its shared books, if anything here depends on them."""
        module: Any = self
        self.read_books(denoiser)
        module.noise = following(denoiser, self.edges) if self.edges else None

    def read_books(self, model: nn.Module) -> None:
        """Refer to the shared books of this model, if the words are there."""
        module: Any = self
        vars(module)["books"] = books_for(model, self.spec, module.qweight.device)  # as an attribute it would be a submodule

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

    def stored_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        module: Any = self
        if not module.parts:
            return super().stored_matrix(dtype)
        return joined([part.stored_matrix(dtype) for part in module.parts], module.taps)

    def dequantize_matrix(self) -> Tensor:
        module: Any = self
        if not module.parts:
            return super().dequantize_matrix()
        return joined([part.dequantize_matrix() for part in module.parts], module.taps)

    def dequantize(self) -> Tensor:
        """The weight that this layer stands for, in its logical shape and the compute dtype."""
        return self.dequantize_matrix().to(self.compute_dtype).view(self.weight_shape)

    def plain(self) -> nn.Module:
        """An ordinary torch layer with the decoded weight."""
        module: Any = self
        base = base_class(type(self))
        new: Any = base.__new__(base)
        nn.Module.__init__(new)
        skip = ("spec", "n", "k", "shared", "basis", "noise", "books", "taps", "parts", "stored", "kept")
        new.__dict__.update({name: value for name, value in vars(module).items() if not name.startswith("_") and name not in skip})
        if isinstance(new, nn.modules.conv._ConvNd):
            padding: Any = new.padding
            new._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
        new.weight = nn.Parameter(self.dequantize().contiguous(), requires_grad=False)
        new.register_parameter("bias", module.bias)
        return new

    def kernel(self) -> str:
        """What runs, in words: ``linear_int8: integer matmul through torch._int_mm``."""
        module: Any = self
        said = f"{self.op}: {report_of(self.op, module.qweight.device.type)}"
        kept = [stored for stored in module.parts or (self,) if stored.kept_matrix(self.compute_dtype) is not None]
        if kept:
            said = f"{self.op}: {KEPT}" if len(kept) == max(1, len(module.parts)) else f"{said} ({len(kept)} parts: {KEPT})"
        return f"{said}, summed over {len(module.parts)} parts of the input" if module.parts else said

    def _apply(self, fn, recurse: bool = True):
        # Module.to(dtype) casts every floating buffer (and Module.type every buffer); codes and scales keep their exact values and
        # only change device.
        module: Any = self
        kept = {name: tensor for name in module.stored if (tensor := getattr(module, name)) is not None}
        nn.Module._apply(module, fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(module, name)
            if moved.dtype != tensor.dtype:
                setattr(module, name, tensor.to(moved.device))
        for stored in (module, *module.parts):
            kept = stored.kept
            if kept is not None and not (kept.matrix.dtype == self.compute_dtype and kept.is_that_of(stored)):
                stored.kept = None
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.release_kept()
        nn.Module._load_from_state_dict(self, *args)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        module: Any = self
        return f"{module.k}, {module.n}, bias={module.bias is not None}, {describe(self.spec)}"

    def reset_parameters(self) -> None:
        """Nothing: codes come from a solver or a checkpoint, never from an initializer."""


class QuantLinear(Quantized, LinearProduct, nn.Linear):
    """``y = Q(x) Q(W)^T + b``. Buffers: module docstring."""

    _part = LinearPart

    def __init__(self, in_features: int, out_features: int, bias: bool, spec: LayerSpec, dtype=None, device=None):
        self._setup(spec, out_features, in_features, in_features, bias, dtype, device)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, layer: nn.Linear, spec: SiteSpec, dtype=None, device=None) -> "QuantLinear":
        """Empty storage for the same layer."""
        kind: Any = STEPPED.get(cls, cls) if isinstance(spec, ByLevel) else cls
        new = kind(
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
        trains = torch.is_grad_enabled() and (input.requires_grad or (module.bias is not None and module.bias.requires_grad))
        if self.op == "linear_int8" and self.rounds_plainly and not trains:  # all in one pass
            y = None if module.shared is None or activation != "none" else module.shared.output(self, input)
            return self.product(input, module.smooth, activation, active_from) if y is None else y
        y = self._whole(input) if module.token is None else self._with_token(input)
        return activated(y, activation, active_from)

    @property
    def rounds_plainly(self) -> bool:
        """Whether the input is at most smoothed before it is rounded, and nothing is added behind the product."""
        module: Any = self
        return module.signs is None and module.down is None and module.token is None and len(module.parts) == 0

    def _whole(self, x: Tensor, alone: bool = False) -> Tensor:
        module: Any = self
        if not module.parts:
            return self.linear(x, alone)
        outputs = [part.linear(part.of(x, -1), alone) for part in module.parts]
        return sum(outputs[1:], outputs[0])

    def _with_token(self, x: Tensor) -> Tensor:
        """[..., T, N] of [..., T, K]. The first row never meets the calibrated range, which its kind was not calibrated for: it is
        rounded by itself, whatever it is."""
        module: Any = self
        times = multiples(x, module.token)
        z = without(x, module.token, times)
        if x.ndim > 2 and self.spec.input is not None and isinstance(self.spec.input.granularity, STATIC):
            y = torch.cat([self._whole(z[..., :1, :], alone=True), self._whole(z[..., 1:, :])], dim=-2)
        else:
            y = self._whole(z)
        return (y + times * module.token_output.float()).to(x.dtype)


class _QuantConv(Quantized, ConvProduct):
    """Forward and construction of the three convolution classes. ``like`` makes one.

    Called with a convolution's arguments, the class makes an ordinary convolution: PEFT builds adapters from ``type(layer)``.
    """

    _part = ConvPart

    def __new__(cls, *args, **kwargs) -> Any:
        return base_class(cls)(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @classmethod
    def like(cls, layer, spec: SiteSpec, dtype=None, device=None):
        """Empty storage for the same layer. Raises ``ValueError`` for what convolutions do not have: a low-rank branch."""
        branch = next((part.low_rank for part in kinds_of(spec) if part.low_rank is not None), None)
        if branch is not None:
            raise ValueError(f"{cls.__name__}: low_rank must be None for convolutions, got {branch}. Leave it out.")
        kind: Any = STEPPED.get(cls, cls) if isinstance(spec, ByLevel) else cls
        new: Any = kind.__new__(kind)
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
        if module.parts:
            outputs = [part.convolved(part.of(x, 1)) for part in module.parts]
            y = sum(outputs[1:], outputs[0])
        else:
            y = self.convolved(x)
        return y if input.ndim > dims + 1 else y[0]


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
