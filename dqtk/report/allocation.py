"""The page of an allocation: what each layer got, and what other budgets would buy (the Pareto front that the scores expect)."""

import math
from html import escape
from pathlib import Path
from typing import Any

from dqtk.allocate.from_plans import Made, Offers
from dqtk.allocate.frontier import Point, frontier
from dqtk.spec import kinds_of, weights_of

from .charts import Line, bits_chart, legend, line_chart
from .markup import number, row, section, table
from .numbers import DASH
from .page import blank_page, write_whole

_NOTE = (
    "Expected, if the noise powers of single layers add up. They do not quite: compare the plans that matter. "
    "The second line is the best of the plans that were chosen among, used for all layers, that fits into the budget."
)


def write_allocation(made: Made, path: Path, model: str, command: str = "") -> Path:
    """Write the page and return its path. ``model`` and ``command``: what was typed."""
    title = f"{model}: {made.plan.recipe}"
    words = f'<h1>{escape(title)}</h1><p class="verdict">{escape(_verdict(made))}</p>'
    body = [
        f'<header><p class="kicker">Bits per layer</p>{words}</header>',
        front_section(frontier(made.offers), made),
        section("bits", "Bits per layer", "", bits_chart(_sites(made))),
        section("command", "How to do it again", "", f"<pre>{escape(command)}</pre>") if command else "",
    ]
    return write_whole(path, blank_page(title, "\n".join(part for part in body if part)))


def front_section(points: list[Point], made: Made) -> str:
    """Chart and table of the front; nothing where there is none."""
    if not points:
        return ""
    drawn = front_chart(points, made) + legend(front_lines(points))
    rows = [
        row(_budget(p.budget, made), [number(_decibels(p.expected)), number(DASH if p.single is None else _decibels(p.single))])
        for p in points
    ]
    columns = ("budget", "a width for each layer, dB", "the best single plan, dB")
    return section("scores", "What other budgets would buy", _NOTE, drawn + table("budgets", columns, rows))


def front_lines(points: list[Point]) -> list[Line]:
    """What the program's answers and single plans are expected to score."""
    return [
        Line(label="a width for each layer", style="own", values=tuple(point.expected for point in points)),
        Line(label="the best single plan", style="same", values=tuple(math.inf if p.single is None else p.single for p in points)),
    ]


def front_chart(points: list[Point], made: Made | Offers) -> str:
    """These over the budget, in its unit."""
    names = [f"{float(_budget(point.budget, made).partition(' ')[0]):.3g}" for point in points]
    unit = _budget(points[0].budget, made).partition(" ")[2]
    return line_chart("SQNR over the budget", unit, "expected SQNR, dB", front_lines(points), names)


def _budget(cost: float, made: Made | Offers) -> str:
    return made.budget.words(cost, made.num_weights)


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "exact"


def _verdict(made: Made) -> str:
    spent = f"{_budget(made.cost, made)} of {_budget(made.offers.total, made)}"
    return spent if made.expected is None else f"{spent}; expected SQNR of the output {made.expected:.1f} dB"


def _sites(made: Made) -> list[dict[str, Any]]:
    """As ``bits_chart`` reads them."""
    return [
        {
            "id": choice.site.id,
            "shape": choice.site.shape,
            "why": choice.why,
            "weight_bits": sum(weight[0].weight.bits for weight in weights_of(choice.spec)) if choice.spec else None,
            "input_bits": min((spec.input.bits for spec in kinds_of(choice.spec) if spec.input), default=None),
        }
        for choice in made.plan.choices
    ]
