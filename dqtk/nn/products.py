"""Products of an input with stored codes: of a whole layer, or of one part of a layer whose input is split.

A part reads its buffers, its bias and its noise level from the layer that it belongs to, so a split layer is one module with one
set of buffers (``numerics/storage.py``), and its output the sum of its parts' outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk.kernels import Decodes, conv_int8, decoding_of, from_matrix, linear_fp8, linear_int8, op_of
from dqtk.numerics.inputs import round_input
from dqtk.numerics.packing import Packed
from dqtk.numerics.storage import BUFFERS, Part, stored_name
from dqtk.ops import WEIGHT_ONLY
from dqtk.spec import STATIC, LayerSpec, VectorCodebook

from .basis import Basis

WEIGHT = tuple(Packed.__slots__)  # type: ignore[attr-defined]


class KeptWeight:
    """A decoded weight [N, K] that stays in memory (``kept.py``), and the tensors that it was decoded from, with their versions.

    A copy of a layer keeps none, nor does what was pickled.
    """

    __slots__ = ("matrix", "sources")

    def __init__(self, matrix: Tensor, sources: tuple[tuple[Tensor | None, int], ...]):
        self.matrix, self.sources = matrix, sources

    @staticmethod
    def of(stored: Any, matrix: Tensor) -> "KeptWeight":
        """What a layer or part decodes to now."""
        return KeptWeight(matrix, tuple((tensor, _version(tensor)) for tensor in stored.sources()))

    def is_that_of(self, stored: Any) -> bool:
        """Whether the codes are still those that it was decoded from, where they were."""
        return self.matrix.device == stored.qweight.device and all(
            now is tensor and _version(now) == version
            for now, (tensor, version) in zip(stored.sources(), self.sources, strict=True)
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return _nothing, ()


def group_of(spec: LayerSpec) -> str | None:
    """The group whose books the words are in; None where the layer has its own, or no words."""
    form = spec.weight.format
    return form.group if isinstance(form, VectorCodebook) else None


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was written to; tensors of inference mode do not count it."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _nothing() -> None:
    """What a pickled ``KeptWeight`` becomes."""


class Stored:
    """Buffers and what they decode to. ``spec``, ``basis``, ``n`` and ``k`` say what they are."""

    spec: LayerSpec
    kind: str
    """"linear" or "conv"."""
    learned: Callable[[], Tensor] | None = None
    """The stored weight while it learns (``refine/trained.py``), float32 [N, K]; no kernel computes with it."""
    learned_branch: Callable[[], tuple[Tensor, Tensor]] | None = None
    """The stored branch while it learns, down [R, K] and up [N, R]."""
    kept: KeptWeight | None = None
    """What the codes decode to, where ``keep_decoded`` asked for it."""

    def input_tables(self) -> tuple[Tensor | None, Tensor | None]:
        """``input_scale`` and ``input_zero`` [1] for the call in progress.

        Raises ``ValueError`` for a layer with a table that stands in no denoiser.
        """
        module: Any = self
        scale, zero = module.input_scale, module.input_zero
        if scale is None or len(scale) == 1:
            return scale, zero
        if module.noise is None:
            raise ValueError(
                f"{type(self).__name__}: the layer must follow a denoiser's calls, as its input has {len(scale)} scales, one per "
                "interval of the noise level; got none. Call layer.follow(denoiser), or load the whole model."
            )
        index = module.noise.index(scale.device)
        return scale.index_select(0, index), None if zero is None else zero.index_select(0, index)

    def packed(self) -> Packed:
        """The stored weight, with its books whoever holds them.

        Raises ``ValueError`` for a layer with shared books that stands in no model.
        """
        module: Any = self
        found = {name: getattr(module, name) for name in WEIGHT}
        if (group := group_of(self.spec)) is not None:
            if module.books is None:
                raise ValueError(
                    f"{type(self).__name__}: the layer must stand in a model, as its words are in the books that group {group!r} "
                    "shares; got none. Call layer.follow(denoiser), or load the whole model."
                )
            found["codebook"] = module.books(group).to(module.qweight.device)
        return Packed(**found)

    def sources(self) -> list[Tensor | None]:
        """The tensors that the stored weight is decoded from, themselves."""
        module: Any = self
        found = [getattr(module, name) for name in WEIGHT]
        group = group_of(self.spec)
        return found if group is None or module.books is None else [*found, module.books.stored(group)]

    def decoding(self) -> Decodes:
        """How the stored codes become numbers."""
        return decoding_of(self.packed(), self.spec.weight)

    def stored_matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The stored weight [N, K] in ``dtype``, in the basis of the transformed input and without the branch."""
        module: Any = self
        if self.learned is not None:
            return self.learned().to(dtype)
        return self.decoding().weight(module.qweight, module.k, dtype)

    def kept_matrix(self, dtype: torch.dtype) -> Tensor | None:
        """What is kept of the stored weight in ``dtype``, not to be written to; None: decode. Lets go of what no longer holds."""
        kept = self.kept
        if kept is None:
            return None
        if not torch.compiler.is_compiling() and not kept.is_that_of(self):
            self.kept = None
            return None
        return kept.matrix if kept.matrix.dtype == dtype and self.learned is None else None

    def branch(self) -> tuple[Tensor, Tensor]:
        """down [R, K] and up [N, R] of a layer that has them."""
        module: Any = self
        return (module.down, module.up) if self.learned_branch is None else self.learned_branch()

    def dequantize_matrix(self) -> Tensor:
        """The weight that this stands for, float32 [N, K]: stored codes and branch, in the basis of the input as it comes."""
        module: Any = self
        weight = self.stored_matrix()
        if module.down is not None:
            down, up = self.branch()
            weight = weight + up.float() @ down.float()
        return module.basis.undo(weight, module.smooth, module.signs)

    @property
    def op(self) -> str:
        """What ``forward`` runs; see ``ops.py``."""
        return op_of(self.spec, self.kind) if self.learned is None else "emulated"

    @property
    def stored_width(self) -> int:
        """Bits per stored code."""
        return self.spec.weight.bits


class LinearProduct(Stored):
    """x [..., K] -> [..., N]."""

    kind = "linear"

    def linear(self, x: Tensor, alone: bool = False) -> Tensor:
        """Transforms, rounding, product, branch and bias. ``alone``: see ``product``."""
        module: Any = self
        z = module.basis.apply(x, module.smooth, module.signs)
        y = self.product(z, alone=alone).to(x.dtype)
        if module.down is None:
            return y
        down, up = self.branch()
        return y + F.linear(F.linear(z, down.to(z.dtype)), up.to(z.dtype))

    def product(
        self, z: Tensor, smooth: Tensor | None = None, activation: str = "none", active_from: int = 0, alone: bool = False
    ) -> Tensor:
        """Q(z) Q(W)^T + bias by the layer's op; ``smooth`` and ``activation`` are left to integer kernels.

        alone: each row of a static input by its own range and not by the calibrated one; where no kernel can, it is not rounded.
        """
        module: Any = self
        bias, op = module.bias, self.op
        input_scale, input_zero = (None, None) if alone else self.input_tables()
        if op == "linear_int8":
            scales = (module.scale, module.group_scale, bias, input_scale, input_zero)
            return linear_int8(z, module.qweight, *scales, self.stored_width, smooth, activation, active_from)
        if op == "linear_fp8":
            return linear_fp8(z, module.qweight, module.scale, bias, input_scale)
        if op in WEIGHT_ONLY:
            kept = self.kept_matrix(z.dtype)
            if kept is not None:
                return F.linear(z, kept, None if bias is None else bias.to(z.dtype))
            return self.decoding().linear(z, module.qweight, bias)
        if self.spec.input is None:
            return F.linear(z, self.stored_matrix(z.dtype), None if bias is None else bias.to(z.dtype))
        # Rounded numbers and their products are float32, as in kernels, autocast or not.
        z = z.float()
        if not (alone and isinstance(self.spec.input.granularity, STATIC)):
            z = round_input(z, self.spec.input, input_scale, input_zero, z.ndim - 1)
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.stored_matrix(), None if bias is None else bias.float())


class ConvProduct(Stored):
    """x [B, C, *S] -> [B, N, *S_out]."""

    kind = "conv"

    def convolved(self, x: Tensor) -> Tensor:
        """Transforms, rounding, convolution and bias."""
        module: Any = self
        if module.basis.transforms:
            x = module.basis.apply(x.movedim(1, -1), module.smooth, module.signs).movedim(-1, 1)
        input_scale, input_zero = self.input_tables()
        kernel, where = list(module.kernel_size), (list(module.stride), list(module.padding), list(module.dilation))
        if self.op == "conv_int8":
            scales = (module.scale, module.group_scale, module.bias, input_scale, input_zero)
            return conv_int8(x, module.qweight, *scales, self.stored_width, kernel, *where)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        dtype = x.dtype if self.spec.input is None else torch.float32
        matrix = self.kept_matrix(dtype)
        weight = from_matrix(self.stored_matrix(dtype) if matrix is None else matrix, kernel)
        bias = None if module.bias is None else module.bias.to(dtype)
        if self.spec.input is None:
            return conv(x, weight, bias, *where)
        # A sample is a token: convolution inputs have no others.
        rounded = round_input(x.movedim(1, -1).float(), self.spec.input, input_scale, input_zero).movedim(-1, 1)
        with torch.autocast(x.device.type, enabled=False):
            return conv(rounded, weight, bias, *where).to(x.dtype)


# --- parts -----------------------------------------------------------------------------------------------------------


class _PartOf:
    """One part of a split layer. What it has no attribute for is its layer's: sizes of a kernel, and buffers by the part's name."""

    def __init__(self, layer: Any, part: Part, taps: int):
        self.layer, self.part, self.spec = layer, part, part.spec
        channels = part.stop - part.start
        self.k, self.basis = taps * channels, Basis.of(part.spec, channels)

    @property
    def bias(self) -> Tensor | None:
        """The layer's, of the first part."""
        return self.layer.bias if self.part.place == 0 else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("layer", "part"):  # of copying, before there is anything
            raise AttributeError(name)
        return getattr(self.layer, stored_name(name, self.part.place) if name in BUFFERS else name)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """The part's channels of an input."""
        return x.narrow(dim, self.part.start, self.part.stop - self.part.start)


class LinearPart(_PartOf, LinearProduct):
    """A part of a linear."""


class ConvPart(_PartOf, ConvProduct):
    """A part of a convolution."""


def joined(matrices: list[Tensor], taps: int) -> Tensor:
    """The matrix [N, K] of a layer from those of its parts, K = (taps, channels)."""
    return torch.cat([matrix.unflatten(1, (taps, -1)) for matrix in matrices], dim=2).flatten(1)
