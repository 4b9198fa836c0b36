"""The generic recipes by name: of layers, with a budget (searches), of attention. Recipes of families live in ``pipelines/``."""

from dqtk.plan import Recipe
from dqtk.spec import did_you_mean

from .attention import ATTENTION, DENSITY, attention_named, attention_recipe, with_density
from .layers import KEPT_ROLES, RECIPES, of_width
from .searches import CONTENT_ROLES, SEARCHES, Search, search_named

__all__ = [
    "ATTENTION",
    "CONTENT_ROLES",
    "DENSITY",
    "KEPT_ROLES",
    "RECIPES",
    "SEARCHES",
    "Search",
    "attention_named",
    "attention_recipe",
    "of_width",
    "recipe_named",
    "search_named",
    "with_density",
]


def recipe_named(name: str) -> Recipe:
    """A generic recipe. Raises ``ValueError`` with a suggestion for an unknown name, and for one that is a search."""
    if name in SEARCHES:
        raise ValueError(
            f"recipe: name must be of a recipe without a budget, got {name!r}, which measures layers first. "
            f"dqtk allocate MODEL --search {name} --output plan.json, then dqtk quantize MODEL --plan plan.json "
            "--stats plan-sensitivity.safetensors; "
            f"in Python made = dqtk.allocate(pipe, prompts, {name!r}), then dqtk.quantize(pipe, made.plan, made.stats)."
        )
    if name in ATTENTION:
        return attention_recipe(name)
    if name not in RECIPES:
        raise ValueError(
            f"recipe: name must be one of {', '.join(RECIPES)}, or of attention alone {', '.join(ATTENTION)}, got {name!r}."
            f"{did_you_mean(name, [*RECIPES, *ATTENTION])}"
        )
    return RECIPES[name]()
