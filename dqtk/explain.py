"""A plan as text: what happens to every site and why, what stays at 16 bits, and what that saves."""

from collections import Counter
from dataclasses import replace
from typing import Any

from .ops import op_of, report_of, report_of_attention
from .plan import Plan
from .spec import AttentionSpec, SiteSpec, StaticBlocks, describe, describe_attention, kinds_of, shared_forms, weights_of


def human(num_bytes: float) -> str:
    """``1.50 GB``; decimal units, as file managers and hubs count."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Left-aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def explain(plan: Plan, sites: bool = True) -> str:
    """Tables of sites or roles, then totals per component against bf16."""
    blocks = [f"recipe {plan.recipe}, plan {plan.hash}"]
    for component in plan.components:
        mine = [c for c in plan.choices if c.site.component == component.name]
        blocks.append(f"{component.name} ({component.class_name}): {len(mine)} sites")
        if sites:
            rows = [
                [
                    c.site.path,
                    c.site.role,
                    "x".join(map(str, c.site.shape)),
                    describe(c.spec),
                    human(c.bytes_before),
                    human(c.bytes_after),
                    c.why,
                ]
                for c in mine
            ]
            blocks.append(table(["site", "role", "shape", "bits", "before", "after", "why"], rows))
        else:
            blocks.append(table(["role", "bits", "sites", "before", "after", "why"], _role_rows(mine)))
        if attention := [c for c in plan.attention if c.site.component == component.name]:
            blocks.append(table(["attention", "heads", "computed", "why"], _attention_rows(attention, sites)))
    blocks.append(totals(plan))
    blocks.append(runs(plan))
    return "\n\n".join(blocks)


def totals(plan: Plan) -> str:
    """One line per component and their sum: size against bf16, how many layers got which bits; then how attention is computed."""
    sizes = {component.name: plan.sizes(component.name) for component in plan.components}
    bits = {name: Counter(_widths(c.spec) for c in plan.of(name).choices) for name in sizes}
    if len(sizes) > 1:
        keys = ("bytes_before", "bytes_after", "num_parameters")
        total = {key: sum(size[key] for size in sizes.values()) for key in keys}
        quantized = sum(size["quantized_share"] * size["num_parameters"] for size in sizes.values())
        sizes["together"] = total | {"quantized_share": quantized / max(total["num_parameters"], 1)}
        bits["together"] = sum(bits.values(), Counter())
    rows = [
        [
            name,
            f"{size['num_parameters'] / 1e6:.2f} M",
            human(size["bytes_before"]),
            human(size["bytes_after"]),
            f"{size['bytes_after'] / size['bytes_before']:.3f}",
            f"{100 * (1 - size['quantized_share']):.1f} %",
            ", ".join(f"{num} at {' and '.join(map(str, widths))} bit" for widths, num in sorted(bits[name].items())),
        ]
        for name, size in sizes.items()
    ]
    text = table(["component", "parameters", "bf16", "quantized", "ratio", "left at 16 bit", "layers"], rows)
    books = [f"{name}: {_book(plan, name, group)}" for name, group in plan.books]
    return "\n".join([text, *books, *_attention_totals([choice.spec for choice in plan.attention if choice.spec is not None])])


def _attention_totals(specs: list[AttentionSpec]) -> list[str]:
    """A line for all that are computed alike; the share of their blocks, once calibration has found it, beside the wish."""
    alike: dict[str, list[AttentionSpec]] = {}
    for spec in specs:
        wish = replace(spec, mask=replace(spec.mask, computed=None)) if isinstance(spec.mask, StaticBlocks) else spec
        alike.setdefault(describe_attention(wish), []).append(spec)
    lines = []
    for how, each in sorted(alike.items(), key=lambda item: -len(item[1])):
        shares = [spec.mask.computed for spec in each if isinstance(spec.mask, StaticBlocks) and spec.mask.computed is not None]
        least, most = (f"{of(shares):.3f}" for of in (min, max)) if shares else ("", "")
        span = "" if least == most else f" ({least} to {most})"
        found = f"; {sum(shares) / len(shares):.3f} computed{span}" if shares else ""
        lines.append(f"attention: {len(each)} as {how}{found}")
    return lines


def _book(plan: Plan, component: str, group: str) -> str:
    """One line on a book that layers share; its bytes are in the totals and in no site."""
    form = plan.books[component, group]
    sharing = [c for c in plan.of(component).choices if any(form.group == group for form in shared_forms(c.spec))]
    size = human(2 * form.books * form.words * form.length)
    return f"books {group}: {form.books} of {form.words} words of {form.length}, {size} shared by {len(sharing)} layers"


def runs(plan: Plan) -> str:
    """What serves the quantized layers on which device; what is only emulated is called so."""
    ops = Counter(op for c in plan.choices for op in {op_of(spec, c.site.kind): 1 for spec in kinds_of(c.spec)})
    rows = []
    for device in ("cpu", "cuda"):
        for op, num in ops.most_common():
            rows.append([device, op, str(num), report_of(op, device)])
        attention = Counter(report_of_attention(c.spec, device, c.site.channels) for c in plan.attention if c.spec is not None)
        rows += [[device, "attention", str(num), report] for report, num in attention.most_common()]
    return table(["device", "op", "layers", "runs as"], rows)


def _attention_rows(choices: list[Any], sites: bool) -> list[list[str]]:
    """A row per attention, or per decision."""
    if sites:
        return [[c.site.path, str(c.site.heads), describe_attention(c.spec), c.why] for c in choices]
    groups = Counter((str(c.site.heads), describe_attention(c.spec), c.why) for c in choices)
    return [[f"{num} of them", *words] for words, num in groups.items()]


def _widths(spec: SiteSpec | None) -> tuple[int, ...]:
    """Bits of the weights that a layer stores: of several where a policy asks for them."""
    return (16,) if spec is None else tuple(sorted({weight[0].weight.bits for weight in weights_of(spec)}))


def _role_rows(choices: list[Any]) -> list[list[str]]:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for choice in choices:
        groups.setdefault((choice.site.role, describe(choice.spec), choice.why), []).append(choice)
    return [
        [role, bits, str(len(group)), human(sum(c.bytes_before for c in group)), human(sum(c.bytes_after for c in group)), why]
        for (role, bits, why), group in groups.items()
    ]
