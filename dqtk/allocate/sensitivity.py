"""How much each site loses alone: one layer at a time takes its quantized form, the probe scores the model, the layer comes back.

Nothing else is quantized meanwhile; or (``around``) everything else is, as one plan says. Errors of layers do not simply add up,
and scores around a plan near the answer have in them what the errors of the others do to a layer's. Nothing is quantized twice.
The layer that is put in is the one that ``quantize`` would put in, so whatever a spec may hold (inputs, transforms, a branch, a
solver) is measured with it. Every score is in a journal on the disk before the next is taken: an interrupted measurement goes on,
and several processes share one.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from dqtk.calibrate import Stats
from dqtk.calibrate.gather import input_name
from dqtk.checkpoint import replace_layer
from dqtk.fit import check_fit
from dqtk.journal import Journal, claim, done
from dqtk.methods.solve import Solution
from dqtk.plan import Choice, Plan
from dqtk.processes import ALONE, Processes
from dqtk.quantize import MAX_MEMORY, runtime_layer
from dqtk.sites import Site, components_of
from dqtk.spec import ByLevel, SiteSpec, canonical
from dqtk.stages import solutions

from .parts import spec_in
from .probes import OutputSQNR, Probe, limited
from .whole import Layers

_FLOOR, _BASE, _PART = "floor ", "base ", "part "


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """scores: (site id, canonical text of its spec) -> score when only this site has this spec, or when the rest is as one plan
    says (of 16 bits too then). floors: site id -> score of its unquantized component in another float dtype, by the site's
    own probe where that can say: above it, differences are those of rounding. base: component -> score of that plan; empty
    where the rest is unquantized. parts: as scores, what each part of a run adds to the noise power; empty where runs were
    not parted.
    """

    scores: dict[tuple[str, str], float]
    floors: dict[str, float]
    base: dict[str, float] = field(default_factory=dict)
    parts: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)

    def of(self, site: Site, spec: SiteSpec | None) -> float:
        """Score of a site with a spec. Of 16 bits (None) where that was not measured: infinite. Of a mixture over parts of a run:
        from what each part loses."""
        if isinstance(spec, ByLevel) and (site.id, canonical(spec)) not in self.scores:
            return limited(math.fsum(self.noises(site, spec)))
        return self.scores.get((site.id, canonical(spec)), math.inf) if spec is None else self.scores[site.id, canonical(spec)]

    def noises(self, site: Site, spec: SiteSpec) -> tuple[float, ...]:
        """What each part of a run adds to the noise power of a site with a spec."""
        if not isinstance(spec, ByLevel) or (site.id, canonical(spec)) in self.parts:
            return self.parts[site.id, canonical(spec)]
        kinds = [self.parts[site.id, canonical(kind)] for kind in spec.kinds]
        num = len(kinds[0])
        return tuple(kinds[spec.kinds.index(spec_in(spec, part, num))][part] for part in range(num))


def measure(
    target: Any,
    plans: Sequence[Plan],
    stats: Stats,
    probes: Mapping[str, Probe],
    groups: Mapping[str, str],
    *,
    folder: Path,
    around: Plan | None = None,
    layers: Layers | None = None,
    max_memory: int = MAX_MEMORY,
    me: Processes = ALONE,
    told: Callable[[str], object] = lambda site: None,
) -> Sensitivity:
    """Score every (site, spec) of some plans, each alone.

    Args:
        target: pipeline with real weights, not quantized; as it was when this returns.
        plans: of the same sites; equal specs are measured once.
        stats: of this model; what solvers and transforms of the plans need.
        probes, groups: group -> probe, site id -> group.
        folder: of the journal; new, or that of this same measurement.
        around: what the rest of the model is meanwhile; None: unquantized. 16 bits are scored too then.
        layers: get every layer that is made, by this process.
        max_memory: as of ``quantize``.
        me: of those that share the work in one folder; all return the same.
        told: called with every site that has just been scored.
    Raises:
        ValueError: plans of another model or with shared books, a folder of another measurement.
    """
    parts = components_of(target)
    for plan in [*plans, *([] if around is None else [around])]:
        check_fit(plan, parts)
        check_own_books(plan)
    if me.first:
        claim(folder, _task(parts, stats, probes, groups, around), "allocate")
    me.wait()
    rows = done(folder, "allocate")
    me.wait()  # all have read the same journal before anyone goes on writing it
    how: dict[str, Any] = {"sequential": False, "max_memory": max_memory}
    probed = dict(parts) if around is None else twins(parts, around, stats, how)
    with Journal(folder, me.rank) as journal:

        def keep(key: str, scores: Mapping[str, float | None]) -> None:
            rows[key] = dict(scores)
            journal.record(key, scores)

        for component in dict.fromkeys(choice.site.component for plan in plans for choice in plan.choices) if me.first else ():
            if _FLOOR + component not in rows:
                keep(_FLOOR + component, {probe.name: probe.floor(component) for probe in probes.values()})
            if around is not None and _BASE + component not in rows:
                keep(_BASE + component, {probe.name: probe(component, probed[component]) for probe in probes.values()})
        todo, mine = _todo(plans, rows, me, unquantized=around is not None)
        for choice, solution in _all(parts, todo, stats, how):
            probe, component = probes[groups[choice.site.id]], choice.site.component
            layer: nn.Module = parts[component].get_submodule(choice.site.path)
            new = layer if solution is None else runtime_layer(layer, solution)
            if layers is not None and solution is not None:
                layers.add(choice, new)
            if _key(choice) not in mine:  # it was solved for the sake of others
                continue
            with replaced(probed[component], choice.site.path, new):
                keep(_key(choice), _row(probe, component, probed[component]))
            told(choice.site.id)
    me.wait()
    rows = done(folder, "allocate")
    return _gathered(plans, rows, probes, groups)


def _todo(
    plans: Sequence[Plan], rows: Mapping[str, Any], me: Processes, *, unquantized: bool
) -> tuple[list[list[Choice]], set[str]]:
    """Of every plan what this process solves; behind them each quantized site's 16 bits if asked for. And the keys that it scores.

    Layers that share an input learn together, so all of them are there where one of them has no score yet; a key is scored where
    it comes first, whoever else solves its layer again for the sake of others.
    """
    found: list[list[Choice]] = []
    given, mine = set(rows), set[str]()

    def take(units: Sequence[Sequence[Choice]]) -> None:
        left = [(unit, new) for unit in units if (new := {_key(choice) for choice in unit} - given)]
        for unit in units:
            given.update(_key(choice) for choice in unit)
        found.append([])
        for _, (unit, new) in me.mine(left):
            found[-1].extend(unit)
            mine.update(new)

    for plan in plans:
        together: dict[tuple[str, str], list[Choice]] = {}
        for choice in plan.choices:
            if choice.spec is not None:
                together.setdefault((input_name(choice.site), canonical(choice.spec)), []).append(choice)
        take(list(together.values()))
    if unquantized:
        sites = {c.site.id: replace(c, spec=None) for plan in plans for c in plan.choices if c.spec is not None}
        take([[choice] for choice in sites.values()])
    return found, mine


def check_own_books(plan: Plan) -> None:
    """Raises ``ValueError`` for a plan whose layers share books: what a layer costs and loses then depends on the others."""
    shared = next((group for _, group in plan.books), None)
    if shared is not None:
        raise ValueError(
            f"allocate: layers of recipe {plan.recipe!r} must have books of their own, got books that group {shared!r} shares. "
            "What one layer costs and loses would depend on the others. Leave group out."
        )


def _all(
    parts: Mapping[str, nn.Module], todo: Sequence[Sequence[Choice]], stats: Stats, how: Mapping[str, Any]
) -> Iterator[tuple[Choice, Solution | None]]:
    """Every choice solved, a plan after the other; None for 16 bits."""
    for work in todo:
        for solved in solutions(parts, [choice for choice in work if choice.spec is not None], stats, **how):
            yield from solved
        yield from ((choice, None) for choice in work if choice.spec is None)


def twins(parts: Mapping[str, nn.Module], around: Plan, stats: Stats, how: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Copies of the components over the same tensors, quantized as the plan says."""
    made = {}
    for name, part in parts.items():
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        made[name] = copy.deepcopy(part, shared)
    for solved in solutions(parts, [c for c in around.choices if c.spec is not None], stats, **how):
        for choice, solution in solved:
            component, path = choice.site.component, choice.site.path
            replace_layer(made[component], path, runtime_layer(parts[component].get_submodule(path), solution))
    return made


@contextmanager
def replaced(module: nn.Module, path: str, layer: nn.Module) -> Iterator[None]:
    """While open, another layer stands at the path."""
    before = module.get_submodule(path)
    replace_layer(module, path, layer)
    try:
        yield
    finally:
        replace_layer(module, path, before)


def _row(probe: Probe, component: str, module: nn.Module) -> dict[str, float]:
    """The score by the probe's name, and what parts of a run add to the noise, where the probe can say."""
    if not (isinstance(probe, OutputSQNR) and probe.run is not None):
        return {probe.name: probe(component, module)}
    score, noises = probe.in_parts(component, module)
    return {probe.name: score} | {f"{_PART}{part}": noise for part, noise in enumerate(noises)}


def _key(choice: Choice) -> str:
    return f"{choice.site.id} {canonical(choice.spec)}"


def _gathered(
    plans: Sequence[Plan], rows: Mapping[str, Mapping], probes: Mapping[str, Probe], groups: Mapping[str, str]
) -> Sensitivity:
    def name(site: Site) -> str:
        return probes[groups[site.id]].name

    sites = dict.fromkeys(choice.site for plan in plans for choice in plan.choices)
    chosen = [variant for plan in plans for c in plan.choices for variant in (c, replace(c, spec=None)) if _key(variant) in rows]
    return Sensitivity(
        scores={(c.site.id, canonical(c.spec)): rows[_key(c)][name(c.site)] for c in chosen},
        floors={site.id: floor for site in sites if (floor := rows[_FLOOR + site.component][name(site)]) is not None},
        base=_least(rows, _BASE),
        parts={(c.site.id, canonical(c.spec)): noises for c in chosen if (noises := _noises(rows[_key(c)]))},
    )


def _noises(row: Mapping[str, float]) -> tuple[float, ...]:
    """Of every part of a run, in order."""
    num = sum(name.startswith(_PART) for name in row)
    return tuple(row[f"{_PART}{part}"] for part in range(num))


def _least(rows: Mapping[str, Mapping], prefix: str) -> dict[str, float]:
    """Component -> the least score in its row of this kind; none where nothing could be said."""
    found = {
        key.removeprefix(prefix): [v for v in row.values() if v is not None] for key, row in rows.items() if key.startswith(prefix)
    }
    return {component: min(values) for component, values in found.items() if values}


def _task(
    parts: Mapping[str, nn.Module], stats: Stats, probes: Mapping[str, Probe], groups: Mapping[str, str], around: Plan | None
) -> dict[str, Any]:
    """What scores depend on, beside site and spec: the rest is measured anew when it changes."""
    names = {group: probe.name for group, probe in probes.items()}
    moved = {group: sorted(site for site, mine in groups.items() if mine == group) for group in names}
    grouped = moved if len(set(names.values())) > 1 else {}
    rest = "unquantized" if around is None else around.hash
    task = {"verb": "allocate", "run": stats.run, "dtypes": dtypes(parts), "probes": names, "groups": grouped, "around": rest}
    runs = {probe.run for probe in probes.values() if isinstance(probe, OutputSQNR) and probe.run is not None}
    return task | ({"parts": [list(run.edges) for run in runs]} if runs else {})


def dtypes(parts: Mapping[str, nn.Module]) -> dict[str, str]:
    """Component -> its float dtype, in words."""
    return {name: str(next(p.dtype for p in part.parameters() if p.is_floating_point())) for name, part in parts.items()}
