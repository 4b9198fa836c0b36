"""The main path: plan, (calibrate,) quantize, save, load.

``quantize`` streams: one layer's weight is read, solved, packed and swapped before the next is touched, so the peak is a few
layers above the model. Recipes that learn from the inputs of the original keep it whole until all is solved: their packed layers
come on top, and ``sequential`` does without. Whatever can be wrong with the model is found before the first layer is touched;
whatever interrupts it later, the model is told which layers were really replaced: saving it then is still true.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .attention.choose import ChosenAttention, choose, passes, place_attention
from .calibrate import Stats, calibrate
from .calibrate.answers import exact_outputs
from .calibrate.gather import calls_of
from .calibrate.intervals import settled
from .calibrate.run import check_model, fingerprint
from .checkpoint import FORMAT_VERSION, quantized_layers, replace_layer, save_module, written_whole
from .checks import (
    batch_for,
    check_asked,
    check_free_group,
    check_kept_calls,
    check_layer,
    check_numbers,
    check_runs,
    layer_of,
    numbers_of,
    taught,
    touched,
)
from .correct.output import check_correctable, correct_output
from .decide import resolve
from .hosts import backend_of
from .methods.solve import Solution
from .nn import Quantized, forget_books, place_books, runtime_class
from .nn.attention import Blocks, check_free, check_packages
from .plan import Choice, Plan, Recipe, Rule
from .policy import StepPolicy, combined, fixed_choices
from .processes import ALONE, Processes, processes
from .recipes import ATTENTION, attention_named, recipe_named, with_density
from .refine.judge import Painter
from .refine.refine import needs_originals, needs_pictures, refined
from .resolve import adapters, embedded_folder, embedded_names
from .sites import DENOISERS, Site, components_of, find_attention, find_sites
from .solved import SolvedFolder, calibrate_together
from .sources import model_class, readable, stored_dtype
from .spec import AttentionSpec, ByLevel, LayerSpec, Refiner, SiteSpec, canonical, shared_forms
from .stages import shared_books, solutions

STATS = "stats.safetensors"  # in a checkpoint folder
MAX_MEMORY = 2 * 2**30  # bytes of second moments held at a time
BATCH_SIZE = 4  # prompts of a calibration run


def plan(
    target: Any,
    recipe: str | Recipe,
    *,
    text_encoders: str | Recipe | None = None,
    overrides: Mapping[str, SiteSpec | AttentionSpec | str | None] | None = None,
    policy: StepPolicy | None = None,
    attention: AttentionSpec | str | None = None,
    density: float | None = None,
) -> Plan:
    """Decide what happens to every site. Costs nothing; works on the meta device.

    Args:
        target: pipeline or bare denoiser.
        recipe: name or ``Recipe`` for the denoisers.
        text_encoders: the same for text encoders; None leaves them as they are.
        overrides: glob on the site's path -> spec, recipe name, or None (keep 16 bits); before the recipe's rules, in order. An
            ``AttentionSpec`` is for the attentions (modules, such as ``*.attn1``) that its glob matches.
        policy: intervals of a run in which the denoisers have another precision. Overrides are for all intervals.
        attention: how denoisers attend to themselves: a spec or its name (``recipes.ATTENTION``), where overrides do not say. The
            same in all intervals of a policy.
        density: share of the blocks of attention that are computed, of an attention (or a recipe that is one) given by name. None:
            its own, ``recipes.DENSITY``.
    Raises:
        ValueError: unknown recipe, a pattern that matches nothing, a model without sites, a density of nothing.
    """
    for name, value, kind, example in (
        ("overrides", overrides, Mapping, "{'*.to_q': None}"),
        ("policy", policy, StepPolicy, "dqtk.policy.protecting([(0, 0.1)])"),
    ):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"plan: {name} must be a {kind.__name__}, got {value!r}. For example {example}.")
    recipe, wanted = with_density(recipe, attention, density)
    parts = components_of(target)
    denoisers = [name for name in parts if name == "model" or DENOISERS.fullmatch(name)]
    encoders = [name for name in parts if name not in denoisers]
    rules = [_override(pattern, wish) for pattern, wish in (overrides or {}).items()]
    if wanted is not None:
        rules.append(Rule(spec=wanted, why="attention by request"))
    theirs = [] if text_encoders is None else _matching(rules, parts, encoders)
    mine = [rule for rule in rules if rule not in theirs or _matching([rule], parts, denoisers)]
    how: dict[str, Any] = {"only": denoisers, "overrides": mine, "adapters": adapters()}
    made = resolve(_recipe(recipe), target, **how)
    if policy is not None:
        others = [None if part.recipe is None else resolve(_recipe(part.recipe), target, **how) for part in policy.intervals]
        made = combined(made, list(zip(policy.intervals, others, strict=True)))
    if text_encoders is not None:
        if not encoders:
            raise ValueError(
                f"plan: text_encoders must be None for a target without text encoders, got {text_encoders!r}. Leave it out."
            )
        more = resolve(_recipe(text_encoders), target, only=encoders, overrides=theirs)
        made = Plan(
            recipe=f"{made.recipe}, text encoders {more.recipe}",
            components=made.components + more.components,
            choices=made.choices + more.choices,
            attention=made.attention,
        )
    if not any(choice.spec for choice in made.decisions):
        done = sum(isinstance(layer, Quantized) for part in parts.values() for layer in part.modules())
        reason = next((choice.why for choice in made.choices if choice.site.unsupported), "every site is kept")
        said = f"{done} layers are quantized already. Load the original model." if done else f"{reason}. Change the recipe."
        raise ValueError(f"plan: target must have something to quantize, got {len(made.choices)} sites: {said}")
    return made


_make_plan = plan  # quantize has an argument of that name


def _recipe(recipe: str | Recipe) -> Recipe:
    if isinstance(recipe, str):
        return recipe_named(recipe)
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"plan: recipe must be a name or a Recipe, got {recipe!r}. "
            "Of one LayerSpec: Recipe(name='mine', rules=(Rule(spec=spec, why='mine'),))."
        )
    return recipe


def _matching(rules: Sequence[Rule], parts: Mapping[str, nn.Module], names: Sequence[str]) -> list[Rule]:
    """The rules that match some site of these components."""
    sites = [site for name in names for site in find_sites(parts[name], name)]
    places = [
        place for name in names if name == "model" or DENOISERS.fullmatch(name) for place in find_attention(parts[name], name)
    ]
    return [
        rule
        for rule in rules
        if any(rule.matches(site) for site in sites) or any(rule.matches_attention(place) for place in places)
    ]


def _override(pattern: str, wish: SiteSpec | AttentionSpec | str | None) -> Rule:
    if wish is None:
        return Rule(pattern=pattern, spec=None, why="kept by request")
    spec: Any = wish
    if isinstance(wish, str):
        spec = attention_named(wish) if wish in ATTENTION else recipe_named(wish).main_spec()
    if not isinstance(spec, LayerSpec | ByLevel | AttentionSpec):
        kinds = "a LayerSpec, an AttentionSpec, a recipe's name or None"
        raise ValueError(f"plan: override of {pattern!r} must be {kinds}, got {wish!r}. Wrap it.")
    return Rule(pattern=pattern, spec=spec, why="set by request")


def quantize(
    target: Any,
    plan: Plan | Recipe | str,
    stats: Stats | str | os.PathLike | None = None,
    *,
    prompts: Sequence[str] | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    sequential: bool = False,
    max_memory: int = MAX_MEMORY,
    correct: bool = False,
    refine: Refiner | None = None,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
) -> Any:
    """Replace planned layers by packed ones, in place, layer by layer.

    Args:
        target: pipeline or bare denoiser with real weights.
        plan: a plan, or a recipe (name) to plan with.
        stats: calibration result or its file; needed by plans with static inputs and by what learns from inputs.
        prompts: calibrate with these when ``stats`` is missing.
        call_kwargs: pipeline arguments for calibrating, for the times of a run and for a judge on pictures, over those that its
            family needs.
        sequential: solvers that learn from inputs see those of the model as it is quantized so far, not of the original. Inputs
            that are NaN are then found when their block's turn comes; the blocks before it stay quantized.
        max_memory: bytes that the second moments of inputs may take at a time; more means fewer replays of the kept calls.
        correct: correct the denoisers' outputs by a gain and a shift per noise level and channel, where calls that they were not
            fitted on confirm them (``correct/output.py``).
        refine: train the quantized denoisers on what the original answers to the kept calls (``refine/``), as a whole or block by
            block, before ``correct``; kept only where calls that were not learned from, or a judge, confirm it.
        checkpoint: folder for what takes long: the calibration, layers that learned from inputs, the state of ``refine``. An
            interrupted run goes on from it, with the same result. Processes of ``torchrun`` or ``accelerate launch`` that are
            given the same folder share the layers and the calls of distillation, and each ends with the whole.
        progress: show a bar.
    Returns:
        ``target``.
    Raises:
        ValueError: the plan does not fit the model, statistics are missing, a policy's times cannot be found, ``refine`` asks what
            layers or kept calls cannot give, or a weight is packed already, NaN, infinite, integer or on the meta device. Nothing
            was changed then.
    """
    made = plan if isinstance(plan, Plan) else _make_plan(target, plan)
    folder = None if checkpoint is None else Path(checkpoint)
    me = ALONE if folder is None else processes()
    asked: dict[str, Any] = {"correct": correct, "refine": refine, "sequential": sequential, "max_memory": max_memory}
    check_asked(target, made, **asked, checkpoint=folder, world=me.world, call_kwargs=call_kwargs)
    if isinstance(stats, str | os.PathLike):
        stats = Stats.load(Path(stats))
    if stats is not None and not isinstance(stats, Stats):
        raise ValueError(f"quantize: stats must be Stats or their file, got {type(stats).__name__}. Prompts are prompts=[...].")
    parts = components_of(target)
    students = {name: parts[name] for name in taught(made)} if correct or refine is not None else {}
    if (made.needs_stats or students) and stats is None:
        how: dict[str, Any] = {"call_kwargs": call_kwargs, "keep_calls": bool(students), "progress": progress}
        how["batch_size"] = batch_for(len(prompts or ()), BATCH_SIZE, bool(students))
        if students and prompts is not None:
            check_runs(made, prompts, how["batch_size"])
        stats = _calibrated(target, made, prompts, folder, me, **how)
    work = [choice for choice in made.choices if choice.spec is not None]
    if made.needs_stats and stats is not None:
        check_model(stats, target, made)
        work = settled(work, stats)
    work = fixed_choices(work, target, prompts, call_kwargs)
    for choice in work:
        check_layer(layer_of(parts, choice), choice, stats)
    check_packages((choice.spec for choice in made.attention), "quantize")
    for choice in work:
        check_free_group(parts[choice.site.component], choice)
    for place in (choice.site for choice in made.attention if choice.spec is not None):
        check_free(parts[place.component].get_submodule(place.path), place.id, "quantize")
    exact = exact_outputs(students, stats) if stats is not None else {}
    if correct and stats is not None:
        check_correctable(students, stats, exact)
    if refine is not None and stats is not None:
        check_kept_calls(students, work, stats, refine)
    painted = needs_pictures(refine)
    painter = None if painted is None else Painter(target, painted, call_kwargs, me)
    kept = None
    if folder is not None and stats is not None and made.needs_stats and not sequential:
        kept = SolvedFolder(folder / "solved", _task(target, made, work, stats), me)
    attention = _chosen_attention(parts, made, stats, progress=progress)
    learned = partial(shared_books, parts, work, stats)
    books = learned() if kept is None else kept.books(learned)
    originals: dict[str, dict[str, nn.Module]] = {name: {} for name in touched(made)}
    try:
        with tqdm(total=len(work), desc="quantize", unit="layer", disable=not progress) as bar:
            solving: dict[str, Any] = {"sequential": sequential, "max_memory": max_memory, "solved": bar.update, "kept": kept}
            for solved in solutions(parts, work, stats, **solving, books=books):
                for choice, solution in solved:
                    if needs_originals(refine):
                        originals[choice.site.component][choice.site.path] = layer_of(parts, choice)
                    _install(parts[choice.site.component], choice.site, solution, books.get(choice.site.component, {}))
        for chosen in attention:
            place_attention(parts[chosen.site.component], chosen)
        if refine is not None and stats is not None:
            for name, part in students.items():
                calls = calls_of(stats.calls, name)
                teaching: dict[str, Any] = {"name": name, "folder": folder, "progress": progress, "painter": painter, "team": me}
                refined(part, refine, calls, exact[name], originals[name], **teaching)
        if correct and stats is not None:
            for name, part in students.items():
                correct_output(part, stats, name, exact[name])
    finally:
        for name in touched(made):
            _make_saveable(parts[name], made.recipe)
    return target


def _task(target: Any, plan: Plan, work: Sequence[Choice], stats: Stats) -> dict[str, Any]:
    """What decides the solved layers. Specs are those with their noise levels fixed."""
    specs = hashlib.sha256(json.dumps([[choice.site.id, canonical(choice.spec)] for choice in work]).encode()).hexdigest()[:16]
    return {
        "format_version": FORMAT_VERSION,
        "plan": plan.hash,
        "recipe": plan.recipe,
        "specs": specs,
        "model": fingerprint(target, plan),
        "stats": stats.run or stats.digest(),
    }


def _chosen_attention(parts: Mapping[str, nn.Module], plan: Plan, stats: Stats | None, *, progress: bool) -> list[ChosenAttention]:
    """Orders and masks of all planned attentions, from the original model."""
    found: list[ChosenAttention] = []
    for name in dict.fromkeys(choice.site.component for choice in plan.attention):
        wanted = {c.site: c.spec for c in plan.of(name).attention if c.spec is not None}
        learns = any(spec.needs_stats for spec in wanted.values())
        calls = calls_of(stats.calls, name) if learns and stats is not None else []
        with tqdm(
            total=passes(wanted.values()) * len(calls),
            desc="attention",
            unit="call",
            disable=not (progress and calls),
        ) as bar:
            found += choose(parts[name], calls, wanted, progress=bar.update)
    return found


def _calibrated(target: Any, plan: Plan, prompts: Sequence[str] | None, folder: Path | None, me: Processes, **how: Any) -> Stats:
    """Statistics of the sites of a plan on these prompts. Raises ``ValueError`` without prompts, and for weights that are NaN."""
    if prompts is None or isinstance(target, nn.Module):
        if not plan.needs_stats:
            raise ValueError(
                "quantize: correct and refine must have calls of the original to learn from, got no prompts. Pass prompts=[...], "
                "or stats=dqtk.calibrate(pipe, prompts, plan, keep_calls=True)."
            )
        remedy = "Pass prompts=[...], or stats=dqtk.calibrate(pipe, prompts, plan)."
        if isinstance(target, nn.Module):
            remedy = (
                "Pass the pipeline that it is part of; where there is none, take a recipe that needs no statistics, such as w8a8."
            )
        raise ValueError(f"quantize: recipe {plan.recipe!r} must have statistics of its inputs, got none. {remedy}")
    parts = components_of(target)
    for choice in plan.choices:
        if choice.spec is not None:
            check_numbers(choice.site.id, *numbers_of(layer_of(parts, choice)))
    if folder is None:
        return calibrate(target, prompts, plan, **how)
    return calibrate_together(target, prompts, plan, folder / STATS, me, **how)


def _install(module: nn.Module, site: Site, solution: Solution, books: Mapping[str, Tensor]) -> None:
    """Put the runtime layer of a solution where the layer was; before the first of a component, all its shared books."""
    layer = runtime_layer(module.get_submodule(site.path), solution)
    place_books(module, books, layer.qweight.device)
    replace_layer(module, site.path, layer)


@torch.no_grad()
def runtime_layer(layer: Any, solution: Solution) -> Any:
    """The layer that takes the place of a linear or convolution, on its device and in its compute dtype."""
    kind: Any = runtime_class(layer)
    new = kind.like(layer, solution.spec, device="meta")
    device, bias = layer.weight.device, layer.bias
    if bias is not None and solution.bias_shift is not None:
        bias = (bias.float() + solution.bias_shift.to(device)).to(bias.dtype)
    new.fill({name: tensor.to(device) for name, tensor in solution.tensors.items()}, bias)
    if bias is None:
        new.anchor = nn.Parameter(torch.empty(0, dtype=layer.weight.dtype, device=device), requires_grad=False)
    return new


def _make_saveable(module: nn.Module, recipe: str) -> None:
    """Say in the model what it is now, whatever interrupted the work: its layers, and the books that some of them read."""
    read = {form.group for layer in quantized_layers(module).values() for form in shared_forms(layer.spec) if form.group}
    forget_books(module, but=read)
    backend = backend_of(module)
    if backend is not None and any(isinstance(layer, Quantized | Blocks) for layer in module.modules()):
        backend.attach(module, recipe)


def save(pipe: Any, path: str | os.PathLike) -> None:
    """``pipe.save_pretrained(path)`` that appears whole or not at all. Of a bare module: ``checkpoint.save_module``.

    Raises:
        ValueError: the folder exists and is not empty.
    """
    if not hasattr(pipe, "save_pretrained"):
        save_module(pipe, path)
        return
    with written_whole(path, "save") as folder:
        pipe.save_pretrained(folder)


def load(path: str | os.PathLike, **kwargs: Any) -> Any:
    """Load a saved pipeline, diffusers model or text encoder, or an embedded pipeline by its name; ``kwargs`` go to
    ``from_pretrained``.

    Without ``dtype`` it is the stored one for all parts. (diffusers' own default is float32 for denoisers and the stored one for
    text encoders, which do not fit together.)

    Raises:
        ValueError: not a diffusers folder; damaged, edited or newer files.
    """
    diffusers = importlib.import_module("diffusers")
    embedded = str(path) in embedded_names()
    if embedded and Path(path).is_dir():
        raise ValueError(f"load: {path} must be an embedded pipeline or a local folder, got both. Write {Path(path).absolute()}.")
    folder = embedded_folder(str(path)) if embedded else Path(path)
    with readable(f"load: {path}"):
        if not {"dtype", "torch_dtype"} & set(kwargs):
            kwargs["dtype"] = getattr(torch, stored_dtype(folder))
        if (folder / "model_index.json").is_file():
            return diffusers.DiffusionPipeline.from_pretrained(folder, **kwargs)
        if (folder / "config.json").is_file():
            return model_class(folder).from_pretrained(folder, **kwargs)
    raise ValueError(
        f"load: folder must hold model_index.json or config.json, got {folder}. Save with pipe.save_pretrained or dqtk.save."
    )
