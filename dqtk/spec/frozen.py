"""``@frozen``: a frozen dataclass, keyword-only, whose fields are checked against their types when it is made.

A choice that has lost its parentheses (``solver=GPTQ``) or names a type by a word is wrong where it is written, not after an hour
of calibration.
"""

import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def frozen(cls: type) -> Any:
    """Class decorator. The class's own ``__post_init__`` speaks first: it knows what values mean."""
    own: Callable[[Any], None] | None = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        try:
            if own is not None:
                own(self)
        except (TypeError, AttributeError):  # of comparing or asking something of a wrong type
            _check(self)
            raise
        _check(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


def _check(value: Any) -> None:
    kind: Any = type(value)
    for name, hint in _hints(kind).items():
        _check_field(f"{type(value).__name__}: {name}", getattr(value, name), hint)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _check_field(where: str, value: Any, hint: Any) -> None:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{where} must be a tuple, got {value!r}. A tuple of one is written (x,).")
        for part in value:
            _check_field(where, part, typing.get_args(hint)[0])
        return
    allowed = allowed_types(hint)
    if isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return
    names = " or ".join("None" if kind is types.NoneType else kind.__name__ for kind in allowed)
    remedy = f"Write {value.__name__}(...)." if isinstance(value, type) else "See dqtk/spec."
    raise ValueError(f"{where} must be {names}, got {value!r}. {remedy}")


def allowed_types(hint: Any) -> tuple[type, ...]:
    """The types that a value with this hint may have; an int will do for a float."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    return (*options, int) if float in options else options
