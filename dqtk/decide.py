"""A recipe becomes a plan: at every site the first rule that matches decides, as far as the layer admits it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .fit import fit, worth_their_books
from .plan import AttentionChoice, Choice, Component, Plan, Recipe, Rule
from .sites import DENOISERS, Adapter, AttentionSite, Site, components_of, find_attention, find_sites
from .spec import AttentionSpec, did_you_mean


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
    choices = worth_their_books([_choose(site, rules, explicit=len(overrides)) for site in sites])
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
