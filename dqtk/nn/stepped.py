"""Runtime layers whose precision depends on the noise level (``spec.ByLevel``): one module and one set of buffers, several ways.

A way computes as a layer of its spec would, from the buffers of its weight; two that share a weight read the same. Which one serves
a call is decided by the denoiser's hook (``steps.py``). For everything that asks for the weight of such a layer, the finest stands.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dqtk.kernels import Decodes, activated, report_of
from dqtk.numerics.packing import empty
from dqtk.numerics.storage import BUFFERS, Part, layer_layout, stored_name
from dqtk.spec import level_edges

from .layers import STEPPED, QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear
from .noise import following
from .products import ConvPart, LinearPart
from .steps import choosing


class _WayOf:
    """Mixed in before a part of the whole input: how it differs from a part of a split layer."""

    layer: Any
    spec: Any

    @property
    def bias(self) -> Tensor | None:
        """The layer's, of every way."""
        return self.layer.bias

    def __getattr__(self, name: str) -> Any:
        if name in ("input_scale", "input_zero") and not self.spec.needs_ranges:
            return None  # they are another way's, with the same weight
        return super().__getattr__(name)  # type: ignore[misc]


class LinearWay(_WayOf, LinearPart):
    """A way of a linear."""


class ConvWay(_WayOf, ConvPart):
    """A way of a convolution."""


class Stepped:
    """What these layers share; mixed in before the runtime class of one spec."""

    spec: Any
    _way: Any = LinearWay

    def _setup(self, spec: Any, n: int, k: int, channels: int, bias: bool, dtype: torch.dtype | None, device: Any) -> None:
        finest = max(spec.kinds, key=lambda kind: kind.weight.bits)
        super()._setup(finest, n, k, channels, bias, dtype, device)  # type: ignore[misc]
        module: Any = self
        module.spec = spec
        device = torch.get_default_device() if device is None else device
        tensors = empty(layer_layout(spec, n, k, channels), device)
        module.stored = tuple(stored_name(name, index) for index in range(len(spec.weights)) for name in BUFFERS)
        for name in module.stored:
            module.register_buffer(name, tensors.get(name))
        place = {kind: index for index, weight in enumerate(spec.weights) for kind in weight}
        module.ways = {
            str(number): self._way(module, Part(place[kind], kind, 0, channels), module.taps)
            for number, kind in enumerate(spec.kinds)
        }
        module.finest = str(spec.kinds.index(finest))
        module.steps = None

    @property
    def edges(self) -> tuple[float, ...]:
        """Between the intervals of the noise level with a range of their own, in the first way that has any."""
        return next((edges for kind in self.spec.kinds if (edges := level_edges(kind))), ())

    def follow(self, denoiser: nn.Module) -> None:
        """Know the noise level of this denoiser's calls from now on, and its shared books."""
        module: Any = self
        self.read_books(denoiser)  # type: ignore[attr-defined]
        module.steps = choosing(denoiser, self.spec)
        for way in module.ways.values():
            edges = level_edges(way.spec)
            way.noise = following(denoiser, edges) if edges else None

    def way(self) -> Any:
        """How the call in progress is computed. Raises ``ValueError`` for a layer that stands in no denoiser."""
        module: Any = self
        if module.steps is None:
            raise ValueError(
                f"{type(self).__name__}: the layer must follow a denoiser's calls, as it has {len(module.ways)} specs, one per "
                "kind of noise level; got none. Call layer.follow(denoiser), or load the whole model."
            )
        return module.ways[module.steps.kind]

    @property
    def op(self) -> str:
        """What ``forward`` runs in the call in progress."""
        return self.way().op

    @property
    def _finest(self) -> Any:
        module: Any = self
        return module.ways[module.finest]

    @property
    def stored_width(self) -> int:
        """Bits per stored code, of the finest weight."""
        return self._finest.stored_width

    def decoding(self) -> Decodes:
        """Of the finest weight."""
        return self._finest.decoding()

    def stored_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Of the finest weight."""
        return self._finest.stored_matrix(dtype)

    def dequantize_matrix(self) -> Tensor:
        """Of the finest weight."""
        return self._finest.dequantize_matrix()

    def plain(self) -> nn.Module:
        """An ordinary torch layer with the finest weight, decoded."""
        new: Any = super().plain()  # type: ignore[misc]
        for name in ("ways", "finest", "steps"):
            del new.__dict__[name]
        return new

    def kernel(self) -> str:
        """What runs, in words, of every way."""
        module: Any = self
        device = module.qweight.device.type
        return "; ".join(dict.fromkeys(f"{way.op}: {report_of(way.op, device)}" for way in module.ways.values()))


class SteppedLinear(Stepped, QuantLinear):
    """A linear whose precision depends on the noise level. Buffers: ``numerics/storage.py``."""

    def forward(self, input: Tensor, activation: str = "none", active_from: int = 0) -> Tensor:  # noqa: A002, torch's name
        """As ``QuantLinear.forward``."""
        way, bias = self.way(), self.bias
        trains = torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))
        if way.op == "linear_int8" and way.signs is None and way.down is None and not trains:
            return way.product(input, way.smooth, activation, active_from)  # all in one pass
        return activated(way.linear(input), activation, active_from)


class _SteppedConv(Stepped):
    _way = ConvWay

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002, torch's name
        """As of a convolution of one spec."""
        module: Any = self
        dims = len(module.kernel_size)
        y = self.way().convolved(input if input.ndim > dims + 1 else input[None])
        return y if input.ndim > dims + 1 else y[0]


class SteppedConv1d(_SteppedConv, QuantConv1d):
    """1-d convolution whose precision depends on the noise level."""


class SteppedConv2d(_SteppedConv, QuantConv2d):
    """2-d convolution whose precision depends on the noise level."""


class SteppedConv3d(_SteppedConv, QuantConv3d):
    """3-d convolution whose precision depends on the noise level."""


STEPPED.update({QuantLinear: SteppedLinear, QuantConv1d: SteppedConv1d, QuantConv2d: SteppedConv2d, QuantConv3d: SteppedConv3d})
