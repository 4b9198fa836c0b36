"""The verb ``dqtk allocate``: its two ways, from a log and from a model, as the options of the command line say."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dqtk.calibrate import Stats
from dqtk.calls import makes_clips
from dqtk.costs import CostTable
from dqtk.plan import Plan, Recipe
from dqtk.processes import processes
from dqtk.prompt_sets import read_prompts
from dqtk.quantize import plan as make_plan
from dqtk.recipes import of_width, recipe_named, search_named
from dqtk.resolve import embedded_names, embedded_prompts
from dqtk.sources import find_device, load_pipeline, meta_pipeline, pipeline_class, read_json, readable

from .from_logs import Chosen, allocate_from_logs
from .from_model import allocate
from .from_plans import Made
from .groups import Ratios, groups_of
from .logs import WIDTHS, read_sensitivity, read_sizes
from .wishes import SEARCHED, check_scored, check_wishes, judges_among, wanted, wishes_of

CHOICES = (2, 3, 4, 5, 6, 8)  # weight bits of a model's candidates; without 5 and 6, budgets there lost 2.6 and 4.0 dB
EMBEDDED = 12  # prompts where none are given: of 241 layers, scores on 8 were out of order at 14, on 12 at 6 (docs/allocation.md)
ASKED = (
    "budget",
    "keep",
    "groups",
    "scores",
    "ratio",
    "sweep",
    "switch",
    "protect",
    "parts",
    "weigh",
    "seed",
    "batch_size",
)
ONLY_WITH_A_MODEL = (
    *("search", "recipes", "input_widths", "around", "keep", "score"),
    *("sweep", "switch", "parts", "weigh", "costs", "stats", "prompts"),
)


def choices_from_logs(options: argparse.Namespace) -> Chosen:
    """Without a MODEL. Raises ``ValueError`` for options that only a MODEL has."""
    if options.budget is None:
        raise ValueError("allocate: --budget must be given, got none. For example 4.5bits.")
    for name, value in (("--sensitivity", options.sensitivity), ("--sizes", options.sizes)):
        if value is None:
            raise ValueError(f"allocate: {name} must be given where there is no MODEL, got none. Add it, or name a model.")
    for name in ONLY_WITH_A_MODEL:
        if getattr(options, name):
            raise ValueError(
                f"allocate: --{name.replace('_', '-')} must come with a MODEL, got none. A log holds names and numbers only."
            )
    scores = read_sensitivity(options.sensitivity, options.widths or WIDTHS)
    return allocate_from_logs(
        scores,
        read_sizes(options.sizes, scores),
        options.budget,
        loss=options.loss or "score",
        groups=_named(options.group, "--group", "PATTERN"),
        ratio=_ratio(options.ratio),
        protect=options.protect,
    )


def plan_from_model(
    options: argparse.Namespace, call_kwargs: Callable[[argparse.Namespace, Any], Mapping[str, Any]]
) -> Made | None:
    """With a MODEL: measure it, or go on measuring, and allocate. Also writes the scores as a log into NAME-sensitivity.

    Of several processes all measure, and the first one allocates; the others return None.
    """
    me = processes()
    options.groups, options.scores = _named(options.group, "--group", "PATTERN"), _named_once(options.score, "--score", "NAME")
    options.ratio = _ratio(options.ratio)
    candidates = _candidates(options)
    prompts = _check_options(options)
    keep: dict[str, Any] = dict.fromkeys(options.keep)
    meta = meta_pipeline(options.model)
    for recipe in candidates:
        make_plan(meta, recipe, overrides=keep)  # mistakes before weights are read
    sites = make_plan(meta, candidates[0], overrides=keep).choices
    kind = pipeline_class(options.model)
    if kind is not None:
        check_scored(options.scores, options.search, clips=makes_clips(kind))
        groups_of([choice.site for choice in sites], options.groups, clips=makes_clips(kind))
    around: Any = options.around
    if around is not None:
        stored = around.endswith(".json")
        around = Plan.from_json(read_json(around, "--around"), around) if stored else make_plan(meta, around, overrides=keep)
    costs = None if options.costs is None else CostTable.load(options.costs)
    pipe = load_pipeline(options.model, options.dtype, find_device(options.device) if options.device else me.device)
    stats = None
    if options.stats is not None:
        with readable(f"--stats: {options.stats}", "a file written by dqtk calibrate"):
            stats = Stats.load(options.stats)
    asked = {name: getattr(options, name) for name in ASKED}
    return allocate(
        pipe,
        prompts,
        candidates,
        around=around,
        costs=costs,
        stats=stats,
        judged_on=_judging(options) if options.sweep or options.switch else None,
        call_kwargs=call_kwargs(options, pipe),
        folder=options.output.with_name(f"{options.output.stem}-sensitivity"),
        me=me,
        **asked,
    )


def _judging(options: argparse.Namespace) -> list[str]:
    """The last prompts, of an embedded pipeline: of all its own."""
    own = options.model in embedded_names() and not options.prompts
    return judges_among(read_prompts([str(embedded_prompts(options.model))] if own else options.prompts, None))


def _candidates(options: argparse.Namespace) -> list[Recipe]:
    """What is chosen among. Of a search also its budget, score, sweep and exchanges become options where none are given."""
    if options.search is not None:
        for name in ("recipes", "widths", "input_widths"):
            if getattr(options, name):
                raise ValueError(f"allocate: --search must stand without --{name.replace('_', '-')}, got both. It has its own.")
        search = search_named(options.search)
        for name, value in wishes_of(search, **{name: getattr(options, name) for name in SEARCHED}).items():
            setattr(options, name, value)
        return list(search.candidates)
    wanted(options.budget)
    if options.recipes:
        return [recipe_named(name) for name in options.recipes]
    return [of_width(bits, given) for given in options.input_widths or [8] for bits in options.widths or CHOICES]


def _check_options(options: argparse.Namespace) -> list[str] | None:
    """The prompts to score on, None with statistics. Raises ``ValueError`` for options that cannot go together."""
    for name in ("sensitivity", "sizes", "loss"):
        if getattr(options, name):
            raise ValueError(f"allocate: --{name} must stand without a MODEL, got {options.model}. A model is measured.")
    if options.recipes and options.widths:
        raise ValueError("allocate: --recipes must stand without --widths, got both. A recipe has its own.")
    if options.input_widths and (options.recipes or options.budget.unit in ("bits", "bytes")):
        got = "--recipes too" if options.recipes else str(options.budget)
        raise ValueError(f"allocate: --input-widths must come with a budget in BOPs or ms, got {got}. Inputs are not stored.")
    if options.stats and options.prompts:
        raise ValueError("allocate: --stats must stand without --prompts, got both. Statistics have seen theirs.")
    given: dict[str, Any] = {name: getattr(options, name) for name in ("scores", "ratio", "sweep", "switch", "parts", "weigh")}
    given |= {"around": options.around is not None, "costs": options.costs is not None, "prompts": not options.stats}
    check_wishes(options.budget, **given)
    if options.stats and (options.sweep or options.switch):
        raise ValueError("allocate: --sweep and --switch must come with --prompts in place of --stats. They judge on other calls.")
    prompts = None if options.stats else _prompts(options)
    if options.sweep or options.switch:
        _judging(options)  # too few prompts are found before anything is measured
    return prompts


def _prompts(options: argparse.Namespace) -> list[str]:
    """As given, or some of an embedded pipeline's own."""
    if options.prompts:
        return read_prompts(options.prompts, options.num_prompts)
    if options.model in embedded_names():
        return read_prompts([str(embedded_prompts(options.model))], options.num_prompts or EMBEDDED)
    raise ValueError(f"allocate: --prompts or --stats must be given for {options.model}, got neither. Scores need calls.")


def _named(given: Sequence[str], flag: str, what: str) -> dict[str, list[str]]:
    """``NAME=VALUE`` texts as name -> its values."""
    found: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"allocate: {flag} must be GROUP={what}, got {text!r}. For example {_EXAMPLES[flag]}.")
        found.setdefault(name, []).append(value)
    return found


_EXAMPLES = {"--group": "content=*.ff.*", "--score": "content=ssim", "--ratio": "text=0.8"}


def _named_once(given: Sequence[str], flag: str, what: str) -> dict[str, str]:
    """One value per group."""
    named = _named(given, flag, what)
    for group, values in named.items():
        if len(values) > 1:
            raise ValueError(f"allocate: {flag} must be given once for a group, got {', '.join(values)} for {group}. Choose one.")
    return {group: values[0] for group, values in named.items()}


def _ratio(given: Sequence[str] | None) -> float | Ratios | None:
    """One number for every group but the last, or ``GROUP=NUMBER`` for each of them."""
    if given is None:
        return None
    try:
        if len(given) == 1 and "=" not in given[0]:
            return float(given[0])
        return {group: float(value) for group, value in _named_once(given, "--ratio", "NUMBER").items()}
    except ValueError as error:
        if str(error).startswith("allocate"):
            raise
        raise ValueError(
            f"allocate: --ratio must be a number, or GROUP=NUMBER, got {' '.join(given)!r}. For example 0.6."
        ) from error
