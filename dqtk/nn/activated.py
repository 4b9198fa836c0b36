"""Modules of host libraries that are a projection with an activation behind it: which class computes both in one kernel."""

from torch import nn

from .layers import Quantized, QuantLinear

FUSED: dict[type[nn.Module], type[nn.Module]] = {}
"""Host class -> its subclass for a quantized projection. Backends fill it; no checkpoint names either."""


def fit(holder: nn.Module, layer: nn.Module) -> None:
    """Give the module that a layer was put into the class that goes with it: the fused one, or the host's own again."""
    pairs = FUSED if isinstance(layer, Quantized) else {fused: plain for plain, fused in FUSED.items()}
    holder.__class__ = pairs.get(type(holder), type(holder))


def fuses(layer: nn.Module) -> bool:
    """Whether nobody looks in between: adapters wrap the layer, hooks read its output."""
    return isinstance(layer, QuantLinear) and not layer._forward_hooks and "forward" not in vars(layer)
