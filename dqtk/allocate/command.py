"""The verb ``dqtk allocate``: its two ways, from a log and from a model, as the options of the command line say."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from dqtk.calibrate import Stats, calibrate
from dqtk.calibrate.intervals import settled
from dqtk.calibrate.look import looked
from dqtk.calibrate.run import check_model
from dqtk.costs import CostTable
from dqtk.plan import Choice, Plan, Recipe
from dqtk.processes import processes
from dqtk.prompt_sets import read_prompts
from dqtk.quantize import plan as make_plan
from dqtk.recipes import of_width, recipe_named, search_named
from dqtk.resolve import embedded_names, embedded_prompts, scores
from dqtk.sites import components_of
from dqtk.sources import find_device, load_pipeline, meta_pipeline, read_json, readable
from dqtk.spec import LayerSpec, canonical, did_you_mean, kinds_of

from .budget import Budget
from .from_logs import Chosen, allocate_from_logs
from .from_plans import Made, Offers
from .groups import CONTENT, QUALITY, check_globs, group_of
from .logs import WIDTHS, read_sensitivity, read_sizes, write_sensitivity, write_sizes
from .prices import shapes_of_a_step
from .probes import OutputSQNR, PictureScore, Probe
from .reliability import describe_reliability
from .search import exchanged, ranked, swept, table
from .sensitivity import Sensitivity, dtypes, measure
from .whole import Judge, Judged, Layers, OutputNoise, Pictures

CHOICES = (2, 3, 4, 5, 6, 8)  # weight bits of a model's candidates; without 5 and 6, budgets there lost 2.6 and 4.0 dB
STEPS = 5  # of every pipeline run whose calls are kept
EMBEDDED = 4  # prompts where none are given
LEARNING = "w4a8"  # a recipe that makes calibrate keep calls
JUDGED = 8  # prompts that whole plans are judged on
OTHER_NOISE = 1_000_003  # added to the seed: noises that no layer was scored on
SCORE = "psnr"  # of their pictures
ONLY_WITH_A_MODEL = (
    *("search", "recipes", "input_widths", "around", "keep", "quality", "content_score"),
    *("sweep", "switch", "costs", "stats", "prompts"),
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
        content=options.content,
        ratio=options.ratio,
        protect=options.protect,
    )


def plan_from_model(
    options: argparse.Namespace, call_kwargs: Callable[[argparse.Namespace, Any], Mapping[str, Any]]
) -> Made | None:
    """With a MODEL: measure it, or go on measuring, and allocate. Also writes the scores as a log into NAME-sensitivity.

    Of several processes all measure, and the first one allocates; the others return None.
    """
    me = processes()
    recipes = _candidates(options)
    _check_options(options)
    keep: dict[str, Any] = dict.fromkeys(options.keep)
    plans = [
        make_plan(meta_pipeline(options.model), recipe, overrides=keep) for recipe in recipes
    ]  # mistakes before weights are read
    around = None if options.around is None else _around(options, keep)
    sites = [choice.site for choice in plans[0].choices]
    check_globs([*options.content, *options.quality], [site.id for site in sites])
    groups = {site.id: group_of(site, options.content, options.quality) for site in sites}
    costs = None if options.costs is None else CostTable.load(options.costs)
    folder = options.output.with_name(f"{options.output.stem}-sensitivity")
    folder.parent.mkdir(parents=True, exist_ok=True)
    pipe = load_pipeline(options.model, options.dtype, find_device(options.device) if options.device else me.device)
    kwargs = call_kwargs(options, pipe)
    watching = _watching(pipe, plans, keep)
    if not me.first:
        me.wait()  # for the first one's file
    stats = _stats(options, pipe, watching, kwargs, folder.with_name(f"{folder.name}.safetensors"))
    if me.first:
        me.wait()
    parts = {component.name: components_of(pipe)[component.name] for component in plans[0].components}
    plans = [_answered(plan, parts, stats) for plan in plans]
    probe = OutputSQNR(parts, stats.calls)
    probes: dict[str, Probe] = {CONTENT: _content(options, pipe, kwargs) or probe, QUALITY: probe}
    quantized = [choice for plan in plans for choice in plan.choices if choice.spec is not None]
    total = len({(c.site.id, canonical(c.spec)) for c in quantized}) + (
        0 if around is None else len({c.site.id for c in quantized})
    )
    layers = Layers(parts)
    with tqdm(total=total // me.world, desc="allocate", unit="score", disable=not me.first) as bar:
        how: dict[str, Any] = {"me": me, "told": lambda site: bar.update()}
        how |= {"layers": layers} if me.first and (options.sweep or options.switch) else {}
        found = measure(pipe, plans, stats, probes, groups, folder=folder, around=around, **how)
    if not me.first:
        return None
    print(describe_reliability(plans, found))
    _write_logs(folder, plans, found)
    calls = shapes_of_a_step(parts, stats.calls, sites) if options.budget.unit == "bops" else None
    losses = {group: probe.loss for group, probe in probes.items()}
    offers = Offers.of(plans, found, options.budget, losses, groups, protect=options.protect, calls=calls, table=costs)
    if not (options.sweep or options.switch):
        return offers.allocated(options.ratio)
    layers.complete(plans, stats)
    return _searched(options, pipe, kwargs, offers, layers, folder)


def _searched(
    options: argparse.Namespace, pipe: Any, kwargs: Mapping[str, Any], offers: Offers, layers: Layers, folder: Path
) -> Made:
    """Ratios and exchanges, as asked for; what came out is printed."""
    prompts = _judging(options)
    learning = make_plan(pipe, LEARNING, overrides=dict.fromkeys(options.keep))
    how: dict[str, Any] = {"seed": options.seed + OTHER_NOISE, "batch_size": min(options.batch_size, JUDGED // 2)}
    output = folder.with_name(f"{folder.name}-judges.safetensors")
    stats = calibrate(pipe, prompts, learning, call_kwargs=kwargs, steps_per_run=STEPS, output=output, **how)
    half = (1 + max(call.run for call in stats.calls)) // 2
    calls = {"search": [c for c in stats.calls if c.run < half], "confirm": [c for c in stats.calls if c.run >= half]}
    task = {"run": stats.run, "dtypes": dtypes(layers.parts)}

    def judged(name: str, judge: Judge) -> Judged:
        return Judged(layers, judge, folder.with_name(f"{folder.name}-{name}"), task)

    search = judged("search", OutputNoise(layers.parts, calls["search"]))
    start = None if options.sweep else offers.allocated(options.ratio)
    if start is None:
        score = PictureScore(pipe, prompts, scores()[SCORE], seed=how["seed"], batch_size=options.batch_size, call_kwargs=kwargs)
        entries = ranked(swept(offers), search, judged("pictures", Pictures(score)))
        print(table(entries, score.name))
        start = entries[0].made
    if options.switch:
        confirm = judged("confirm", OutputNoise(layers.parts, calls["confirm"]))
        with tqdm(total=options.switch, desc="exchanges", unit="plan") as bar:
            trials: dict[str, Any] = {"trials": options.switch, "seed": options.seed, "told": lambda least: bar.update()}
            start, said = exchanged(offers, start, search, confirm, **trials)
        print(said)
    return start


def _judging(options: argparse.Namespace) -> list[str]:
    """The last prompts, of an embedded pipeline: of all its own."""
    own = options.model in embedded_names() and not options.prompts
    found = read_prompts([str(embedded_prompts(options.model))], None) if own else read_prompts(options.prompts, None)
    if len(found) < JUDGED:
        raise ValueError(
            f"allocate: --prompts must be at least {JUDGED} for --sweep and --switch, got {len(found)}. Fewer cannot rank plans."
        )
    return found[-JUDGED:]


def _candidates(options: argparse.Namespace) -> list[Recipe]:
    """What is chosen among. Of a search also its budget, score, sweep and exchanges become options where none are given."""
    if options.search is not None:
        for name in ("recipes", "widths", "input_widths"):
            if getattr(options, name):
                raise ValueError(f"allocate: --search must stand without --{name.replace('_', '-')}, got both. It has its own.")
        search = search_named(options.search)
        options.budget = options.budget or Budget(amount=search.bits, unit="bits")
        options.content_score = options.content_score or search.content_score
        options.sweep = options.sweep or (search.sweep and options.ratio is None)
        options.switch = options.switch or search.switch
        return list(search.candidates)
    if options.budget is None:
        raise ValueError("allocate: --budget must be given where there is no --search, got none. For example 4.5bits.")
    if options.recipes:
        return [recipe_named(name) for name in options.recipes]
    return [of_width(bits, given) for given in options.input_widths or [8] for bits in options.widths or CHOICES]


def _around(options: argparse.Namespace, keep: Mapping[str, Any]) -> Plan:
    """The plan of the rest: that of a file, or of a recipe."""
    if options.around.endswith(".json"):
        return Plan.from_json(read_json(options.around, "--around"), options.around)
    return make_plan(meta_pipeline(options.model), recipe_named(options.around), overrides=keep)


def _check_options(options: argparse.Namespace) -> None:
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
    if options.sweep and options.ratio is not None:
        raise ValueError("allocate: --sweep must stand without --ratio, got both. It tries ten ratios.")
    if options.sweep or options.switch:
        if options.stats:
            raise ValueError(
                "allocate: --sweep and --switch must come with --prompts in place of --stats. They judge on other calls."
            )
        if options.prompts or options.model in embedded_names():
            _judging(options)  # too few prompts are found before anything is measured
    if options.content_score and options.ratio is None and not options.sweep:
        raise ValueError(
            "allocate: --content-score must come with --ratio or --sweep, got none. Two kinds of scores do not add up."
        )
    if options.content_score and options.around:
        raise ValueError(
            "allocate: --content-score must come without --around, got both. Pictures are those of the whole pipeline."
        )
    if options.content_score and options.stats:
        raise ValueError("allocate: --content-score must come with --prompts in place of --stats, got both. Pictures need prompts.")
    if (options.budget.unit == "ms") != (options.costs is not None):
        raise ValueError(f"allocate: --costs must come with a budget in ms and only then, got {options.budget}. See dqtk bench.")


def _watching(pipe: Any, plans: Sequence[Plan], keep: Mapping[str, Any]) -> Plan:
    """A plan by which calibration keeps calls, and ranges of the inputs for which some plan needs them."""
    learning = make_plan(pipe, LEARNING, overrides=keep)
    kinds = ((c.site.id, spec) for plan in plans for c in plan.choices for spec in kinds_of(c.spec))
    static = {site: spec for site, spec in kinds if spec.needs_ranges}
    choices = []
    for choice in learning.choices:
        if (spec := static.get(choice.site.id)) is not None:
            spec = replace(choice.spec, input=spec.input) if isinstance(choice.spec, LayerSpec) else spec
        choices.append(choice if spec is None else replace(choice, spec=spec))
    return replace(learning, choices=tuple(choices))


def _answered(plan: Plan, parts: Mapping[str, nn.Module], stats: Stats) -> Plan:
    """The plan with everything found that its specs leave to statistics and calls: what solving would find, so that it is the same
    spec that is scored, chosen and written down."""
    found = settled(plan.choices, stats)
    choices: list[Choice] = []
    for name, part in parts.items():
        choices += looked(part, stats.calls, [choice for choice in found if choice.site.component == name])[0]
    return replace(plan, choices=tuple(choices))


def _stats(options: argparse.Namespace, pipe: Any, watching: Plan, kwargs: Mapping[str, Any], output: Path) -> Stats:
    """Kept calls and ranges: from a file, or from prompts (of an embedded pipeline: its own)."""
    if options.stats is not None:
        with readable(f"--stats: {options.stats}", "a file written by dqtk calibrate"):
            stats = Stats.load(options.stats)
        check_model(stats, pipe, watching)
        return stats
    return calibrate(
        pipe,
        _prompts(options),
        watching,
        seed=options.seed,
        batch_size=options.batch_size,
        call_kwargs=kwargs,
        steps_per_run=STEPS,
        output=output,
    )


def _prompts(options: argparse.Namespace) -> list[str]:
    """As given, or some of an embedded pipeline's own."""
    if options.prompts:
        return read_prompts(options.prompts, options.num_prompts)
    if options.model in embedded_names():
        return read_prompts([str(embedded_prompts(options.model))], options.num_prompts or EMBEDDED)
    raise ValueError(f"allocate: --prompts or --stats must be given for {options.model}, got neither. Scores need calls.")


def _content(options: argparse.Namespace, pipe: Any, kwargs: Mapping[str, Any]) -> Probe | None:
    """The probe of the content group where it has a score of its own."""
    if options.content_score is None:
        return None
    known = {name: score for name, score in scores().items() if hasattr(score, "load")}
    if options.content_score not in known:
        near = did_you_mean(options.content_score, known)
        raise ValueError(f"allocate: --content-score must be one of {', '.join(known)}, got {options.content_score!r}.{near}")
    how: dict[str, Any] = {"seed": options.seed, "batch_size": options.batch_size, "call_kwargs": kwargs}
    return PictureScore(pipe, _prompts(options), known[options.content_score], **how)


def _write_logs(folder: Path, plans: Sequence[Plan], found: Sensitivity) -> None:
    """Scores and sizes in the form that --sensitivity reads: a column per plan, for the sites that have as many specs."""
    rows, sizes = {}, {}
    for choices in zip(*(plan.choices for plan in plans), strict=True):
        site, specs = choices[0].site, [choice.spec for choice in choices]
        if all(spec is not None for spec in specs) and len(set(specs)) == len(plans):
            rows[site.id] = {index: found.of(site, spec) for index, spec in enumerate(specs) if spec is not None}
            sizes[site.id] = site.num_weights
    write_sensitivity(folder / "scores.yaml", rows)
    write_sizes(folder / "sizes.yaml", sizes)
