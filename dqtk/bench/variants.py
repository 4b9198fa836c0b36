"""Variants of a denoiser side by side: in another dtype, and quantized without any calibration.

Speed does not depend on the values of codes. So layers are rounded to nearest whatever the recipe would learn, smoothing multiplies
by one, and low-rank branches hold small random numbers: shapes, dtypes, transforms and kernels are those of the recipe, and nobody
has to calibrate in order to know how fast a model would be. Variants share every tensor that they leave alone.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.checkpoint import quantized_layers, replace_layer
from dqtk.costs import timed_as
from dqtk.kernels import to_matrix
from dqtk.methods.format_search import concrete
from dqtk.methods.rtn import rtn
from dqtk.methods.shortcut_split import columns_of
from dqtk.methods.solve import Solution
from dqtk.nn import books_of, forget_books
from dqtk.nn.attention import blocks_of, install_blocks, remove_blocks
from dqtk.numerics.storage import Part, layer_layout, parts_of, stored_name, tensor_name
from dqtk.plan import AttentionChoice, Choice
from dqtk.quantize import runtime_layer
from dqtk.spec import VECTORS, ByLevel, LayerSpec, VectorCodebook, describe, describe_attention, shared_forms

INPUT_SCALE = 8 / 255  # of static inputs: 8 standard deviations of a normal distribution in 8 bits


def shared_copy(module: nn.Module) -> nn.Module:
    """The same tree of modules over the same tensors: layers of the copy can be replaced, weights take no memory again."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, tensors)  # type: ignore[arg-type]


def is_quantized(module: nn.Module) -> bool:
    """Whether layers are packed or attentions in blocks."""
    return bool(quantized_layers(module) or blocks_of(module))


def check_attention(attention: Iterable[AttentionChoice]) -> None:
    """Raises ``ValueError`` for attention whose blocks calibration chooses: which are left out decides its speed."""
    found = next((wanted for wanted in attention if wanted.spec is not None and wanted.spec.needs_stats), None)
    if found is not None:
        raise ValueError(
            f"bench: attention of {found.site.id} must need no calibration, got {describe_attention(found.spec)}. Quantize and "
            "save the pipeline, then bench that."
        )


def check_one_spec(choices: Iterable[Choice]) -> None:
    """Raises ``ValueError`` for a step policy: one step runs the kernels of one interval, whose time is not the model's."""
    found = next((choice for choice in choices if isinstance(choice.spec, ByLevel)), None)
    if found is not None:
        raise ValueError(
            f"bench: {found.site.id} must have one spec for all noise levels, got a step policy: {describe(found.spec)}. Bench the "
            "recipes of its intervals on the unquantized model; a run takes each for its share."
        )


def quantized(module: nn.Module, choices: Iterable[Choice], attention: Sequence[AttentionChoice] = ()) -> nn.Module:
    """A copy with the chosen layers of this component quantized without data; everything else is shared."""
    made, choices = shared_copy(module), list(choices)
    check_attention(attention)
    check_one_spec(choices)
    for wanted in attention:
        if wanted.spec is not None:
            install_blocks(made, wanted.site.path, wanted.spec, "bench")
    for choice in choices:
        if choice.spec is not None:
            layer = module.get_submodule(choice.site.path)
            assert isinstance(choice.spec, LayerSpec)  # checked above
            replace_layer(made, choice.site.path, data_free(layer, choice.spec))
            for form in shared_forms(choice.spec):
                _share_book(made, choice.site.path, form)
    return made


def _share_book(made: nn.Module, path: str, form: VectorCodebook) -> None:
    """Let a layer that was made with a book of its own read that of its group."""
    layer: Any = made.get_submodule(path)
    book, layer.codebook = layer.codebook, None
    layer.spec = replace(layer.spec, weight=replace(layer.spec.weight, format=form))
    layer.follow(made)
    books: Any = books_of(made)
    books.put(form.group, book)


def unpacked(module: nn.Module) -> nn.Module:
    """A copy whose quantized layers are ordinary ones again, with decoded weights, and whose attention is dense."""
    made = shared_copy(module)
    remove_blocks(made)
    for path, layer in quantized_layers(made).items():
        replace_layer(made, path, layer.plain())
    forget_books(made)
    return made


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose floating tensors are of this dtype, converted one by one; those that are already are shared."""
    made = shared_copy(module)
    known: dict[int, Any] = {}  # tied weights stay tied
    for part in made.modules():
        for place in (part._parameters, part._buffers):
            for name, tensor in place.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    if id(tensor) not in known:
                        moved = tensor.detach().to(dtype)
                        known[id(tensor)] = (
                            nn.Parameter(moved, requires_grad=False) if place is part._parameters else moved,
                            tensor,
                        )
                    place[name] = known[id(tensor)][0]
    return made


@torch.no_grad()
def data_free(layer: Any, spec: LayerSpec) -> nn.Module:
    """The runtime layer of a spec for a linear or convolution, with stand-ins for what calibration would find.

    Its kernel, shapes and bytes are those of the real one; its outputs are those of rounding to nearest (of vectors: noise).
    """
    plain = timed_as(spec)
    assert plain is not None
    matrix = layer.weight.detach() if layer.weight.ndim == 2 else to_matrix(layer.weight.detach())
    plain = replace(plain, weight=concrete(matrix, plain.weight))
    (n, k), channels = matrix.shape, layer.weight.shape[1]
    tensors: dict[str, Tensor] = {}
    for part in parts_of(plain, channels) or (Part(0, plain, 0, channels),):
        if isinstance(plain.weight.format, VECTORS):
            continue  # learning books takes time and changes no speed
        columns = matrix[:, columns_of(part, k, channels)]
        tensors |= {stored_name(name, part.place): tensor for name, tensor in rtn(columns, plain.weight).tensors().items()}
    for name, (shape, dtype) in layer_layout(plain, n, k, channels).items():
        if name not in tensors:
            tensors[name] = _stand_in(name, shape, dtype).to(matrix.device)
    return runtime_layer(layer, Solution(spec=plain, tensors=tensors))


def _stand_in(stored: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    name = tensor_name(stored)
    if name == "input_scale":
        return torch.full(shape, INPUT_SCALE, dtype=dtype)
    if name in ("input_zero", "token", "token_output"):
        return torch.zeros(shape, dtype=dtype)
    if name == "smooth":
        return torch.ones(shape, dtype=dtype)
    if name == "scale":  # of vectors
        return torch.full(shape, 0.01, dtype=dtype)
    seeded = torch.Generator().manual_seed(0)
    if name in ("signs", "qweight"):
        return torch.randint(0, 256, shape, dtype=dtype, generator=seeded)
    if name == "codebook":
        return torch.randn(shape, generator=seeded).to(dtype)
    assert name in ("down", "up"), name
    return (torch.randn(shape, generator=seeded) * 0.01).to(dtype)
