"""From the program's answer to a better one, judged as a whole: ratios between the groups' budgets, then exchanges of levels.

MixDQ (arXiv 2405.17873, section 4.3) sweeps the ratio and takes the best by one picture. Here every answer is judged by the
denoiser's error on calls that no layer was scored on, and the best few by pictures of several prompts. Exchanges (``switching.py``)
are judged on some of these calls and taken only if the others confirm them.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .from_plans import Made, Offers
from .groups import Ratios, others_of, say_ratios
from .switching import switched
from .whole import Picked, decibels

RATIOS = tuple(np.linspace(0.46, 1.36, 10).round(2).tolist())  # MixDQ's, for weights
FEWER = RATIOS[::3]  # where two groups have one each
FINALISTS = 4
ONE = "one program"

Judgement = Callable[..., float]  # (picked, limit) -> loss of the whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A plan that was looked at: SQNR in dB on calls that no layer was scored on, and score of pictures if it came so far."""

    name: str
    made: Made
    sqnr: float
    pictures: float | None


def swept(offers: Offers) -> dict[str, Made]:
    """Name -> the different answers for one program (where all losses are of one kind) and for every ratio that can be met.

    Raises ``ValueError`` where none can.
    """
    answers: dict[str, Made] = {}
    ratios: list[Ratios | None] = [*([None] if offers.alike else []), *_tried(others_of(offers.groups))]
    refused: ValueError | None = None
    for ratio in ratios:
        try:
            made = offers.allocated(ratio)
        except ValueError as error:  # a group's share is below its least possible
            refused = refused or error
            continue
        if all(made.picked != other.picked for other in answers.values()):
            answers[ONE if ratio is None else say_ratios(ratio)] = made
    if not answers:
        assert refused is not None
        raise refused
    return answers


def _tried(names: list[str]) -> list[Ratios]:
    """Ratios of the groups beside the rest."""
    values = RATIOS if len(names) < 2 else FEWER
    return [dict(zip(names, each, strict=True)) for each in itertools.product(values, repeat=len(names))] if names else []


def ranked(answers: Mapping[str, Made], noise: Judgement, pictures: Judgement) -> list[Entry]:
    """The best first: the four with the least noise by their pictures, the others behind them by noise."""
    losses = {name: noise(made.picked) for name, made in answers.items()}
    order = sorted(answers, key=lambda name: losses[name])
    scores = {name: pictures(answers[name].picked) for name in order[:FINALISTS]}
    order = [*sorted(scores, key=lambda name: scores[name]), *order[FINALISTS:]]
    return [
        Entry(name=name, made=answers[name], sqnr=decibels(losses[name]), pictures=-scores[name] if name in scores else None)
        for name in order
    ]


def table(entries: list[Entry], score: str) -> str:
    """One line per plan, the best first."""
    lines = [f"ratio of a group's budget to that of the rest, SQNR of the output on other calls, {score}:"]
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        pictures = "" if entry.pictures is None else f"  {entry.pictures:.2f}"
        lines.append(f"  {entry.name:{width}} {entry.sqnr:6.2f} dB{pictures}")
    return "\n".join(lines)


def exchanged(
    offers: Offers,
    start: Made,
    noise: Judgement,
    confirm: Judgement,
    *,
    trials: int,
    seed: int = 0,
    told: Callable[[float], object] = lambda least: None,
) -> tuple[Made, str]:
    """The start, or what exchanges made of it if other calls say so too; and what happened, in words."""

    def loss(indices: Mapping[str, int], limit: float) -> float:
        return noise(offers.picked(indices), limit)

    first = offers.indices(start.picked)
    how: dict[str, Any] = {"trials": trials, "seed": seed, "told": told}
    found: Picked = offers.picked(switched(first, offers.candidates, max(offers.total, start.cost), loss, **how))
    moved = sum(found[site] != spec for site, spec in start.picked.items())
    before, after = confirm(start.picked), confirm(found)
    said = f"exchanges: {trials} tried, {moved} sites moved; SQNR on calls of the search {decibels(noise(start.picked)):.2f} -> "
    said += f"{decibels(noise(found)):.2f} dB, on others {decibels(before):.2f} -> {decibels(after):.2f} dB"
    if moved and after < before:
        return offers.chosen(offers.indices(found)), said
    return start, f"{said}; {'not confirmed: ' if moved else ''}the start stays"
