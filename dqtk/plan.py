"""From intent to fact: a ``Recipe`` (ordered rules) becomes a ``Plan`` (every site, its spec, and why; ``decide.py``).

A plan costs nothing to make, is plain JSON, and is all that the later verbs read. Its ``hash`` covers what changes numbers (sites
and specs), not the words that explain them.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .numerics.packing import book_shape
from .numerics.storage import layer_bytes
from .sites import ROLES, AttentionSite, Site
from .spec import (
    AttentionSpec,
    ByLevel,
    LayerSpec,
    SiteSpec,
    VectorCodebook,
    canonical,
    describe,
    describe_attention,
    did_you_mean,
    from_json,
    frozen,
    shared_forms,
    to_json,
)

FORMAT_VERSION = 1


@frozen
class Rule:
    """``spec`` (``None``: keep 16 bits) for the sites that match. A rule with a pattern must match something.

    pattern: glob on ``path`` or ``component:path``. roles: role names. Both given: both must match. Neither: every site. A rule
    with an ``AttentionSpec`` is for attentions of denoisers, one with another spec for layers, and one without is for both.
    """

    spec: SiteSpec | AttentionSpec | None
    why: str
    pattern: str | None = None
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            raise ValueError(
                f"Rule: roles must be a tuple of names, got {self.roles!r}. A tuple of one is written ({self.roles!r},)."
            )
        for role in self.roles:
            if role not in ROLES:
                raise ValueError(f"Rule: roles must be among {', '.join(ROLES)}, got {role!r}.{did_you_mean(role, ROLES)}")

    def matches(self, site: Site) -> bool:
        if isinstance(self.spec, AttentionSpec):
            return False
        return (self.pattern is None or site.matches(self.pattern)) and (not self.roles or site.role in self.roles)

    def matches_attention(self, site: AttentionSite) -> bool:
        wanted = isinstance(self.spec, AttentionSpec) or (self.spec is None and self.pattern is not None and not self.roles)
        return wanted and (self.pattern is None or site.matches(self.pattern))


@frozen
class Recipe:
    """A named intent. The first rule that matches a site decides; a site that no rule matches keeps 16 bits."""

    name: str
    rules: tuple[Rule, ...]

    def main_spec(self) -> SiteSpec | None:
        """The spec of an ordinary linear layer: that of the last rule for layers."""
        specs = [rule.spec for rule in self.rules if not isinstance(rule.spec, AttentionSpec)]
        return specs[-1] if specs else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The decision for one site."""

    site: Site
    spec: SiteSpec | None
    why: str

    @property
    def bytes_before(self) -> int:
        """Weight at 16 bits."""
        return self.site.num_weights * 2

    @property
    def bytes_after(self) -> int:
        """Everything that the layer stores itself (shared books: ``Plan.book_bytes``), or the 16-bit weight."""
        if self.spec is None:
            return self.bytes_before
        return layer_bytes(self.spec, self.site.n, self.site.k, self.site.channels)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionChoice:
    """The decision for one attention."""

    site: AttentionSite
    spec: AttentionSpec | None
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """Totals of one component: class name, number of parameters (all of them, sites or not)."""

    name: str
    class_name: str
    num_parameters: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Every site of every planned component with its spec and reason; attentions where a rule speaks of them."""

    recipe: str
    components: tuple[Component, ...]
    choices: tuple[Choice, ...]
    attention: tuple[AttentionChoice, ...] = ()

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for a group of layers whose shared books would have two forms."""
        _ = self.books

    @property
    def decisions(self) -> "tuple[Choice | AttentionChoice, ...]":
        """Choices of layers, then of attentions."""
        return (*self.choices, *self.attention)

    @property
    def hash(self) -> str:
        """First 16 hex digits of SHA-256 over sites and specs."""
        sites: list[Any] = [[c.site.id, c.site.shape, canonical(c.spec)] for c in self.choices]
        sites += [[c.site.id, "attention", canonical(c.spec)] for c in self.attention]
        text = json.dumps(sites, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def books(self) -> dict[tuple[str, str], VectorCodebook]:
        """The books that layers share, by component and group. Raises ``ValueError`` for two forms under one name."""
        found: dict[tuple[str, str], VectorCodebook] = {}
        for choice in self.choices:
            for form in shared_forms(choice.spec):
                assert form.group is not None
                if found.setdefault((choice.site.component, form.group), form) != form:
                    other = found[choice.site.component, form.group]
                    raise ValueError(
                        f"plan: layers of group {form.group!r} must share books of one form, got {form} at {choice.site.id} "
                        f"and {other}. Give one of them another group."
                    )
        return found

    def book_bytes(self, component: str) -> int:
        """Bytes of the books that layers of a component share; no choice counts them."""
        return sum(2 * math.prod(book_shape(form)) for (name, _), form in self.books.items() if name == component)

    @property
    def needs_stats(self) -> bool:
        """Whether calibration must see something first: ranges, or inputs to learn from."""
        return any(c.spec is not None and c.spec.needs_stats for c in self.decisions)

    def of(self, component: str) -> "Plan":
        """The part that concerns one component."""
        return replace(
            self,
            components=tuple(c for c in self.components if c.name == component),
            choices=tuple(c for c in self.choices if c.site.component == component),
            attention=tuple(c for c in self.attention if c.site.component == component),
        )

    def sizes(self, component: str) -> dict[str, float]:
        """``bytes_before`` and ``bytes_after`` (what stays, at bf16), ``quantized_share`` of the ``num_parameters``."""
        total = next(c.num_parameters for c in self.components if c.name == component)
        mine = [c for c in self.choices if c.site.component == component]
        quantized = sum(c.site.num_weights for c in mine if c.spec is not None)
        before = total * 2
        after = before + sum(c.bytes_after - c.bytes_before for c in mine) + self.book_bytes(component)
        return {"bytes_before": before, "bytes_after": after, "quantized_share": quantized / max(total, 1), "num_parameters": total}

    def explain(self, sites: bool = True) -> str:
        """A table of every site (or of roles only) and totals per component against bf16."""
        from .explain import explain

        return explain(self, sites=sites)

    def diff(self, other: "Plan") -> list[str]:
        """One line per site whose spec differs: ``id: old -> new``."""
        mine, theirs = ({c.site.id: c.spec for c in plan.decisions} for plan in (self, other))
        lines = []
        for site in dict.fromkeys([*mine, *theirs]):
            if site in mine and site in theirs and mine[site] == theirs[site]:
                continue
            a, b = (_described(part[site]) if site in part else "absent" for part in (mine, theirs))
            if a == b:  # the short names do not show where they differ
                a, b = (canonical(part[site]) for part in (mine, theirs))
            lines.append(f"{site}: {a} -> {b}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """JSON-clean data; equal specs are written once."""
        texts = {canonical(c.spec): c.spec for c in self.decisions if c.spec is not None}
        names = {text: f"s{i}" for i, text in enumerate(texts)}
        return {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe,
            "hash": self.hash,
            "components": [asdict(c) for c in self.components],
            "specs": {names[text]: to_json(spec) for text, spec in texts.items()},
            "choices": [
                {"site": asdict(c.site), "spec": None if c.spec is None else names[canonical(c.spec)], "why": c.why}
                for c in self.choices
            ],
        } | (
            {
                "attention": [
                    {"site": asdict(c.site), "spec": None if c.spec is None else names[canonical(c.spec)], "why": c.why}
                    for c in self.attention
                ]
            }
            if self.attention
            else {}
        )

    @staticmethod
    def from_json(data: Mapping[str, Any], where: str = "plan") -> "Plan":
        """Inverse of ``to_json``. Raises ``ValueError`` for a newer version, unknown fields or a hash that does not fit."""
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"{where}: format_version must be {FORMAT_VERSION}, got {version!r}. Update dqtk to read newer plans.")
        try:
            plan = Plan._parse(data, where)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{where}: plan must have the fields that to_json writes, got: {error}. Make the plan again."
            ) from error
        if plan.hash != data.get("hash"):
            raise ValueError(
                f"{where}: hash must be {plan.hash} for these choices, got {data.get('hash')}. "
                "The file was edited; make the plan again."
            )
        return plan

    @staticmethod
    def _parse(data: Mapping[str, Any], where: str) -> "Plan":
        specs = {name: from_json(spec, f"{where}: specs.{name}") for name, spec in data["specs"].items()}

        def named(row: Mapping[str, Any], kinds: tuple[type, ...]) -> Any:
            spec = None if row["spec"] is None else specs.get(row["spec"])
            if row["spec"] is not None and not isinstance(spec, kinds):
                known = sorted(name for name, each in specs.items() if isinstance(each, kinds))
                raise ValueError(
                    f"{where}: spec of {row['site']['id']} must be one of {known}, got {row['spec']!r}. Make the plan again."
                )
            return spec

        choices = [
            Choice(
                site=Site(**{**row["site"], "shape": tuple(row["site"]["shape"])}),
                spec=named(row, (LayerSpec, ByLevel)),
                why=row["why"],
            )
            for row in data["choices"]
        ]
        attention = [
            AttentionChoice(site=AttentionSite(**row["site"]), spec=named(row, (AttentionSpec,)), why=row["why"])
            for row in data.get("attention", ())
        ]
        components = tuple(Component(**c) for c in data["components"])
        return Plan(recipe=data["recipe"], components=components, choices=tuple(choices), attention=tuple(attention))


def _described(spec: SiteSpec | AttentionSpec | None) -> str:
    return describe_attention(spec) if isinstance(spec, AttentionSpec) else describe(spec)
