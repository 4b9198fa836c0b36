"""Books of words that several layers of a model read: one module at its root holds them, layers hold a plain reference to it.

A buffer in every layer would be one tensor only until somebody moves, offloads, copies or saves the layers. A module of its own is
moved, copied and saved with the model, once; what a layer refers to is that module, never a tensor of it. Names in a checkpoint:
``dqtk_books.book_GROUP``, float16 [books, words, length].

At a root that is a list of its children (``nn.Sequential``) the module is one child more, the last: ``len`` counts it, ``[-1]`` and
iteration find it, and a call passes through it unchanged.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.numerics.packing import book_shape
from dqtk.spec import SiteSpec, VectorCodebook, shared_forms

NAME = "dqtk_books"


class Books(nn.Module):
    """The shared books of a model, by group. Their dtype is never changed, as that of codes and scales."""

    def make(self, form: VectorCodebook, device: torch.device | str) -> None:
        """Room for the books of a group, where there are none: what a checkpoint fills. Raises ``ValueError`` for another form
        under the same name."""
        shape = book_shape(form)
        if buffer_name(form.group) not in self._buffers:
            self.register_buffer(buffer_name(form.group), torch.empty(shape, dtype=torch.float16, device=device))
        elif tuple(self.stored(form.group).shape) != shape:
            raise ValueError(
                f"{NAME}: layers of group {form.group!r} must share books of {tuple(self.stored(form.group).shape)}, got {shape}. "
                "Give one of them another group."
            )

    def put(self, group: str, codebook: Tensor) -> None:
        """Put other books [books, words, length] in the place of those of a group."""
        place = self.stored(group)
        assert (codebook.shape, codebook.dtype) == (place.shape, place.dtype), group
        setattr(self, buffer_name(group), codebook.to(place.device))

    def groups(self) -> tuple[str, ...]:
        """Names of the groups."""
        return tuple(name.removeprefix(buffer_name("")) for name in self._buffers)

    def stored(self, group: str | None) -> Tensor:
        """The tensor that is stored; where an offloading hook has taken it away, an empty one."""
        return getattr(self, buffer_name(group))

    def forward(self, group: str | Tensor) -> Tensor:
        """float16 [books, words, length]. A call, so that offloading hooks bring the tensor first. A tensor is passed on: a root
        that calls all its children in turn (``nn.Sequential``) calls this one too."""
        return group if isinstance(group, Tensor) else self.stored(group)

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)  # Module.to(dtype) casts every floating buffer
        nn.Module._apply(self, fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def buffer_name(group: str | None) -> str:
    """Name of the tensor of a group's books in the module."""
    assert group is not None
    return f"book_{group}"


def books_of(model: nn.Module) -> Books | None:
    """The shared books of a model; None of most."""
    return model._modules.get(NAME)  # type: ignore[return-value]


def books_for(model: nn.Module, spec: SiteSpec, device: torch.device) -> Books | None:
    """The shared books that a layer of this spec in the model reads, with room for them; None where it has its own."""
    forms = shared_forms(spec)
    if not forms:
        return None
    if books_of(model) is None:
        model.add_module(NAME, Books())
    found: Any = books_of(model)
    for form in forms:
        found.make(form, device)
    return found


def place_books(model: nn.Module, books: Mapping[str, Tensor], device: torch.device) -> None:
    """Give a model books float16 [books, words, length], by group, before the layers that read them. Groups that it has stay."""
    found = books_of(model) or Books()
    for group, book in books.items():
        if group not in found.groups():
            found.register_buffer(buffer_name(group), book.to(device))
    if books and books_of(model) is None:
        model.add_module(NAME, found)  # at last: at no time is there a book without its words


def forget_books(model: nn.Module, but: Collection[str] = ()) -> None:
    """Drop what no layer reads any more: all groups ``but`` these."""
    found = books_of(model)
    for group in () if found is None else set(found.groups()) - set(but):
        del found._buffers[buffer_name(group)]  # type: ignore[union-attr]
    if found is not None and not found.groups():
        del model._modules[NAME]
