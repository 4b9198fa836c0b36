"""Choices as frozen data: number format, granularity, how a range is found, of one tensor and of one layer.

One dataclass per choice; the type is the key (``methods`` and ``numerics`` dispatch on it), absence is ``None``, there are no mode
strings. Everything here is data that a plan can hold without importing the code that acts on it. JSON is strict both ways: an
unknown type or field is an error that names the place and suggests the nearest known word.

Shapes are given for a weight seen as a matrix [N, K]: N output features, K input features; a convolution's K is (taps, C_in) with
the channel innermost, so that a group lies along C_in at one tap.
"""

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass
from typing import Any

# --- number formats --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Int:
    """``bits``-bit integers (2 to 8).

    Symmetric: codes -(2^(b-1)-1) .. 2^(b-1)-1, zero is code 0. Asymmetric: 2^b codes and a zero point.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise ValueError(
                f"Int: bits must be an integer from 2 to 8, got {self.bits!r}. Use None in place of the spec to keep 16 bits."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Float:
    """Sign, ``exponent`` and ``mantissa`` bits. Here (4, 3): ``torch.float8_e4m3fn``, largest value 448, no infinity (OCP FP8)."""

    exponent: int = 4
    mantissa: int = 3

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) != (4, 3):
            raise ValueError(f"Float: (exponent, mantissa) must be (4, 3), got ({self.exponent}, {self.mantissa}). Use Float().")

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


# --- granularities: which numbers share one scale --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PerTensor:
    """One scale for the whole tensor. Scale shape [1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerChannel:
    """One scale per output channel of a weight [N, K]. Scale shape [N, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerToken:
    """One scale per token (row) of an input [T, K]; per sample for a convolution, whose input has no tokens. Scale shape [T, 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerGroup:
    """One float scale per ``size`` consecutive inputs of each output channel. Scale shape [N, K / size]."""

    size: int = 64

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoLevel:
    """Groups whose scales are small integers times one float per output channel, so that every weight is an int8 number.

    weight[n, k] = scale[n] * group_scale[n, k // size] * code[n, k], with |group_scale * code| <= 127: one int8 matmul serves
    the whole layer although the groups differ (the "progressive" quantization of QServe, Lin et al. 2024, arXiv 2405.04532,
    section 4.1; here symmetric in both levels, and group scales are chosen by error, not by absmax). Scale shapes [N, 1] float and
    [N, K / size] uint8.
    """

    size: int = 64

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size)


def _check_group(where: str, size: int) -> None:
    if not (isinstance(size, int) and size >= 8 and size % 8 == 0):
        raise ValueError(f"{where}: size must be a positive multiple of 8, got {size!r}. The usual sizes are 32, 64 and 128.")


# --- how a range is found --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class AbsMax:
    """The largest magnitude (symmetric) or the least and largest value (asymmetric) of the numbers that share a scale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MSE:
    """The clipping among ``steps`` fractions of the absmax range, from 1 down to ``least``, with the least squared error."""

    steps: int = 16
    least: float = 0.4

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int) and self.steps >= 2 and 0 < self.least < 1):
            raise ValueError(
                f"MSE: steps must be at least 2 and least in (0, 1), got steps={self.steps!r}, least={self.least!r}. Use MSE()."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Dynamic:
    """Inputs only: absmax of each token, found anew at every call. Needs no calibration."""


Format = Int | Float
Granularity = PerTensor | PerChannel | PerToken | PerGroup | TwoLevel
Range = AbsMax | MSE | Dynamic


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """How one tensor is stored or rounded."""

    format: Format
    granularity: Granularity
    range: Range = AbsMax()

    @property
    def bits(self) -> int:
        return self.format.bits


# --- solvers: how codes are chosen. The code is in dqtk/methods, one file each ---------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class RTN:
    """Round to nearest, after the range has been found."""


Solver = RTN


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """What happens to one linear or convolution: its weight, its input (``None``: kept in the compute dtype), and the solver."""

    weight: TensorSpec
    input: TensorSpec | None = None
    solver: Solver = RTN()

    def __post_init__(self) -> None:
        self._check_weight()
        if self.input is not None:
            self._check_input(self.input)

    def _check_weight(self) -> None:
        form, granularity = self.weight.format, self.weight.granularity
        if isinstance(granularity, PerToken) or isinstance(self.weight.range, Dynamic):
            raise ValueError(
                "LayerSpec: weight must be static with PerTensor, PerChannel, PerGroup or TwoLevel granularity, "
                f"got {granularity} with {self.weight.range}. Weights have no tokens."
            )
        if isinstance(granularity, TwoLevel) and not (isinstance(form, Int) and form.symmetric and form.bits <= 4):
            raise ValueError(
                f"LayerSpec: weight with TwoLevel granularity must be symmetric Int of at most 4 bits, got {form}. Use PerGroup."
            )

    def _check_input(self, spec: TensorSpec) -> None:
        if isinstance(spec.range, Dynamic) != isinstance(spec.granularity, PerToken):
            raise ValueError(
                f"LayerSpec: input must be PerToken with Dynamic range or PerTensor with a calibrated range, "
                f"got {spec.granularity} with {spec.range}. A token's range is known only when it arrives."
            )
        if isinstance(spec.range, MSE):
            raise ValueError("LayerSpec: input range must be AbsMax or Dynamic, got MSE. Calibration keeps ranges, not samples.")
        if isinstance(spec.granularity, PerChannel | PerGroup | TwoLevel):
            raise ValueError(
                f"LayerSpec: input granularity must be PerToken or PerTensor, got {spec.granularity}. "
                "Matmuls need one scale per row."
            )
        if isinstance(spec.format, Int) != isinstance(self.weight.format, Int):
            raise ValueError(
                f"LayerSpec: weight and input must both be Int or both Float, got {self.weight.format} and {spec.format}."
            )
        if isinstance(spec.format, Int) and spec.format.bits != 8:
            raise ValueError(f"LayerSpec: input Int must have 8 bits, got {spec.format.bits}. Use Int(bits=8).")
        self._check_weight_under_input()

    def _check_weight_under_input(self) -> None:
        form = self.weight.format
        if isinstance(self.weight.granularity, PerGroup):
            allowed = "PerTensor, PerChannel or TwoLevel" if isinstance(form, Int) else "PerTensor or PerChannel"
            remedy = "Use TwoLevel(size=64)." if isinstance(form, Int) else "Use PerChannel()."
            raise ValueError(f"LayerSpec: weight under a quantized input must be {allowed}, got PerGroup. {remedy}")
        if isinstance(form, Int) and not form.symmetric:
            raise ValueError(
                f"LayerSpec: weight under an Int input must be symmetric, got {form}. Use Int(bits={form.bits}, symmetric=True)."
            )

    @property
    def needs_stats(self) -> bool:
        """Whether calibration must see this layer's input first."""
        return self.input is not None and not isinstance(self.input.range, Dynamic)

    def __str__(self) -> str:
        return describe(self)


def describe(spec: LayerSpec | None) -> str:
    """A short name such as ``W4 group 64 two-level, A8 per token``; the solver where it is not RTN."""
    if spec is None:
        return "16 bit"

    def short(tensor: TensorSpec) -> str:
        form = "FP" if isinstance(tensor.format, Float) else ""
        where = {
            PerTensor: "per tensor",
            PerChannel: "per channel",
            PerToken: "per token",
            PerGroup: f"group {getattr(tensor.granularity, 'size', '')}",
            TwoLevel: f"group {getattr(tensor.granularity, 'size', '')} two-level",
        }[type(tensor.granularity)]
        return f"{form}{tensor.bits} {where}" + ("" if getattr(tensor.format, "symmetric", True) else " asym")

    solver = "" if spec.solver == RTN() else f", {type(spec.solver).__name__}"
    return f"W{short(spec.weight)}, " + (f"A{short(spec.input)}" if spec.input else "A16") + solver


# --- strict JSON -----------------------------------------------------------------------------------------------------

_TYPES = {
    t.__name__: t
    for t in (Int, Float, PerTensor, PerChannel, PerToken, PerGroup, TwoLevel, AbsMax, MSE, Dynamic, TensorSpec, RTN, LayerSpec)
}


def to_json(value: Any) -> Any:
    """A spec as JSON-clean data: ``{"type": name, field: value, ...}``; fields at their default are written too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return value


def from_json(data: Any, where: str = "spec") -> Any:
    """Inverse of ``to_json``.

    Raises:
        ValueError: naming ``where``: not an object, an unknown type or field, a value of a wrong type, an impossible combination.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: value must be an object with a type, got {data!r}. See dqtk/spec.py.")
    kind = _lookup(data.get("type"), _TYPES, where, "type")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in data.items():
        if key == "type":
            continue
        _lookup(key, fields, f"{where}: {kind.__name__}", "field")
        arguments[key] = from_json(value, f"{where}.{key}") if isinstance(value, dict) else value
        if not isinstance(arguments[key], _allowed(hints[key])):
            names = " or ".join("None" if t is types.NoneType else t.__name__ for t in _allowed(hints[key]))
            raise ValueError(f"{where}.{key}: value must be {names}, got {value!r}. See dqtk/spec.py.")
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in arguments]
    if missing:
        raise ValueError(f"{where}: {kind.__name__} must have {', '.join(missing)}, got {sorted(arguments)}. Add the field.")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _allowed(hint: Any) -> tuple[type, ...]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else (hint,)
    return (*options, int) if float in options else options


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
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}
    return {"type": type(value).__name__} | {name: _chosen(part) for name, part in given.items()}
