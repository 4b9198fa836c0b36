"""How much each site loses alone: one layer at a time takes its quantized form, the probe scores the model, the layer comes back.

Nothing else is quantized meanwhile, and nothing is quantized twice. The layer that is put in is the one that ``quantize`` would
put in, so whatever a spec may hold (inputs, transforms, a branch, a solver) is measured with it. Every score is in a journal on the
disk before the next is taken; an interrupted measurement goes on where it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dqtk.calibrate import Stats
from dqtk.checkpoint import replace_layer
from dqtk.journal import Journal, claim, done
from dqtk.methods.solve import Solution
from dqtk.plan import Choice, Plan
from dqtk.quantize import MAX_MEMORY, check_fit, runtime_layer
from dqtk.sites import Site, components_of
from dqtk.spec import LayerSpec, canonical
from dqtk.stages import solutions

from .probes import Probe

_FLOOR = "floor "


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """scores: (site id, canonical text of its spec) -> score when only this site has this spec. floors: component -> score of the
    unquantized component in another float dtype: above it, differences are those of rounding."""

    scores: dict[tuple[str, str], float]
    floors: dict[str, float]

    def of(self, site: Site, spec: LayerSpec) -> float:
        """Score of a site with a spec."""
        return self.scores[site.id, canonical(spec)]


def measure(
    target: Any,
    plans: Sequence[Plan],
    stats: Stats,
    probes: Mapping[str, Probe],
    groups: Mapping[str, str],
    *,
    folder: Path,
    max_memory: int = MAX_MEMORY,
    told: Callable[[str], object] = lambda site: None,
) -> Sensitivity:
    """Score every (site, spec) of some plans, each alone.

    Args:
        target: pipeline with real weights, not quantized; as it was when this returns.
        plans: of the same sites; equal specs are measured once.
        stats: of this model; what solvers and transforms of the plans need.
        probes: group -> probe.
        groups: site id -> group.
        folder: of the journal; new, or that of this same measurement.
        max_memory: as of ``quantize``.
        told: called with every site that has just been scored.
    Raises:
        ValueError: plans of another model, a folder of another measurement.
    """
    parts = components_of(target)
    for plan in plans:
        check_fit(plan, parts)
    claim(folder, _task(parts, stats, probes, groups), "allocate")
    rows = done(folder, "allocate")
    with Journal(folder, 0) as journal:
        for component in dict.fromkeys(choice.site.component for plan in plans for choice in plan.choices):
            floor = _FLOOR + component
            if floor not in rows:
                rows[floor] = {probe.name: probe.floor(component) for probe in probes.values()}
                journal.record(floor, rows[floor])
        for plan in plans:
            work = [c for c in plan.choices if c.spec is not None and _key(c) not in rows]
            for solved in solutions(parts, work, stats, sequential=False, max_memory=max_memory):
                for choice, solution in solved:
                    probe = probes[groups[choice.site.id]]
                    with replaced(parts[choice.site.component], choice.site, solution):
                        rows[_key(choice)] = {probe.name: probe(choice.site.component)}
                    journal.record(_key(choice), rows[_key(choice)])
                    told(choice.site.id)
    return _gathered(plans, rows, probes, groups)


@contextmanager
def replaced(module: nn.Module, site: Site, solution: Solution) -> Iterator[None]:
    """While open, one layer is quantized."""
    layer = module.get_submodule(site.path)
    replace_layer(module, site.path, runtime_layer(layer, solution))
    try:
        yield
    finally:
        replace_layer(module, site.path, layer)


def _key(choice: Choice) -> str:
    return f"{choice.site.id} {canonical(choice.spec)}"


def _gathered(plans: Sequence[Plan], rows: Mapping[str, Mapping], probes: Mapping[str, Probe], groups: Mapping[str, str]):
    scores = {
        (c.site.id, canonical(c.spec)): rows[_key(c)][probes[groups[c.site.id]].name]
        for plan in plans
        for c in plan.choices
        if c.spec is not None
    }
    floors = {
        key.removeprefix(_FLOOR): min(score for score in row.values() if score is not None)
        for key, row in rows.items()
        if key.startswith(_FLOOR) and any(score is not None for score in row.values())
    }
    return Sensitivity(scores=scores, floors=floors)


def _task(parts: Mapping[str, nn.Module], stats: Stats, probes: Mapping[str, Probe], groups: Mapping[str, str]) -> dict[str, Any]:
    """What scores depend on, beside site and spec: the rest is measured anew when it changes."""
    dtypes = {name: str(next(p.dtype for p in part.parameters() if p.is_floating_point())) for name, part in parts.items()}
    names = {group: probe.name for group, probe in probes.items()}
    moved = sorted(site for site, group in groups.items() if group == "content") if len(set(names.values())) > 1 else []
    return {"verb": "allocate", "run": stats.run, "dtypes": dtypes, "probes": names, "content": moved}
