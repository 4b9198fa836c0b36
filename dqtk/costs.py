"""What layers cost: milliseconds by shape and spec, measured on one machine, as data that allocation can read.

``dqtk bench --layers`` measures such a table (``bench/layers.py``). Times of two machines, thread counts, devices or dtypes are not
of one kind: a table holds one of each and refuses to take in another's.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from .sites import Site
from .spec import (
    RTN,
    VECTORS,
    AbsMax,
    Dynamic,
    Hadamard,
    LayerSpec,
    LowRank,
    PerLevel,
    PerTensor,
    Smooth,
    TensorSpec,
    Transform,
    VectorCodebook,
    canonical,
    describe,
    from_json,
    to_json,
)

FORMAT_VERSION = 1


def timed_as(spec: LayerSpec | None) -> LayerSpec | None:
    """The spec without what cannot change its speed: how codes, ranges and strengths are found, seeds, the shift of a bias.

    ``w4a8`` and ``w4a8-rtn`` with smoothing are one and the same to a kernel. None: 16 bits.
    """
    if spec is None:
        return None
    searched = not isinstance(spec.weight.format, VECTORS)  # these want a strength
    transforms = tuple(_any_strength(transform, None if searched else 0.5) for transform in spec.transforms)
    branch = None if spec.low_rank is None else LowRank(rank=spec.low_rank.rank)
    return LayerSpec(
        weight=_any_range(spec.weight),
        input=None if spec.input is None else _any_range(spec.input),
        solver=RTN(),
        transforms=transforms,
        low_rank=branch,
    )


def _any_strength(transform: Transform, alpha: float | None) -> Transform:
    if isinstance(transform, Smooth):
        return Smooth(alpha=alpha)
    return replace(transform, seed=0) if isinstance(transform, Hadamard) else transform


def _any_range(tensor: TensorSpec) -> TensorSpec:
    if isinstance(tensor.granularity, PerLevel):  # one number is looked up before the kernel that ``PerTensor`` runs
        tensor = replace(tensor, granularity=PerTensor())
    if isinstance(tensor.format, VectorCodebook):  # words are looked up alike, whoever holds them
        tensor = replace(tensor, format=replace(tensor.format, group=None))
    return tensor if isinstance(tensor.range, Dynamic) else replace(tensor, range=AbsMax())


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """What the cost of a layer depends on beside its spec.

    weight: as the layer holds it, [N, K] or [N, C, *kernel]. input: [T, K] of a linear (T tokens in all), [B, C, *S] of a
    convolution. stride, padding, dilation: of a convolution, one number per dimension.
    """

    weight: tuple[int, ...]
    input: tuple[int, ...]
    bias: bool
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def kind(self) -> str:
        return "linear" if len(self.weight) == 2 else "conv"

    @property
    def n(self) -> int:
        return self.weight[0]

    @property
    def k(self) -> int:
        """Inputs of one output number: C * taps."""
        return prod(self.weight[1:])

    @property
    def rows(self) -> int:
        """Rows of the output: tokens, or positions of all samples."""
        if self.kind == "linear":
            return self.input[0]
        zipped = zip(self.input[2:], self.weight[2:], self.stride, self.padding, self.dilation, strict=True)
        return self.input[0] * prod((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in zipped)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the product."""
        return 2 * self.rows * self.n * self.k

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"{self.rows} x {self.k} -> {self.n}"
        sizes = "x".join(map(str, self.input[2:]))
        return f"{self.input[0]} x {self.input[1]} x {sizes} -> {self.n}, kernel {'x'.join(map(str, self.weight[2:]))}"


def shape_of(layer: Any, x: Tensor) -> LayerShape:
    """The shape of a call of a linear or convolution, quantized or not."""
    weight = tuple(getattr(layer, "weight_shape", None) or layer.weight.shape)
    bias = layer.bias is not None
    if len(weight) == 2:
        return LayerShape(weight=weight, input=(x.numel() // x.shape[-1], x.shape[-1]), bias=bias)
    sizes = tuple(x.shape) if x.ndim == len(weight) else (1, *x.shape)
    return LayerShape(weight=weight, input=sizes, bias=bias, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """One layer shape with one spec (None: 16 bits), timed by itself.

    milliseconds: median, with quartiles ``low`` and ``high``; None for an emulated layer, which is never timed. over_16_bit and
    over_float32: how many times faster, medians of ratios within a round; None for an emulated layer and for the layer itself.
    kernel: what ran, in words.
    """

    shape: LayerShape
    spec: LayerSpec | None
    kernel: str
    milliseconds: float | None
    low: float | None = None
    high: float | None = None
    over_16_bit: float | None = None
    over_float32: float | None = None

    @property
    def emulated(self) -> bool:
        return self.milliseconds is None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostTable:
    """Costs of one machine, device and dtype, and the shapes in which one step of a model calls its sites.

    dtype: compute dtype, such as "bfloat16". device: "cpu" or "cuda". hardware, versions: names -> text, threads included. calls:
    site id -> one shape per call in a step.
    """

    dtype: str
    device: str
    hardware: dict[str, str]
    versions: dict[str, str]
    costs: tuple[Cost, ...]
    calls: dict[str, tuple[LayerShape, ...]] = field(default_factory=dict)

    def milliseconds(self, site: Site, spec: LayerSpec | None) -> float:
        """What a site costs in one step with this spec; None: at 16 bits.

        Raises:
            ValueError: a site that no step reached, another weight shape, or a spec that was not timed there.
        """
        shapes = self.calls.get(site.id)
        if shapes is None:
            raise ValueError(f"costs: site must be one of the {len(self.calls)} that a step reached, got {site.id}. {_AGAIN}")
        if shapes[0].weight != site.shape:
            raise ValueError(f"costs: {site.id} must have weight {list(shapes[0].weight)}, got {list(site.shape)}. {_AGAIN}")
        return sum(self.of(shape, spec) for shape in shapes)

    def of(self, shape: LayerShape, spec: LayerSpec | None) -> float:
        """Milliseconds of one call. Raises ``ValueError`` where there is no time for it."""
        wanted = canonical(timed_as(spec))
        found = next((c for c in self.costs if c.shape == shape and canonical(timed_as(c.spec)) == wanted), None)
        if found is None:
            raise ValueError(f"costs: {describe(spec)} must have been measured at {shape}, got no time for it. {_AGAIN}")
        if found.milliseconds is None:
            raise ValueError(
                f"costs: {describe(spec)} must have a kernel on {self.device}, got: {found.kernel}. Emulated layers have no time."
            )
        return found.milliseconds

    def merged(self, other: "CostTable") -> "CostTable":
        """Both tables' costs and calls; the other's where both have one.

        Raises:
            ValueError: tables of two dtypes, devices, machines or thread counts; a site that the two call in different shapes.
        """
        for name in ("dtype", "device", "hardware"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"costs: {name} must be {mine} in both tables, got {theirs}. Times of two places do not compare.")
        moved = next((s for s in self.calls.keys() & other.calls.keys() if self.calls[s] != other.calls[s]), None)
        if moved is not None:
            raise ValueError(f"costs: {moved} must be called in the same shapes in both tables, got two. Keep a table per size.")
        keys = {(cost.shape, canonical(timed_as(cost.spec))): cost for cost in (*self.costs, *other.costs)}
        return replace(
            self, costs=tuple(keys.values()), calls=self.calls | other.calls, versions={**self.versions, **other.versions}
        )

    # --- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """JSON-clean data; equal shapes and specs are written once."""
        shapes = list(dict.fromkeys([c.shape for c in self.costs] + [s for some in self.calls.values() for s in some]))
        texts = {canonical(c.spec): c.spec for c in self.costs if c.spec is not None}
        names = {text: f"s{i}" for i, text in enumerate(texts)}
        index = {shape: i for i, shape in enumerate(shapes)}
        return {
            "format_version": FORMAT_VERSION,
            **{name: getattr(self, name) for name in ("dtype", "device", "hardware", "versions")},
            "shapes": [_plain(asdict(shape)) for shape in shapes],
            "specs": {names[text]: to_json(spec) for text, spec in texts.items()},
            "costs": [
                {"shape": index[c.shape], "spec": None if c.spec is None else names[canonical(c.spec)]}
                | {name: getattr(c, name) for name in _NUMBERS}
                for c in self.costs
            ],
            "calls": {site: [index[shape] for shape in some] for site, some in self.calls.items()},
        }

    @staticmethod
    def from_json(data: Any, where: str = "costs") -> "CostTable":
        """Inverse of ``to_json``. Raises ``ValueError`` for another version or for what ``to_json`` does not write."""
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{where}: format_version must be {FORMAT_VERSION}, got {version!r}. {_AGAIN}")
        try:
            fields: list[dict[str, Any]] = [
                {name: value if name == "bias" else tuple(value) for name, value in row.items()} for row in data["shapes"]
            ]
            shapes = [LayerShape(**row) for row in fields]
            specs = {name: from_json(spec, f"{where}: specs.{name}") for name, spec in data["specs"].items()}
            costs = tuple(_cost(row, shapes, specs) for row in data["costs"])
            calls = {site: tuple(shapes[i] for i in some) for site, some in data["calls"].items()}
            place = {name: data[name] for name in ("dtype", "device", "hardware", "versions")}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: table must have the fields that to_json writes, got: {error!r}. {_AGAIN}") from error
        return CostTable(costs=costs, calls=calls, **place)

    @staticmethod
    def load(path: str | Path) -> "CostTable":
        """The table of a file, or of all that ``dqtk bench --output`` wrote. Raises ``ValueError`` that names the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"costs: {path} must be a readable JSON file, got: {error}. {_AGAIN}") from error
        whole = isinstance(data, Mapping) and "rows" in data
        if whole and data.get("costs") is None:
            raise ValueError(f"costs: {path} must hold a table of layers, got a bench without one. Add --layers to dqtk bench.")
        return CostTable.from_json(data["costs"] if whole else data, f"costs: {path}")


_AGAIN = "Measure it with dqtk bench --layers."
_NUMBERS = ("kernel", "milliseconds", "low", "high", "over_16_bit", "over_float32")


def _cost(row: Mapping[str, Any], shapes: list[LayerShape], specs: Mapping[str, LayerSpec]) -> Cost:
    spec = None if row["spec"] is None else specs[row["spec"]]
    return Cost(shape=shapes[row["shape"]], spec=spec, **{name: row[name] for name in _NUMBERS})


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
