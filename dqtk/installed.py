"""The plan that a quantized pipeline carries: read from its layers, not from what somebody once asked for."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from .attention.facts import facts_of
from .nn import Quantized
from .nn.attention import Blocks, blocks_of
from .plan import AttentionChoice, Choice, Component, Plan
from .resolve import adapters
from .sites import components_of, find_attention, find_sites
from .spec import describe, describe_attention, kinds_of, weights_of


def installed_plan(target: Any) -> Plan:
    """Every site of a (partly) quantized pipeline or module with the spec that is in place; components without any are left out."""
    components, choices, attention, recipes = [], [], [], []
    for name, part in components_of(target).items():
        layers = {path: layer for path, layer in part.named_modules() if isinstance(layer, Quantized)}
        blocks = blocks_of(part)
        if not (layers or blocks):
            continue
        config = getattr(getattr(part, "hf_quantizer", None), "quantization_config", None)
        recipes.append(getattr(config, "fields", {}).get("recipe", ""))
        components.append(Component(name=name, class_name=type(part).__name__, num_parameters=num_parameters(part)))
        for site in find_sites(part, name, adapters().get(type(part).__name__)):
            layer = layers.get(site.path)
            choices.append(Choice(site=site, spec=layer.spec if layer else None, why="quantized" if layer else "16 bit"))
        for place in find_attention(part, name) if blocks else ():
            found = blocks.get(place.path)
            why = "dense" if found is None else _density(found)
            attention.append(AttentionChoice(site=place, spec=found.spec if found else None, why=why))
    recipe = ", ".join(dict.fromkeys(r for r in recipes if r))
    return Plan(recipe=recipe, components=tuple(components), choices=tuple(choices), attention=tuple(attention))


def _density(blocks: Blocks) -> str:
    """How much is computed, as far as the configuration or calibration say, and what was asked for where that is another."""
    found = blocks.density() if blocks.spec.layout else math.nan
    if math.isnan(found):
        return "in blocks"
    wish = getattr(blocks.spec.mask, "density", found)
    return f"density {found:.3f}" + ("" if f"{found:.3f}" == f"{wish:.3f}" else f", {wish:g} asked for")


def num_parameters(module: nn.Module) -> int:
    """Logical parameters: packed weights count as the weights they stand for."""
    packed: list[Any] = [layer for layer in module.modules() if isinstance(layer, Quantized)]
    return sum(p.numel() for p in module.parameters()) + sum(layer.n * layer.k for layer in packed)


def summary(target: Any) -> dict[str, Any] | None:
    """Plain data for records and the report page; None when nothing is quantized."""
    plan = installed_plan(target)
    if not plan.components:
        return None
    parts = components_of(target)
    kernels = Counter(
        layer.kernel() for component in plan.components for layer in parts[component.name].modules() if isinstance(layer, Quantized)
    )
    return {
        "recipe": plan.recipe,
        "hash": plan.hash,
        "components": {
            component.name: {"class": component.class_name, **plan.sizes(component.name)} for component in plan.components
        },
        "sites": [
            {
                "id": choice.site.id,
                "role": choice.site.role,
                "shape": list(choice.site.shape),
                "weight_bits": sum(weight[0].weight.bits for weight in weights_of(choice.spec)) if choice.spec else None,
                "input_bits": min((spec.input.bits for spec in kinds_of(choice.spec) if spec.input), default=None),
                "spec": describe(choice.spec),
                "why": choice.why,
            }
            for choice in plan.choices
        ],
        "kernels": dict(kernels),
        "attention": _attention(plan, parts),
    }


def _attention(plan: Plan, parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every attention; those in blocks with what ``facts_of`` says, masks of the first, the middle and the last of them."""
    found = {name: blocks_of(part) for name, part in parts.items()}
    placed = [choice.site.id for choice in plan.attention if choice.spec is not None]
    drawn = {placed[i] for i in (0, len(placed) // 2, -1)} if placed else set()
    rows = []
    for choice in plan.attention:
        site = choice.site
        row = {"id": site.id, "heads": site.heads, "spec": describe_attention(choice.spec), "why": choice.why}
        blocks = found[site.component].get(site.path)
        if blocks is not None:
            device = next((p.device.type for p in parts[site.component].parameters()), "cpu")
            row |= facts_of(blocks, device, site.channels, with_mask=site.id in drawn)
        rows.append(row)
    return rows
