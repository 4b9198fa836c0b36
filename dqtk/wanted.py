"""What the flags of the command line ask for, as the library has it: what a plan is made of, steps to learn from, a refiner.

``arguments.py`` lists the flags; errors here name them, and are of what is wrong with any model: none has been looked for yet.
"""

import argparse
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .calibrate.placement import Around, Evenly, Every, Placement
from .policy import Interval, StepPolicy, protecting
from .recipes import ATTENTION, RECIPES, recipe_named, with_density
from .spec import Distill, Reconstruct, Refiner

# What makes a plan, and is refused where there is one already.
PLANNING = ("recipe", "text_encoders", "keep", "set", "during", "attention", "density")
_SHARE = r"(\d*\.?\d+)"
_PART = re.compile(rf"{_SHARE}-{_SHARE}(?:=(.+))?")


def flags_of(names: Sequence[str], last: str = "and") -> str:
    """``--keep, --set and --during``."""
    *some, end = (f"--{name.replace('_', '-')}" for name in names)
    return f"{', '.join(some)} {last} {end}" if some else end


def given(options: argparse.Namespace, names: Sequence[str]) -> bool:
    """Whether any of these flags was written."""
    return any(getattr(options, name) is not None and getattr(options, name) != [] for name in names)


def planning_of(options: argparse.Namespace) -> dict[str, Any]:
    """``PLANNING`` as arguments of ``dqtk.plan``. Raises ``ValueError`` without a recipe, and for names that are none."""
    if options.recipe is None:
        raise ValueError(f"--recipe must be one of {', '.join(RECIPES)}, got none. Add it.")
    overrides: dict[str, Any] = dict.fromkeys(options.keep)
    for wish in options.set:
        pattern, equals, name = wish.rpartition("=")
        if not equals:
            raise ValueError(f"--set must be PATTERN=RECIPE, got {wish!r}. For example --set '*.ff.*=w8a8'.")
        overrides[pattern] = name
    recipe, attention = options.recipe, options.attention
    if recipe in ATTENTION and attention is not None:
        raise ValueError(f"--attention must be left out with --recipe {recipe}, got {attention}. It is one already.")
    if options.density is not None and (attention or recipe) not in ATTENTION:
        raise ValueError("--density must come with --attention or --recipe paro-..., got it without. It is of their blocks.")
    policy = policy_of(options.during)
    parts = () if policy is None else policy.intervals
    of_layers = [("--text-encoders", options.text_encoders), *(("--during", part.recipe) for part in parts)]
    for flag, name in of_layers:
        if name in ATTENTION:
            raise ValueError(f"{flag} must name a recipe of layers, got {name}. Attention is of denoisers, and of a whole run.")
    for name in (recipe, *overrides.values(), *(name for _, name in of_layers)):
        if name is not None:
            recipe_named(name)
    with_density(recipe, attention, options.density)
    how = {"attention": attention, "density": options.density, "policy": policy}
    return {"recipe": recipe, "text_encoders": options.text_encoders, "overrides": overrides, **how}


def policy_of(parts: Sequence[str]) -> StepPolicy | None:
    """The step policy of ``--during`` BEGIN-END[=RECIPE], each a part of a run; None without any.

    Parts that meet or overlap are one where they have the same recipe. Raises ``ValueError`` for parts that cannot be read, are no
    shares of a run, or overlap with different recipes.
    """
    by_recipe: dict[str | None, list[tuple[float, float]]] = {}
    for text in parts:
        found = _PART.fullmatch(text.strip())
        begin, end = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
        if found is None or not 0 <= begin < end <= 1:
            raise ValueError(
                "--during must be BEGIN-END or BEGIN-END=RECIPE, shares of a run from 0 (most noise) to 1 (its end), got "
                f"{text!r}. The last tenth in w8a8 is --during 0.9-1=w8a8, with inputs in 16 bits --during 0.9-1."
            )
        by_recipe.setdefault(found[3], []).append((begin, end))
    intervals = [part for recipe, mine in by_recipe.items() for part in protecting(mine, recipe).intervals]
    intervals.sort(key=lambda part: part.begin)
    for a, b in pairwise(intervals):
        if a.end > b.begin:
            raise ValueError(f"--during must not overlap with another recipe, got {_text(a)} and {_text(b)}. Part them.")
    return StepPolicy(intervals=tuple(intervals)) if intervals else None


def _text(part: Interval) -> str:
    return f"{part.begin:g}-{part.end:g}" + (f"={part.recipe}" if part.recipe else "")


def placement_of(text: str | None) -> Placement:
    """``--placement``: evenly, every, around:LEVEL. Raises ``ValueError`` for anything else."""
    kind, _, level = ("evenly" if text is None else text).partition(":")
    if kind == "around" and re.fullmatch(_SHARE, level) and float(level) <= 1:
        return Around(level=float(level))
    if level or kind not in ("evenly", "every"):
        raise ValueError(
            f"--placement must be evenly, every or around:LEVEL, a noise level from 0 to 1, got {text!r}. For example around:0.4."
        )
    return Every() if kind == "every" else Evenly()


def refiner_of(options: argparse.Namespace) -> Refiner | None:
    """``--refine`` with the flags that belong to it. Raises ``ValueError`` for those of another, or of none."""
    if options.refine is None and options.iterations:
        raise ValueError("--iterations must come with --refine, got it without. Nothing else trains.")
    if options.refine != "distill" and options.refine_batch:
        raise ValueError("--refine-batch must come with --refine distill, got it without. Blocks take one call at a time.")
    if options.refine != "distill" and options.refine_guidance is not None:
        raise ValueError(
            "--refine-guidance must come with --refine distill, got it without. Only a whole denoiser answers for both halves."
        )
    if options.refine != "blocks" and options.candidates:
        raise ValueError("--candidates must come with --refine blocks, got it without. Words are chosen block by block.")
    more = {} if options.iterations is None else {"iterations": options.iterations}
    if options.refine == "distill":
        return Distill(batch=options.refine_batch or 1, guidance=options.refine_guidance, **more)
    return Reconstruct(candidates=options.candidates or 1, **more) if options.refine == "blocks" else None
