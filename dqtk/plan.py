"""From intent to fact: a ``Recipe`` (ordered rules) becomes a ``Plan`` (every site, its spec, and why).

A plan costs nothing to make, is plain JSON, and is all that the later verbs read. Its ``hash`` covers what changes numbers (sites
and specs), not the words that explain them.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .numerics.hadamard import block_size
from .numerics.packing import book_shape, stored_bytes
from .numerics.storage import layer_bytes
from .numerics.vector_grid import width_of
from .sites import DENOISERS, ROLES, TEXT_ENCODERS, Adapter, AttentionSite, Site, components_of, find_attention, find_sites
from .spec import (
    GROUPS,
    ROLE,
    RTN,
    AttentionSpec,
    ByLevel,
    ConstantToken,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerLevel,
    PerTensor,
    PerToken,
    ShortcutSplit,
    SiteSpec,
    TensorSpec,
    Transform,
    VectorCodebook,
    canonical,
    describe,
    describe_attention,
    did_you_mean,
    each_of,
    from_json,
    frozen,
    shared_forms,
    to_json,
    weights_of,
    without,
)

FORMAT_VERSION = 1

MAX_LEARNED_INPUTS = 16384  # of a layer: its second moments take 2 GiB
MANY_WORDS = 256  # of a book: above, small layers and groups would be smaller at 8 bits


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


def resolve(
    recipe: Recipe,
    target: Any,
    *,
    only: Iterable[str] | None = None,
    overrides: Sequence[Rule] = (),
    adapters: Mapping[str, Adapter] | None = None,
) -> Plan:
    """Apply a recipe to a pipeline or module.

    Args:
        recipe: rules.
        target: pipeline or ``nn.Module``; the meta device is fine.
        only: component names; default all denoisers and text encoders.
        overrides: rules that come before the recipe's own.
        adapters: denoiser class name -> adapter.
    Raises:
        ValueError: a pattern that matches nothing, an explicit wish for an unsupported layer, nothing to quantize.
    """
    parts = components_of(target)
    wanted = list(parts) if only is None else list(only)
    for name in wanted:
        if name not in parts:
            raise ValueError(f"plan: components must be among {', '.join(parts)}, got {name!r}.{did_you_mean(name, parts)}")
    sites, keeps, places = [], [], []
    for name in wanted:
        if name == "model" or DENOISERS.fullmatch(name):
            places += find_attention(parts[name], name)
        adapter = (adapters or {}).get(type(parts[name]).__name__)
        sites += find_sites(parts[name], name, adapter)
        keeps += [Rule(pattern=f"{name}:{glob}", spec=None, why=why) for glob, why in (adapter.keep if adapter else ())]
    rules = (*overrides, *keeps, *recipe.rules)
    _check_patterns([*overrides, *recipe.rules], sites, places)
    choices = _worth_their_books([_choose(site, rules, explicit=len(overrides)) for site in sites])
    components = tuple(
        Component(name=name, class_name=type(parts[name]).__name__, num_parameters=sum(p.numel() for p in parts[name].parameters()))
        for name in wanted
    )
    attention: tuple[AttentionChoice, ...] = ()
    if any(isinstance(rule.spec, AttentionSpec) for rule in rules):
        attention = tuple(_choose_attention(site, rules) for site in places)
        if not attention:
            raise ValueError(
                "plan: attention must be left out for a model that has none with a processor, got a rule for it. Remove it."
            )
    return Plan(recipe=recipe.name, components=components, choices=choices, attention=attention)


def check_fit(plan: Plan, parts: Mapping[str, Any], where: str = "quantize") -> None:
    """Raises ``ValueError`` that names the first component or site of a plan that is not in the model."""
    for component in plan.components:
        if component.name not in parts:
            raise ValueError(
                f"{where}: plan must be for components {sorted(parts)}, got {component.name}. Make a plan for this model."
            )
        shapes = {site.id: site.shape for site in find_sites(parts[component.name], component.name)}
        for site in (choice.site for choice in plan.choices if choice.site.component == component.name):
            if shapes.get(site.id) != site.shape:
                raise ValueError(
                    f"{where}: plan must fit the model at {site.id}: {site.shape}, got {shapes.get(site.id)}. "
                    "Make a plan for this model."
                )
        known = set(find_attention(parts[component.name], component.name)) if plan.attention else set()
        for place in (choice.site for choice in plan.attention if choice.site.component == component.name):
            if place not in known:
                raise ValueError(
                    f"{where}: plan must fit the model at {place.id}, an attention of {place.heads} heads, got none. "
                    "Make a plan for this model."
                )


def _check_patterns(rules: Iterable[Rule], sites: Sequence[Site], places: Sequence[AttentionSite]) -> None:
    for rule in rules:
        if rule.pattern is None or any(rule.matches_attention(place) for place in places):
            continue
        if isinstance(rule.spec, AttentionSpec):
            raise ValueError(
                f"plan: pattern must match at least one of {len(places)} attentions, got {rule.pattern!r}."
                f"{did_you_mean(rule.pattern.strip('*.'), [place.path for place in places])}"
            )
        if not any(site.matches(rule.pattern) for site in sites):
            wish = rule.pattern.strip("*.")
            length = wish.count(".") + 1
            ends = dict.fromkeys(".".join(site.path.split(".")[-length:]) for site in sites)
            near = did_you_mean(wish, [*ends, *(site.path for site in sites)])
            raise ValueError(
                f"plan: pattern must match at least one of {len(sites)} sites, got {rule.pattern!r}."
                f"{near or ' Patterns are globs on the names that explain lists.'}"
            )


def _choose_attention(site: AttentionSite, rules: Sequence[Rule]) -> AttentionChoice:
    for rule in rules:
        if rule.matches_attention(site):
            assert rule.spec is None or isinstance(rule.spec, AttentionSpec)
            return AttentionChoice(site=site, spec=rule.spec, why=rule.why)
    return AttentionChoice(site=site, spec=None, why="no rule")


def _choose(site: Site, rules: Sequence[Rule], explicit: int) -> Choice:
    for i, rule in enumerate(rules):
        if not rule.matches(site):
            continue
        if rule.spec is None:
            return Choice(site=site, spec=None, why=rule.why)
        if site.unsupported:
            if i < explicit:
                raise ValueError(
                    f"plan: {site.id} must be an ordinary linear or convolution to be quantized, got: {site.unsupported}. "
                    "Keep it at 16 bits."
                )
            return Choice(site=site, spec=None, why=f"not supported: {site.unsupported}")
        assert not isinstance(rule.spec, AttentionSpec)  # matches layers only
        spec, note = fit(rule.spec, site)
        return Choice(site=site, spec=spec, why=f"{rule.why}; {note}" if note else rule.why)
    return Choice(site=site, spec=None, why="no rule")


def fit(spec: SiteSpec, site: Site) -> tuple[SiteSpec, str]:
    """Adjust a spec to what a layer admits, with a note that says so (empty when nothing changed)."""
    notes: list[str] = []
    if isinstance(spec, ByLevel) and TEXT_ENCODERS.fullmatch(site.component):
        notes.append("one spec: runs once, before there is noise")
        spec = spec.longest
    adjusted = each_of(spec, lambda part: _fit(part, site, notes))
    return adjusted, "; ".join(dict.fromkeys(notes))  # weight and input may have the same to say, and so may kinds


def _fit(spec: LayerSpec, site: Site, notes: list[str]) -> LayerSpec:
    spec = _fit_vectors(_of_role(spec, site), site, notes)
    spec = replace(spec, weight=_fit_group(spec.weight, site, "8 bit per channel", notes))
    if spec.input is not None and isinstance(spec.input.granularity, GROUPS):
        given = _fit_group(spec.input, site, "8 bit per token", notes)
        spec = replace(spec, input=given)
    if spec.input is not None and isinstance(spec.input.granularity, PerLevel) and TEXT_ENCODERS.fullmatch(site.component):
        spec = replace(spec, input=replace(spec.input, granularity=PerTensor()))
        notes.append("one range: runs once, before there is noise")
    if site.kind == "conv" and ConstantToken() in spec.transforms:
        spec = without(spec, ConstantToken)
        notes.append("no constant token: convolution")
    if site.kind == "conv" and spec.low_rank is not None:
        spec = replace(spec, low_rank=None)
        notes.append("no low-rank branch: convolution")
    if spec.low_rank is not None and spec.low_rank.rank > min(site.n, site.k):
        most = min(site.n, site.k)
        notes.append(f"rank {most}: {spec.low_rank.rank} is more than the layer has")
        spec = replace(spec, low_rank=replace(spec.low_rank, rank=most))
    if site.channels % 4 and any(isinstance(transform, Hadamard) for transform in spec.transforms):
        spec = without(spec, Hadamard)
        notes.append(f"not rotated: {site.channels} channels are no multiple of 4")
    if ShortcutSplit not in {type(transform) for transform in spec.transforms}:  # parts have blocks of their own
        spec = replace(spec, transforms=tuple(_fit_block(transform, site, notes) for transform in spec.transforms))
    if spec.needs_moments and site.k > MAX_LEARNED_INPUTS:
        spec = replace(spec, solver=RTN(), low_rank=None)
        notes.append(f"rounded to nearest: second moments of {site.k} inputs would take {8 * site.k**2 / 2**30:.1f} GiB")
    if spec.correct_bias and not site.bias:
        spec = replace(spec, correct_bias=False)
        notes.append("no bias to correct")
    return spec


def _fit_block(transform: Transform, site: Site, notes: list[str]) -> Transform:
    """A rotation in blocks that divide the channels and have a matrix: what would be used anyway, said."""
    if not isinstance(transform, Hadamard) or transform.block is None:
        return transform
    size = block_size(site.channels, transform.regular, transform.block)
    if size == transform.block:
        return transform
    kind = "regular blocks" if transform.regular else "blocks"
    notes.append(f"rotated in blocks of {size}: {site.channels} channels have no {kind} of {transform.block}")
    return replace(transform, block=size)


def _of_role(spec: LayerSpec, site: Site) -> LayerSpec:
    """The group of shared books with the layer's role in its name, where a rule left it open."""
    form = spec.weight.format
    if not isinstance(form, VectorCodebook) or form.group is None:
        return spec
    group = form.group.replace(ROLE, site.role.replace(".", "_"))
    return replace(spec, weight=replace(spec.weight, format=replace(form, group=group)))


def _fit_vectors(spec: LayerSpec, site: Site, notes: list[str]) -> LayerSpec:
    """Vectors whose length divides the channels, and whose books are worth it; else 8 bits per channel, rounded to nearest."""
    length, form = width_of(spec.weight), spec.weight.format
    if site.channels % length:
        notes.append(f"8 bit per channel: vectors of {length} do not divide {site.channels} channels")
    elif isinstance(form, VectorCodebook) and _outweighed(spec.weight, site):
        notes.append(f"8 bit per channel: with its own {form.words} words of {length} the layer would take more")
    else:
        return spec
    return _eight_bits(spec)


def _eight_bits(spec: LayerSpec) -> LayerSpec:
    return replace(spec, weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()), solver=RTN())


def _outweighed(tensor: TensorSpec, site: Site) -> bool:
    """Whether a layer with many words of its own would be larger than at 8 bits."""
    form = tensor.format
    many = isinstance(form, VectorCodebook) and form.group is None and form.words > MANY_WORDS
    return many and stored_bytes(tensor, site.n, site.k) > site.n * site.k


def _worth_their_books(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Groups of layers that would be larger with their many shared words than at 8 bits become 8 bits per channel, and say so."""
    sharing: dict[tuple[str, VectorCodebook], list[tuple[Site, TensorSpec]]] = {}
    for choice in choices:
        for part in () if choice.spec is None else (weight[0] for weight in weights_of(choice.spec)):
            form = part.weight.format
            if isinstance(form, VectorCodebook) and form.group is not None:
                sharing.setdefault((choice.site.component, form), []).append((choice.site, part.weight))
    notes = {}
    for (component, form), layers in sharing.items():
        stored = sum(stored_bytes(tensor, site.n, site.k) for site, tensor in layers) + 2 * math.prod(book_shape(form))
        if form.words > MANY_WORDS and stored > sum(site.n * site.k for site, _ in layers):
            many = f"{len(layers)} layers" if len(layers) > 1 else "one layer"
            what = f"group {form.group!r}, {many} with {form.words} words of {form.length}, would take more"
            notes[component, form] = f"8 bit per channel: {what}"
    return tuple(_without_books(choice, notes) for choice in choices)


def _without_books(choice: Choice, notes: Mapping[tuple[str, VectorCodebook], str]) -> Choice:
    mine = {form: note for (component, form), note in notes.items() if component == choice.site.component}
    said = [mine[form] for form in shared_forms(choice.spec) if form in mine]
    if choice.spec is None or not said:
        return choice
    spec = each_of(choice.spec, lambda part: _eight_bits(part) if part.weight.format in mine else part)
    return replace(choice, spec=spec, why="; ".join([choice.why, *said]))


def _fit_group(tensor: TensorSpec, site: Site, otherwise: str, notes: list[str]) -> TensorSpec:
    """A group size that divides the channels: half or a quarter of the wish, else ``otherwise``."""
    granularity = tensor.granularity
    if not isinstance(granularity, GROUPS) or site.channels % granularity.size == 0:
        return tensor
    wish = granularity.size
    size = next((s for s in (wish // 2, wish // 4) if s >= 8 and s % 8 == 0 and site.channels % s == 0), None)
    if size is not None and (size >= 16 or isinstance(granularity, E8M0Group | E4M3Group)):
        notes.append(f"groups of {size}: {wish} does not divide {site.channels} channels")
        return replace(tensor, granularity=replace(granularity, size=size))
    eight = Int(bits=8) if isinstance(tensor.format, Int) else Float()
    notes.append(f"{otherwise}: no group of {wish} or its half or quarter divides {site.channels} channels")
    if isinstance(tensor.range, Dynamic):
        return TensorSpec(format=eight, granularity=PerToken(), range=Dynamic())
    return replace(tensor, format=eight, granularity=PerChannel())
