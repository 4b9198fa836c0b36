"""What is asked of an allocation: what goes together and what does not, what a search brings, and how each group is measured."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dqtk.calibrate import Stats
from dqtk.quantize import MAX_MEMORY
from dqtk.recipes import SEARCHES, Search, search_named
from dqtk.resolve import pair_score

from .budget import Budget, parse_budget
from .groups import CLIPS, PICTURES, Ratios, check_groups
from .parts import MOST, RunParts
from .probes import VIEWS, WHOLE, OutputSQNR, PictureScore, Probe

JUDGED = 8  # prompts that whole plans are judged on
SEARCHED = ("budget", "scores", "ratio", "sweep", "switch")  # what a search may bring


def wishes_of(search: Search, **given: Any) -> dict[str, Any]:
    """What a search brings where nothing is ``given``, by the names of ``SEARCHED``."""
    return {
        "budget": given["budget"] or Budget(amount=search.bits, unit="bits"),
        "scores": given["scores"] or dict(search.scores),
        "ratio": given["ratio"],
        "sweep": given["sweep"] or (search.sweep and given["ratio"] is None),
        "switch": search.switch if given["switch"] is None else given["switch"],
    }


def wanted(budget: str | Budget | None) -> Budget:
    """A budget from what was given. Raises ``ValueError`` for none."""
    if budget is None:
        raise ValueError("allocate: budget must be given where there is no search, got none. For example 4.5bits.")
    return budget if isinstance(budget, Budget) else parse_budget(budget)


def check_scored(scores: Mapping[str, Any], search: str | None, *, clips: bool) -> None:
    """Raises ``ValueError`` for scores of groups that pictures (``clips``: clips) do not have; where a ``search`` brought them, the
    error names it."""
    (names, what), (others, other) = ((CLIPS, "clips"), (PICTURES, "pictures"))[:: 1 if clips else -1]
    own = dict(search_named(search).scores) if search is not None else {}
    if own and scores == own and set(own) <= set(others):
        searches = [name for name in SEARCHES if set(dict(search_named(name).scores)) <= set(names)]
        raise ValueError(
            f"allocate: the pipeline must make {other}, got one of {what}: search {search} is for {other}. "
            f"Take one of {', '.join(searches)}, or give scores of {', '.join(names)}."
        )
    check_groups(scores, names, what)


def check_wishes(
    budget: Budget,
    *,
    scores: Mapping[str, Any],
    ratio: float | Ratios | None,
    sweep: bool,
    switch: int | None,
    parts: int | None,
    weigh: bool,
    around: bool,
    costs: bool,
    prompts: bool,
) -> None:
    """Raises ``ValueError`` for what cannot be wished together; whether there are prompts, costs and another rest is enough."""
    if sweep and ratio is not None:
        raise ValueError("allocate: sweep must stand without ratio, got both. It tries them itself.")
    if parts is not None and not 2 <= parts <= MOST:
        raise ValueError(f"allocate: parts must be from 2 to {MOST}, or left out, got {parts}. Each multiplies the candidates.")
    if (parts is not None or weigh) and (not prompts or around):
        raise ValueError(
            "allocate: parts and weigh must come with prompts and without around, got other. Noise is weighed by what is painted, "
            "with the rest unquantized."
        )
    if parts is not None and (scores or sweep or switch):
        raise ValueError(
            "allocate: parts must stand without score, sweep and switch, got one. Only the denoiser's output is known for parts of "
            "a run."
        )
    if scores and ratio is None and not sweep:
        raise ValueError("allocate: score must come with ratio or sweep, got none. Scores of several kinds do not add up.")
    if painted(scores) and around:
        raise ValueError(
            "allocate: score of pictures must come without around, got both. Pictures are those of the whole pipeline."
        )
    if painted(scores) and not prompts:
        raise ValueError("allocate: score of pictures must come with prompts in place of stats, got none. Pictures need prompts.")
    if (budget.unit == "ms") != costs:
        raise ValueError(f"allocate: costs must come with a budget in ms and only then, got {budget}. See dqtk bench.")


def judges_among(prompts: Sequence[str] | None) -> list[str]:
    """The last of the prompts. Raises ``ValueError`` for too few."""
    if prompts is None or len(prompts) < JUDGED:
        raise ValueError(
            f"allocate: prompts must be at least {JUDGED} for sweep and switch, got {len(prompts or ())}. "
            "Fewer cannot rank plans, and statistics hold no others."
        )
    return list(prompts[-JUDGED:])


def painted(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Of the scores of groups those that need pictures or clips."""
    return {group: score for group, score in scores.items() if not (isinstance(score, str) and score in VIEWS)}


def scores_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Group -> name of a view of the denoiser's output, or a paired score, loaded by its name where it is given by name.

    Raises ``ValueError`` with a suggestion for an unknown name.
    """
    found: dict[str, Any] = {}
    for group, score in asked.items():
        found[group] = pair_score(score, also=tuple(VIEWS)) if group in painted(asked) and isinstance(score, str) else score
    return found


def probes_of(
    groups: Sequence[str],
    scores: Mapping[str, Any],
    parts: Mapping[str, nn.Module],
    stats: Stats,
    run: RunParts | None,
    pipe: Any,
    prompts: Sequence[str] | None,
    how: Mapping[str, Any],
    around: bool = False,
) -> dict[str, Probe]:
    """Group -> what measures it: the denoiser's output where no score is given; equal ones are one probe.

    Args:
        groups: all there are.
        scores: of ``scores_of``.
        parts, stats, run: as of ``OutputSQNR``.
        pipe, prompts, how: as of ``PictureScore``; needed for scores of pictures.
        around: whether layers are scored in copies of the parts, for which nothing is kept.
    """
    made: dict[Any, Probe] = {}
    for score in dict.fromkeys(scores.get(group, WHOLE.name) for group in groups):
        if isinstance(score, str):
            # Parts of a run are weighed by what noise of the whole output does; that of another view is not the same noise.
            beside = next((probe for probe in made.values() if isinstance(probe, OutputSQNR)), None)
            mine = run if score == WHOLE.name else None
            made[score] = OutputSQNR(parts, stats.calls, mine, VIEWS[score], 0 if around else MAX_MEMORY, beside)
        else:
            assert prompts is not None  # check_wishes
            other = next((probe for probe in made.values() if isinstance(probe, PictureScore)), None)
            made[score] = PictureScore(pipe, prompts, score, beside=other, **how)
    return {group: made[scores.get(group, WHOLE.name)] for group in groups}
