"""``layer.weight`` of a quantized layer: a read-only tensor that knows its shape, dtype and device and decodes only when used.

Host models read ``weight.dtype`` on hot paths (T5's feed-forward, Wan's time embedder) and must not pay for a decode; libraries that
add to ``weight`` in place (LoRA merging) must not believe that it worked. Both follow from a wrapper without storage: metadata is
free, an operation decodes first, and writing raises.
"""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_WRITES = {"__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__"}


class LazyWeight(Tensor):
    """Stands for ``layer.dequantize()``. Never stored on a module."""

    _is_hf_initialized = True  # transformers' weight initialization must leave it alone

    @staticmethod
    def __new__(cls, layer, shape, dtype, device):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, layer, shape, dtype, device):
        self.layer = layer

    def __repr__(self, **kwargs) -> str:
        return f"LazyWeight({tuple(self.shape)}, dtype={self.dtype}, of {type(self.layer).__name__})"

    def __deepcopy__(self, memo):
        return self.layer.dequantize()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        if writes and name != "requires_grad_" and args and isinstance(args[0], cls):
            raise RuntimeError(
                f"{type(args[0].layer).__name__}: weight is decoded from packed codes and cannot be changed in place ({name}). "
                "Keep the adapter unmerged, or merge it into the unquantized model and quantize that."
            )
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.data:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def decode(value):
            return value.layer.dequantize() if isinstance(value, cls) else value

        return func(*tree_map(decode, args), **tree_map(decode, kwargs or {}))
