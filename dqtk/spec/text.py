"""Specs as text: strict JSON, one canonical text per spec for hashes, suggestions for misspelt words."""

import dataclasses
import difflib
import json
import types
import typing
from typing import Any

from . import attention, by_level, formats, layer, refine
from .frozen import allowed_types

_TYPES = {
    kind.__name__: kind
    for module in (formats, layer, by_level, refine, attention)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type)
}


def to_json(value: Any) -> Any:
    """A spec as JSON-clean data: ``{"type": name, field: value, ...}``; fields at their default are written too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [to_json(part) for part in value] if isinstance(value, tuple) else value


def from_json(data: Any, where: str = "spec") -> Any:
    """Inverse of ``to_json``.

    Raises:
        ValueError: naming ``where``: not an object, an unknown type or field, a value of a wrong type, an impossible combination.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: value must be an object with a type, got {data!r}. See dqtk/spec.")
    kind = _lookup(data.get("type"), _TYPES, where, "type")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in data.items():
        if key == "type":
            continue
        _lookup(key, fields, f"{where}: {kind.__name__}", "field")
        arguments[key] = _value(value, hints[key], f"{where}.{key}")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in arguments]
    if missing:
        raise ValueError(f"{where}: {kind.__name__} must have {', '.join(missing)}, got {sorted(arguments)}. Add the field.")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as a field of this type: specs, numbers, or lists of them."""
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where}: value must be a list, got {value!r}. See dqtk/spec.")
        inner = typing.get_args(hint)[0]
        return tuple(_value(part, inner, f"{where}[{i}]") for i, part in enumerate(value))
    made = from_json(value, where) if isinstance(value, dict) else value
    allowed = allowed_types(hint)
    if not isinstance(made, allowed) or (isinstance(made, bool) and bool not in allowed):
        names = " or ".join("None" if t is types.NoneType else t.__name__ for t in allowed)
        raise ValueError(f"{where}: value must be {names}, got {value!r}. See dqtk/spec.")
    return made


def _lookup(name: Any, known: dict[str, Any], where: str, what: str) -> Any:
    if isinstance(name, str) and name in known:
        return known[name]
    raise ValueError(f"{where}: {what} must be one of {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")


def did_you_mean(name: Any, known: typing.Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def canonical(value: Any) -> str:
    """One text per spec, for hashing and for sharing equal specs in a file.

    Fields at their default are left out: hashes of old plans and checkpoints stay valid when a spec gains a field.
    """
    return json.dumps(_chosen(value), sort_keys=True, separators=(",", ":"))


def _chosen(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_chosen(part) for part in value]
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    return {"type": type(value).__name__} | {name: _chosen(part) for name, part in given.items()}
