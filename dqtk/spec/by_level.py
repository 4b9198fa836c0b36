"""A layer whose precision depends on the noise level: one ``LayerSpec`` per interval of a run (a *step policy*).

Where two of its specs differ in the input only, one packed weight serves both; each other weight is stored beside it.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from . import layer
from .formats import PerLevel, VectorCodebook, ascends
from .frozen import frozen
from .layer import LayerSpec


@frozen
class ByLevel:
    """``specs`` in the order of a run, from most noise to least.

    shares: where one spec ends and the next begins, as shares of a run: 0 is its beginning, 0.1 behind a tenth of its steps.
    edges: the same in the denoiser's own time, in the order of the run; none: found from shares when the model is quantized.
    rising: the denoiser's time rises along a run (it is given 1 - sigma); else it falls, as timesteps and sigmas do.
    num_steps: of the run that edges were found with.
    """

    specs: tuple[LayerSpec, ...]
    shares: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    rising: bool = False
    num_steps: int | None = None

    def __post_init__(self) -> None:
        num = len(self.specs) - 1
        if num < 1 or any(a == b for a, b in pairwise(self.specs)):
            raise ValueError(f"ByLevel: specs must be at least two, neighbours different, got {num + 1}. Use a LayerSpec for one.")
        if not (self.shares or self.edges) or {len(self.shares), len(self.edges)} - {0, num}:
            raise ValueError(
                f"ByLevel: shares or edges must be given, {num} for {num + 1} specs, got {list(self.shares)} and "
                f"{list(self.edges)}. Give shares of a run, such as (0.1, 0.9)."
            )
        if any(a >= b for a, b in pairwise((0.0, *self.shares, 1.0))):
            raise ValueError(f"ByLevel: shares must ascend between 0 and 1, got {list(self.shares)}. For example (0.1, 0.9).")
        if not ascends(self.edges if self.rising else self.edges[::-1]):
            raise ValueError(
                f"ByLevel: edges must be finite and {'ascend' if self.rising else 'descend'} along the run, got "
                f"{list(self.edges)}. Leave them out to find them from shares."
            )
        self._check_weights()

    def _check_weights(self) -> None:
        for weight in self.weights:
            several = [spec for spec in weight if spec.needs_ranges]
            if len(several) > 1:
                raise ValueError(
                    "ByLevel: specs with one weight must have at most one calibrated input, got "
                    f"{' and '.join(map(str, several))}. Make one Dynamic."
                )
        looks = next((spec for spec in self.specs if spec.looks), None)
        if looks is not None:
            raise ValueError(
                f"ByLevel: specs must have no ConstantToken and no ShortcutSplit, got {looks}. "
                "They are looked for in layers of one spec only: leave them out, or take another recipe."
            )
        if any(spec.correct_bias for spec in self.specs):
            raise ValueError("ByLevel: correct_bias must be False, got True. Layers have one bias for all noise levels.")

    @property
    def kinds(self) -> tuple[LayerSpec, ...]:
        """The different specs, in the order of the run."""
        return tuple(dict.fromkeys(self.specs))

    @property
    def weights(self) -> tuple[tuple[LayerSpec, ...], ...]:
        """The kinds, those together that share a stored weight; in each the one first that it is solved for.

        That is the one with a calibrated input, else with the input of fewest bits.
        """
        found: dict[LayerSpec, list[LayerSpec]] = {}
        for spec in self.kinds:
            found.setdefault(replace(spec, input=None), []).append(spec)
        return tuple(tuple(sorted(mine, key=_coarseness)) for mine in found.values())

    @property
    def longest(self) -> LayerSpec:
        """The spec with the largest share of a run. Raises ``ValueError`` where shares are not known."""
        parts = list(zip(self.specs, self.widths, strict=True))
        return max(self.kinds, key=lambda kind: sum(width for spec, width in parts if spec == kind))

    @property
    def widths(self) -> tuple[float, ...]:
        """The share of a run that each spec serves. Raises ``ValueError`` where shares are not known."""
        if not self.shares:
            raise ValueError(f"ByLevel: shares must be known to weigh its specs, got edges {list(self.edges)} only. Give both.")
        return tuple(end - begin for begin, end in pairwise((0.0, *self.shares, 1.0)))

    @property
    def ascending(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Edges in ascending time, and the kind of every interval between them."""
        kinds = self.kinds
        order = tuple(kinds.index(spec) for spec in self.specs)
        return (self.edges, order) if self.rising else (self.edges[::-1], order[::-1])

    def each(self, change: Callable[[LayerSpec], LayerSpec]) -> "LayerSpec | ByLevel":
        """With every spec changed; neighbours that have become equal are joined, and one spec for all is a ``LayerSpec``."""
        specs = [change(spec) for spec in self.specs]
        cuts = [i for i, (a, b) in enumerate(pairwise(specs)) if a != b]
        if not cuts:
            return specs[0]
        shares, edges = (tuple(given[i] for i in cuts) if given else () for given in (self.shares, self.edges))
        return replace(self, specs=(*(specs[i] for i in cuts), specs[-1]), shares=shares, edges=edges)

    @property
    def needs_ranges(self) -> bool:
        """As ``LayerSpec.needs_ranges``, of any spec."""
        return any(spec.needs_ranges for spec in self.specs)

    @property
    def needs_inputs(self) -> bool:
        """As ``LayerSpec.needs_inputs``, of any spec."""
        return any(spec.needs_inputs for spec in self.specs)

    @property
    def looks(self) -> bool:
        """False: see ``_check_weights``."""
        return False

    @property
    def needs_moments(self) -> bool:
        """As ``LayerSpec.needs_moments``, of any spec."""
        return any(spec.needs_moments for spec in self.specs)

    @property
    def needs_stats(self) -> bool:
        """As ``LayerSpec.needs_stats``, of any spec."""
        return any(spec.needs_stats for spec in self.specs)

    def __str__(self) -> str:
        return describe(self)


SiteSpec = LayerSpec | ByLevel
"""What happens to one linear or convolution, at all noise levels alike or not."""


def _coarseness(spec: LayerSpec) -> tuple[bool, int]:
    return not spec.needs_ranges, 16 if spec.input is None else spec.input.bits


def kinds_of(spec: SiteSpec | None) -> tuple[LayerSpec, ...]:
    """The different specs that a layer runs with; none at 16 bits."""
    return () if spec is None else spec.kinds if isinstance(spec, ByLevel) else (spec,)


def weights_of(spec: SiteSpec) -> tuple[tuple[LayerSpec, ...], ...]:
    """Of every stored weight the kinds that share it, as ``ByLevel.weights``."""
    return spec.weights if isinstance(spec, ByLevel) else ((spec,),)


def each_of(spec: SiteSpec, change: Callable[[LayerSpec], LayerSpec]) -> SiteSpec:
    """The spec with every ``LayerSpec`` in it changed."""
    return spec.each(change) if isinstance(spec, ByLevel) else change(spec)


def level_edges(spec: LayerSpec) -> tuple[float, ...]:
    """Edges between the ranges per noise level of a layer's input; none for most layers."""
    granularity = None if spec.input is None else spec.input.granularity
    return granularity.edges if isinstance(granularity, PerLevel) else ()


def shared_forms(spec: SiteSpec | None) -> tuple[VectorCodebook, ...]:
    """The formats of a layer's weights whose books other layers read too; none for most layers."""
    forms = dict.fromkeys(part.weight.format for part in kinds_of(spec))
    return tuple(form for form in forms if isinstance(form, VectorCodebook) and form.group is not None)


def describe(spec: SiteSpec | None) -> str:
    """A short name such as ``W4 group 64, A16 to 10 % / A4 group 64, rotated``: in brief where one weight serves all."""
    if not isinstance(spec, ByLevel):
        return layer.describe(spec)
    ends = [f" to {100 * share:g} %" for share in spec.shares] or [f" to time {edge:g}" for edge in spec.edges]
    words = [layer.describe(part) for part in spec.specs]
    if len(spec.weights) > 1:
        return "; then ".join(f"{part}{end}" for part, end in zip(words, [*ends, ""], strict=True))
    weight, _, *rest = words[0].split(", ")
    inputs = " / ".join(f"{part.split(', ')[1]}{end}" for part, end in zip(words, [*ends, ""], strict=True))
    return ", ".join([weight, inputs, *rest])
