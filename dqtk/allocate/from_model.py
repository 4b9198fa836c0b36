"""A plan from a model: its layers are measured on prompts, a program chooses within a budget, and whole plans are judged if asked
for. ``dqtk.allocate``, and behind the verb of that name.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from dqtk.calibrate import Stats, calibrate
from dqtk.calibrate.intervals import settled
from dqtk.calibrate.look import looked
from dqtk.calibrate.run import check_model
from dqtk.calibrate.schedule import run_times
from dqtk.calls import call_arguments, makes_clips
from dqtk.costs import CostTable
from dqtk.plan import Choice, Plan, Recipe
from dqtk.processes import ALONE, Processes
from dqtk.quantize import plan as make_plan
from dqtk.recipes import SEARCHES, recipe_named, search_named
from dqtk.resolve import pair_score
from dqtk.sites import components_of
from dqtk.spec import LayerSpec, canonical, kinds_of

from .budget import Budget
from .from_plans import Made, Offers
from .groups import Ratios, check_groups, groups_of
from .logs import write_sensitivity, write_sizes
from .parts import MOST, RunParts
from .prices import shapes_of_a_step
from .probes import PictureScore, Probe
from .reliability import describe_reliability
from .search import exchanged, ranked, swept, table
from .sensitivity import Sensitivity, check_own_books, dtypes, measure
from .weights import Counts, weighed, weights_of_parts
from .whole import Judge, Judged, Layers, OutputNoise, Pictures
from .wishes import JUDGED, SEARCHED, check_scored, check_wishes, judges_among, probes_of, scores_of, wanted, wishes_of

STEPS = 5  # of every pipeline run whose calls are kept
LEARNING = "w4a8"  # a recipe that makes calibrate keep calls
OTHER_NOISE = 1_000_003  # added to the seed: noises that no layer was scored on
WEIGHED = 2  # prompts by whose latents parts of a run are weighed
SCORE = "psnr"  # of their pictures


def allocate(
    pipe: Any,
    prompts: Sequence[str] | None,
    candidates: str | Recipe | Sequence[str | Recipe] = "auto",
    budget: str | Budget | None = None,
    *,
    keep: Sequence[str] = (),
    groups: Mapping[str, Sequence[str]] | None = None,
    scores: Mapping[str, Any] | None = None,
    ratio: float | Ratios | None = None,
    sweep: bool = False,
    switch: int | None = None,
    protect: float | None = None,
    around: Plan | Recipe | str | None = None,
    parts: int | None = None,
    weigh: bool = False,
    costs: CostTable | None = None,
    stats: Stats | None = None,
    judged_on: Sequence[str] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    folder: str | Path | None = None,
    me: Processes = ALONE,
    progress: bool = True,
) -> Made | None:
    """Measure every layer at every candidate, and choose within a budget: ``quantize(pipe, made.plan, made.stats)`` then.

    Args:
        pipe: pipeline, not quantized; as it was when this returns.
        prompts: layers are scored on calls that the pipeline makes for these; None: on those of ``stats``.
        candidates: recipes to choose among at every layer, or the name of a search (``auto``), which brings its own candidates,
            budget, score, sweep and exchanges where none are given here (``switch=0``: none at all).
        budget: such as "4.5bits" (stored, on average over all weights), "300MB", "2TBOPs" or, with ``costs``, "12ms".
        keep: patterns of layers that stay at 16 bits.
        groups: group -> patterns of its layers, over their roles: of "content" and "quality", for clips of "text", "temporal" and
            "spatial".
        scores: group -> how it is measured, against the unquantized pipeline: the name of a paired score of pictures or clips (or
            the score itself), "sqnr", or of clips "difference_sqnr"; a group without is measured by "sqnr".
        ratio: of each group but the last, its share of its cost at 16 bits over the last one's; None: one program for all.
        sweep: try ratios (ten, or sixteen of clips), and take the best by pictures.
        switch: exchanges of levels between layers to try then.
        protect: layers whose best score is below stay at 16 bits.
        around: what the rest of the model is while a layer is measured; None: unquantized.
        parts: of a run, 2 to 4: candidates with one stored weight, other inputs in each, are candidates too (``ByLevel``). Noise
            is weighed then.
        weigh: count noise in each quarter of a run as it harms the final latents of the first two prompts.
        costs: of layers, for a budget in ms.
        stats: in place of those that are taken of ``prompts``.
        judged_on: at least 8 prompts for ``sweep`` and ``switch``, with other noises; None: the last 8.
        call_kwargs: pipeline arguments.
        seed: prompt i starts from generator seed + i.
        batch_size: prompts per call.
        folder: journals of all that is measured; the same call goes on from it. None: a temporary one.
        me: of processes that share the measuring in one folder.
        progress: show bars, and print what was found on the way.
    Returns:
        The plan, what it was chosen from, and the statistics to quantize with. None in processes that are not the first.
    Raises:
        ValueError: wishes that cannot be met together, too few prompts, a budget below the least possible, a folder of another
            measurement.
    """
    if isinstance(candidates, str) and candidates in SEARCHES:
        wishes = wishes_of(search_named(candidates), budget=budget, scores=scores, ratio=ratio, sweep=sweep, switch=switch)
        budget, scores, ratio, sweep, switch = (wishes[name] for name in SEARCHED)
    recipes = _recipes(candidates)
    if not recipes:
        raise ValueError("allocate: candidates must be at least one recipe, got none. For example ['w4a8', 'w8a8'].")
    if folder is None and me.world > 1:
        raise ValueError(f"allocate: folder must be given where {me.world} processes share the work, got none. They meet in it.")
    asked = wanted(budget)
    judges = judges_among(judged_on or prompts) if sweep or switch else None
    given: dict[str, Any] = {"around": around is not None, "costs": costs is not None, "prompts": prompts is not None}
    given |= {"sweep": sweep, "switch": switch, "parts": parts, "weigh": weigh}
    check_wishes(asked, scores=scores or {}, ratio=ratio, **given)
    clips = makes_clips(pipe)
    check_scored(scores or {}, candidates if isinstance(candidates, str) and candidates in SEARCHES else None, clips=clips)
    loaded = scores_of(scores or {})
    overrides: dict[str, Any] = dict.fromkeys(keep)
    plans = [make_plan(pipe, recipe, overrides=overrides) for recipe in recipes]
    rest = around if isinstance(around, Plan | None) else make_plan(pipe, around, overrides=overrides)
    for each in (*plans, *([] if rest is None else [rest])):
        check_own_books(each)
    sites = [choice.site for choice in plans[0].choices]
    mine = groups_of(sites, groups, clips=clips)
    there = list(dict.fromkeys(mine.values()))
    check_groups(loaded, there, "this model that has layers")
    how: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "call_kwargs": call_arguments(pipe, call_kwargs)}
    run = _run_parts(parts, pipe, prompts, call_kwargs, weigh=weigh)
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory()), "measured") if folder is None else Path(folder)
        watching = _watching(pipe, [*plans, *([] if rest is None else [rest])], overrides)
        if stats is None:
            kept = beside(where, ".safetensors")
            seen = _calibrated(pipe, prompts, watching, kept, me, steps_per_run=_steps(parts), progress=progress, **how)
        else:
            check_model(stats, pipe, watching)
            seen = stats
        modules = {component.name: components_of(pipe)[component.name] for component in plans[0].components}
        plans = [answered(plan, modules, seen) for plan in plans]
        rest = None if rest is None else answered(rest, modules, seen)
        if parts is not None:
            _check_parts(run, seen)
        probes = probes_of(there, loaded, modules, seen, run, pipe, prompts, how, around=rest is not None)
        layers = Layers(modules) if me.first and (sweep or switch) else None
        found = _measured(pipe, plans, seen, probes, mine, where, rest, layers, me, progress=progress)
        if not me.first:
            return None
        counts = None
        if run is not None and prompts is not None:
            asking = (pipe, modules, plans, found, seen, len(run), prompts[:WEIGHED], call_kwargs)
            counts = Counts(run, weights_of_parts(*asking, where))
            found = weighed(found, counts.weights)
            if progress:
                print(_said(counts.weights))
        _write_logs(where, plans, found)
        offers = _offered(plans, found, asked, probes, mine, modules, seen, protect=protect, table=costs, parts=parts)
        if judges is None or layers is None:
            return replace(offers.allocated(ratio), stats=seen)
        layers.complete(plans, seen)
        start = None if sweep else offers.allocated(ratio)
        made = _searched(pipe, judges, offers, start, switch, layers, where, seen, overrides, counts, progress=progress, **how)
        return replace(made, stats=seen)


def _offered(
    plans: Sequence[Plan],
    found: Sensitivity,
    budget: Budget,
    probes: Mapping[str, Probe],
    groups: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    stats: Stats,
    **how: Any,
) -> Offers:
    """What the program chooses among; ``how``: more arguments of ``Offers.of``."""
    sites = [choice.site for choice in plans[0].choices]
    calls = shapes_of_a_step(modules, stats.calls, sites) if budget.unit == "bops" else None
    losses = {group: probe.loss for group, probe in probes.items()}
    alike = len({probe.name for probe in probes.values()}) == 1
    return Offers.of(plans, found, budget, losses, groups, calls=calls, alike=alike, **how)


def beside(folder: Path, more: str) -> Path:
    """The file or folder of that name with something behind it."""
    return folder.with_name(f"{folder.name}{more}")


def _searched(
    pipe: Any,
    prompts: Sequence[str],
    offers: Offers,
    start: Made | None,
    switch: int | None,
    layers: Layers,
    folder: Path,
    stats: Stats,
    overrides: Mapping[str, Any],
    counts: Counts | None,
    *,
    seed: int,
    batch_size: int,
    call_kwargs: Mapping[str, Any] | None,
    progress: bool,
) -> Made:
    """From a start, or the best of all ratios where there is none, by exchanges if asked for; what came out is printed."""
    how: dict[str, Any] = {"seed": seed + OTHER_NOISE, "batch_size": min(batch_size, JUDGED // 2), "call_kwargs": call_kwargs}
    learning = make_plan(pipe, LEARNING, overrides=overrides)
    output = beside(folder, "-judges.safetensors")
    kept = calibrate(pipe, prompts, learning, steps_per_run=STEPS, output=output, progress=progress, **how).calls
    half = (1 + max(call.run for call in kept)) // 2
    calls = {"search": [c for c in kept if c.run < half], "confirm": [c for c in kept if c.run >= half]}
    task = {"run": stats.run, "dtypes": dtypes(layers.parts)} | ({} if counts is None else {"weights": list(counts.weights)})

    def judged(name: str, judge: Judge) -> Judged:
        return Judged(layers, judge, beside(folder, f"-{name}"), task)

    search = judged("search", OutputNoise(layers.parts, calls["search"], counts=counts))
    if start is None:
        score = PictureScore(pipe, prompts, pair_score(SCORE), **(how | {"batch_size": batch_size}))
        entries = ranked(swept(offers), search, judged("pictures", Pictures(score)))
        if progress:
            print(table(entries, score.name))
        start = entries[0].made
    if switch:
        confirm = judged("confirm", OutputNoise(layers.parts, calls["confirm"], counts=counts))
        with tqdm(total=switch, desc="exchanges", unit="plan", disable=not progress) as bar:
            trials: dict[str, Any] = {"trials": switch, "seed": seed, "told": lambda least: bar.update()}
            start, said = exchanged(offers, start, search, confirm, **trials)
        if progress:
            print(said)
    return start


def _run_parts(
    parts: int | None, pipe: Any, prompts: Sequence[str] | None, call_kwargs: Mapping[str, Any] | None, *, weigh: bool
) -> RunParts | None:
    """As many as asked for; to weigh alone, as many as there may be."""
    if parts is None and not weigh:
        return None
    return RunParts.of_run(parts or min(MOST, len(run_times(pipe, prompts, call_kwargs))), pipe, prompts, call_kwargs)


def _said(weights: Sequence[float]) -> str:
    words = ", ".join(f"{weight:.2g}" for weight in weights)
    return f"noise counts by what it does to the final latents: {words} in {len(weights)} equal parts of a run"


def _check_parts(run: RunParts | None, stats: Stats) -> None:
    """Raises ``ValueError`` for parts of a run that no kept call lies in: they would seem to lose nothing."""
    assert run is not None
    seen = {run.of(call.time or 0.0) for call in stats.calls if call.level is not None}
    if len(seen) < len(run):
        raise ValueError(
            f"allocate: stats must have calls in each of {len(run)} parts of a run, got them in {len(seen)}. Calibrate with more "
            "steps, or leave parts out."
        )


def _steps(parts: int | None) -> int:
    """Of every run whose calls are kept: as many in each part."""
    return STEPS if parts is None else parts * math.ceil(STEPS / parts)


def _recipes(candidates: str | Recipe | Sequence[str | Recipe]) -> list[Recipe]:
    """Of a search its own. Raises ``ValueError`` for unknown names."""
    if isinstance(candidates, str) and candidates in SEARCHES:
        return list(search_named(candidates).candidates)
    names = [candidates] if isinstance(candidates, str | Recipe) else candidates
    return [name if isinstance(name, Recipe) else recipe_named(name) for name in names]


def _measured(
    pipe: Any,
    plans: Sequence[Plan],
    stats: Stats,
    probes: Mapping[str, Probe],
    groups: Mapping[str, str],
    folder: Path,
    rest: Plan | None,
    layers: Layers | None,
    me: Processes,
    *,
    progress: bool,
) -> Sensitivity:
    """``measure`` with a bar, and what it found said."""
    num = _num_scores(plans, around=rest is not None) // me.world
    with tqdm(total=num, desc="allocate", unit="score", disable=not (progress and me.first)) as bar:
        how: dict[str, Any] = {"layers": layers, "me": me, "told": lambda site: bar.update()}
        found = measure(pipe, plans, stats, probes, groups, folder=folder, around=rest, **how)
    if progress and me.first:
        print(describe_reliability(plans, found))
    return found


def _num_scores(plans: Sequence[Plan], *, around: bool) -> int:
    quantized = [choice for plan in plans for choice in plan.choices if choice.spec is not None]
    alone = len({(c.site.id, canonical(c.spec)) for c in quantized})
    return alone + (len({c.site.id for c in quantized}) if around else 0)


def _watching(pipe: Any, plans: Sequence[Plan], overrides: Mapping[str, Any]) -> Plan:
    """A plan by which calibration keeps calls, and ranges of the inputs for which some plan needs them."""
    learning = make_plan(pipe, LEARNING, overrides=overrides)
    kinds = ((c.site.id, spec) for plan in plans for c in plan.choices for spec in kinds_of(c.spec))
    static = {site: spec for site, spec in kinds if spec.needs_ranges}
    choices = []
    for choice in learning.choices:
        if (spec := static.get(choice.site.id)) is not None:
            spec = replace(choice.spec, input=spec.input) if isinstance(choice.spec, LayerSpec) else spec
        choices.append(choice if spec is None else replace(choice, spec=spec))
    return replace(learning, choices=tuple(choices))


def answered(plan: Plan, parts: Mapping[str, nn.Module], stats: Stats) -> Plan:
    """The plan with everything found that its specs leave to statistics and calls: what solving would find, so that it is the same
    spec that is scored, chosen and written down."""
    found = settled(plan.choices, stats)
    choices: list[Choice] = []
    for name, part in parts.items():
        choices += looked(part, stats.calls, [choice for choice in found if choice.site.component == name])[0]
    return replace(plan, choices=tuple(choices))


def _calibrated(
    pipe: Any, prompts: Sequence[str] | None, watching: Plan, output: Path, me: Processes, *, progress: bool, **run: Any
) -> Stats:
    """Kept calls and ranges. Of several processes the first one takes them; the others read its file."""
    if prompts is None:
        raise ValueError("allocate: prompts or stats must be given, got neither. Scores need calls.")
    if not me.first:
        me.wait()
    output.parent.mkdir(parents=True, exist_ok=True)
    stats = calibrate(pipe, prompts, watching, output=output, progress=progress and me.first, **run)
    if me.first:
        me.wait()
    return stats


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
