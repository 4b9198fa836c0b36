"""A plan from plans: at every site the spec of one of them, or 16 bits, as scores and a budget decide."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from dqtk.calibrate import Stats
from dqtk.costs import CostTable
from dqtk.plan import Choice, Plan
from dqtk.spec import LayerSpec, SiteSpec, canonical, describe

from .budget import Budget
from .from_logs import LOSSES
from .groups import ALL, Grouped, Ratios, allocate_groups, ratios_of
from .parts import mixtures
from .prices import Calls, price
from .probes import limited
from .program import Candidate, allocate, total
from .sensitivity import Sensitivity

Spec = SiteSpec | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """plan: as chosen. groups: of ``allocate_groups``. unit and num_weights: of the budget, for words. offers: what there was.
    stats: that the layers were measured with, and that ``quantize`` takes; None where scores came from elsewhere.
    """

    plan: Plan
    groups: dict[str, Grouped]
    budget: Budget
    num_weights: int
    expected: float | None
    offers: "Offers"
    stats: Stats | None = None

    @property
    def picked(self) -> dict[str, Spec]:
        """Site id -> its spec, None at 16 bits."""
        return {choice.site.id: choice.spec for choice in self.plan.choices}

    @property
    def cost(self) -> float:
        """What was spent, in the unit of the budget's total."""
        return math.fsum(group.allocation.cost for group in self.groups.values())

    def in_parts(self) -> tuple[float, ...]:
        """Expected SQNR of the output in dB in each equal part of a run, as it counts, from most noise to least; empty where runs
        were whole."""
        found = self.offers.found
        if not found.parts or self.expected is None:
            return ()
        rows = [found.noises(choice.site, choice.spec) for choice in self.plan.choices if choice.spec is not None]
        noises = [math.fsum(part) * len(row) for row in rows[:1] for part in zip(*rows, strict=True)]
        return tuple(limited(noise) for noise in noises)

    def to_json(self) -> dict[str, Any]:
        """The plan's."""
        return self.plan.to_json()

    def table(self) -> str:
        """How many sites got what, what was spent, and what is expected of the whole."""
        words = Counter(describe(choice.spec) for choice in self.plan.choices)
        lines = [f"{num:5} x {name}" for name, num in sorted(words.items())]
        for name, group in self.groups.items():
            spent, of = (self.budget.words(cost, self.num_weights) for cost in (group.allocation.cost, group.budget))
            lines.append(f"{name}: {len(group.allocation.chosen)} sites, {spent} of {of}")
        if self.expected is not None:
            lines.append(f"expected SQNR of the output if noise powers add up: {self.expected:.1f} dB")
        if parts := self.in_parts():
            lines.append(f"in equal parts of a run, as they count: {', '.join(f'{value:.1f}' for value in parts)} dB")
        return "\n".join(lines)


def allocate_plans(
    plans: Sequence[Plan],
    found: Sensitivity,
    budget: Budget,
    losses: Mapping[str, str],
    groups: Mapping[str, str],
    *,
    ratio: float | Ratios | None = None,
    protect: float | None = None,
    calls: Calls | None = None,
    table: CostTable | None = None,
) -> Made:
    """Choose among the specs that the plans have for each site.

    Args:
        plans: of the same sites. A site that no plan quantizes stays at 16 bits, and is paid for.
        found: scores of every (site, spec).
        budget: of all sites of the plans; bits are an average over all their weights, kept ones at 16, all that is stored counted.
        losses: group -> name of a loss. Where losses are noise powers, 16 bits are a candidate of every site.
        groups: site id -> group.
        ratio: as of ``ratios_of``.
        protect: sites whose best score is below are kept at 16 bits.
        calls, table: as of ``price``.
    Raises:
        ValueError: plans of different sites, unlike losses and no ratio, and what program and prices raise.
    """
    offers = Offers.of(plans, found, budget, losses, groups, protect=protect, calls=calls, table=table)
    return offers.allocated(ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offers:
    """What each site may become, for how much, and what it would lose: the program, filled.

    specs and candidates: site id -> in one order. full: site id -> cost at 16 bits. kinds: group -> name of its loss. alike:
    whether losses of all groups are of one measure, so that they add up.
    """

    rows: list[tuple[Choice, ...]]
    plans: Sequence[Plan]
    found: Sensitivity
    budget: Budget
    groups: Mapping[str, str]
    kinds: Mapping[str, str]
    alike: bool
    specs: dict[str, list[Spec]]
    candidates: dict[str, list[Candidate]]
    full: dict[str, float]

    @staticmethod
    def of(
        plans: Sequence[Plan],
        found: Sensitivity,
        budget: Budget,
        losses: Mapping[str, str],
        groups: Mapping[str, str],
        *,
        protect: float | None = None,
        calls: Calls | None = None,
        table: CostTable | None = None,
        parts: int | None = None,
        alike: bool = True,
    ) -> "Offers":
        """Arguments and errors as of ``allocate_plans``. parts: of a run, which may have specs of one weight each: ``found`` has
        what each of them loses. alike: whether all groups are measured by one probe; unlike kinds of losses never are."""
        rows = _rows(plans)
        priced: dict[str, Any] = {"unit": budget.unit, "calls": calls, "table": table}
        specs: dict[str, list[Spec]] = {}
        candidates: dict[str, list[Candidate]] = {}
        for choices in rows:
            site, loss = choices[0].site, losses[groups[choices[0].site.id]]
            specs[site.id] = _specs(choices, found, protect, stay=loss == "noise", parts=parts)
            candidates[site.id] = [
                Candidate(cost=_cost(choices, spec, priced), loss=_loss(loss, found.of(site, spec))) for spec in specs[site.id]
            ]
        full = {choices[0].site.id: _cost(choices, None, priced) for choices in rows}
        kinds = {group: losses[group] for group in dict.fromkeys(groups[choices[0].site.id] for choices in rows)}
        how: dict[str, Any] = {"specs": specs, "candidates": candidates, "full": full, "kinds": kinds}
        how["alike"] = len(kinds) == 1 or (alike and len(set(kinds.values())) == 1)
        return Offers(rows=rows, plans=plans, found=found, budget=budget, groups=groups, **how)

    @property
    def num_weights(self) -> int:
        """Of all sites."""
        return sum(choices[0].site.num_weights for choices in self.rows)

    @property
    def total(self) -> float:
        """The budget of all sites together."""
        return self.budget.total(self.num_weights)

    @property
    def noises(self) -> bool:
        """Whether losses are noise powers that add up."""
        return self.alike and set(self.kinds.values()) == {"noise"}

    def allocated(self, ratio: float | Ratios | None = None) -> Made:
        """The optimum; ``ratio`` as of ``ratios_of``. Raises ``ValueError`` for unlike losses without a ratio, and a budget
        that is too small."""
        if ratio is None and not self.alike:
            raise ValueError("allocate: groups with different metrics must have a ratio, got none. Their losses do not add up.")
        said = partial(self.budget.words, num_weights=self.num_weights)
        return self._made(allocate_groups(self.candidates, self.total, self.groups, ratios_of(ratio, self.groups), self.full, said))

    def at(self, total: float) -> Made:
        """The optimum of one program within another total, in the same unit."""
        return self._made({ALL: Grouped(budget=total, allocation=allocate(self.candidates, total))})

    def chosen(self, indices: Mapping[str, int]) -> Made:
        """What any choice of candidates makes."""
        return self._made({ALL: Grouped(budget=self.total, allocation=total(self.candidates, indices))})

    def indices(self, picked: Mapping[str, Spec]) -> dict[str, int]:
        """The inverse of ``picked``."""
        return {site: self.specs[site].index(spec) for site, spec in picked.items()}

    def picked(self, indices: Mapping[str, int]) -> dict[str, Spec]:
        """Site id -> the spec of its candidate."""
        return {site: self.specs[site][index] for site, index in indices.items()}

    def _made(self, groups: dict[str, Grouped]) -> Made:
        picked = self.picked({site: index for group in groups.values() for site, index in group.allocation.chosen.items()})
        choices = tuple(_chosen(choices, picked[choices[0].site.id], self.found, self.budget) for choices in self.rows)
        return Made(
            plan=replace(self.plans[0], recipe=f"allocated {self.budget}", choices=choices),
            groups=groups,
            budget=self.budget,
            num_weights=self.num_weights,
            expected=_expected(self.rows, picked, self.found) if self.noises else None,
            offers=self,
        )


def _cost(choices: Sequence[Choice], spec: Spec, priced: Mapping[str, Any]) -> float:
    """The price of a site; no time for one that no plan quantizes, since benches time the layers that they compare."""
    kept = all(choice.spec is None for choice in choices)
    return 0.0 if kept and priced["unit"] == "ms" else price(choices[0].site, spec, **priced)


def _loss(kind: str, score: float) -> float:
    """The loss of a score; none for a site that cannot be but as it is."""
    return LOSSES[kind](score) if math.isfinite(score) else 0.0


def _expected(rows: Sequence[Sequence[Choice]], picked: Mapping[str, Spec], found: Sensitivity) -> float | None:
    """dB of the output if changes of noise powers added up, from none or from the base; None where that leaves no noise."""
    base = {component: 10 ** (-score / 10) for component, score in found.base.items()}
    noise = math.fsum(base.values())
    for choices in rows:
        site = choices[0].site
        score = found.of(site, picked[site.id])
        if math.isfinite(score):
            noise += 10 ** (-score / 10) - base.get(site.component, 0.0)
    return -10 * math.log10(noise) if noise > 0 else None


def _rows(plans: Sequence[Plan]) -> list[tuple[Choice, ...]]:
    """Every site's choices in all plans."""
    ids = [[choice.site.id for choice in plan.choices] for plan in plans]
    if any(other != ids[0] for other in ids):
        raise ValueError("allocate: plans must be of the same sites, got others. Make them from one model.")
    return list(zip(*(plan.choices for plan in plans), strict=True))


def _specs(choices: Sequence[Choice], found: Sensitivity, protect: float | None, *, stay: bool, parts: int | None) -> list[Spec]:
    """What a site may become; None: it stays at 16 bits, where that is asked for or nothing else is there."""
    specs = [choice.spec for choice in {canonical(choice.spec): choice for choice in choices}.values() if choice.spec is not None]
    if protect is not None and specs and max(found.of(choices[0].site, spec) for spec in specs) < protect:
        return [None]
    if parts is not None:
        specs += mixtures([spec for spec in specs if isinstance(spec, LayerSpec)], parts)
    return [*specs, None] if stay or not specs else list(specs)


def _chosen(choices: Sequence[Choice], spec: Spec, found: Sensitivity, budget: Budget) -> Choice:
    """The choice for a site, and why."""
    if all(choice.spec is None for choice in choices):
        return choices[0]  # kept, with its own reason
    if spec is None:
        return replace(choices[0], spec=None, why=f"allocated {budget}: 16 bits are worth it")
    mine = next((choice for choice in choices if choice.spec == spec), replace(choices[0], spec=spec))
    beside = "around a plan" if found.base else "alone"
    return replace(mine, why=f"allocated {budget}: score {found.of(mine.site, spec):.1f} {beside}")
