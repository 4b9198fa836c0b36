"""``layer.weight`` of a quantized layer: a read-only tensor that knows its shape, dtype and device and decodes only when used.

Host models read ``weight.dtype`` on hot paths (T5's feed-forward, Wan's time embedder) and must not pay for a decode; libraries
that add to ``weight`` in place (LoRA merging) must not believe that it worked. Both follow from a wrapper without storage: metadata
is free, an operation decodes first, and an operation that would write raises, which the operators' own schemas tell. What they call
a view (``detach``, ``view``, ``t``, an index) is read-only too: a write through it would be lost.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_OUTSIDE_DISPATCH = {"numpy", "tolist", "__array__"}  # read storage directly


class LazyWeight(Tensor):
    """Stands for ``layer.dequantize()``. Never stored on a module."""

    _is_hf_initialized = True  # transformers' weight initialization must leave it alone
    layer: Any

    @staticmethod
    def __new__(cls, layer, shape, dtype, device, strides=None, decoded=None):
        return Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=device)

    def __init__(self, layer, shape, dtype, device, strides=None, decoded=None):
        self.layer, self._decoded = layer, decoded

    def decode(self) -> Tensor:
        """The tensor that this stands for."""
        return self.layer.dequantize() if self._decoded is None else self._decoded

    def __repr__(self, **kwargs) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, dtype={self.dtype}, of {type(self.layer).__name__})"

    def __deepcopy__(self, memo):
        return self.decode().clone()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if getattr(func, "__self__", None) is Tensor.data:
            if name == "__get__":
                return args[0]
            if isinstance(args[0], cls):
                raise read_only(args[0].layer, "data")
        if name == "__setitem__" and isinstance(args[0], cls):  # would write into a decoded view
            raise read_only(args[0].layer, name)
        if name in _OUTSIDE_DISPATCH:
            return func(args[0].decode(), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        viewed = None
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None:
                continue
            for value in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name)):
                if not isinstance(value, cls):
                    continue
                if argument.alias_info.is_write:
                    raise read_only(value.layer, func.name().partition("::")[2])
                viewed = value.layer

        def decode(value):
            return value.decode() if isinstance(value, cls) else value

        def read(value):
            if viewed is None or not isinstance(value, Tensor):
                return value
            return cls(viewed, value.shape, value.dtype, value.device, value.stride(), value)

        return tree_map(read, func(*tree_map(decode, args), **tree_map(decode, kwargs)))


def read_only(layer: Any, operation: str) -> RuntimeError:
    """The error for an attempt to change a decoded weight."""
    return RuntimeError(
        f"{type(layer).__name__}: weight is decoded from packed codes and cannot be changed in place ({operation}). "
        "Keep the adapter unmerged, or merge it into the unquantized model and quantize that."
    )
