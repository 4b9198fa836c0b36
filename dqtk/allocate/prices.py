"""What a site costs with a spec, in the unit of a budget."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

from torch import nn

from dqtk.calibrate.answers import outputs
from dqtk.calibrate.replay import Call
from dqtk.costs import CostTable, LayerShape, shape_of
from dqtk.numerics.storage import layer_bytes
from dqtk.sites import Site
from dqtk.spec import ByLevel, SiteSpec

FULL = 16  # bits of a weight or an input that stays as it is

Calls = Mapping[str, Sequence[LayerShape]]


def price(site: Site, spec: SiteSpec | None, unit: str, *, calls: Calls | None = None, table: CostTable | None = None) -> float:
    """Cost of a site; spec None: it stays at 16 bits.

    Args:
        site: whose weights are counted.
        spec: what happens to it.
        unit: "bits" and "bytes": all that the layer stores, scales and branches too. "bops": multiplications of one step, times
            the bits of both factors. "ms": milliseconds of one step. Both are means over a run where the noise level decides.
        calls: site id -> shapes in which one step calls it; needed for "bops".
        table: measured times; needed for "ms".
    Raises:
        ValueError: no calls or table where they are needed, a site that no step reached, a spec that was not timed, a step
            policy whose shares of a run are not known.
    """
    if unit in ("bits", "bytes"):
        stored = 2 * site.num_weights if spec is None else layer_bytes(spec, site.n, site.k, site.channels)
        return stored * (8 if unit == "bits" else 1)
    if isinstance(spec, ByLevel):
        how: Any = {"calls": calls, "table": table}
        return sum(share * price(site, part, unit, **how) for part, share in zip(spec.specs, spec.widths, strict=True))
    if unit == "bops":
        if calls is None or site.id not in calls:
            raise ValueError(f"allocate: {site.id} must be called in a step for a budget in BOPs, got no call. Measure it again.")
        widths = (FULL, FULL) if spec is None else (spec.weight.bits, FULL if spec.input is None else spec.input.bits)
        return sum(shape.operations / 2 for shape in calls[site.id]) * widths[0] * widths[1]
    if table is None:
        raise ValueError(
            "allocate: a budget in ms must come with a cost table, got none. Write it with dqtk bench --layers --output."
        )
    return table.milliseconds(site, spec)


def shapes_of_a_step(parts: Mapping[str, nn.Module], kept: Sequence[Call], sites: Iterable[Site]) -> dict[str, list[LayerShape]]:
    """Site id -> the shapes in which the first kept step of its component calls it."""
    found: dict[str, list[LayerShape]] = {}

    def hook(name: str) -> Callable:
        def see(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            found.setdefault(name, []).append(shape_of(layer, args[0] if args else kwargs["input"]))

        return see

    with ExitStack() as hooks:
        for site in sites:
            layer = parts[site.component].get_submodule(site.path)
            hooks.callback(layer.register_forward_pre_hook(hook(site.id), with_kwargs=True).remove)
        for component, part in parts.items():
            mine = [call for call in kept if call.component == component]
            outputs(part, list(takewhile(lambda call: call.time == mine[0].time, mine)))  # noqa: B023
    return found
