"""How attention is computed, by name."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from dqtk.plan import Recipe, Rule
from dqtk.spec import Adaptive, AttentionSpec, Int, Recall, Sage, SmoothBoth, SmoothKeys, StaticBlocks, did_you_mean

DENSITY = 0.5  # where none is given


def _paro(density: float | None, bits: int | None) -> AttentionSpec:
    """PAROAttention (arXiv 2506.16054): an order per head, static blocks, queries, keys, probabilities and values as integers.

    Probabilities have a scale per row of a block, and 4-bit queries are smoothed too: both are finer than the paper's and free.
    """
    share = DENSITY if density is None else density
    codes = None if bits is None else Int(bits=bits)
    smooth = None if bits is None else SmoothKeys() if bits == 8 else SmoothBoth()
    return AttentionSpec(order=Recall(), mask=StaticBlocks(density=share), qk=codes, pv=codes, smooth=smooth)


def _adaptive(density: float | None) -> AttentionSpec:
    """``paro-int8`` with 4 bits where a head's output moves by a twentieth at most, and 16 where 8 move it by more."""
    return replace(_paro(density, bits=8), smooth=SmoothBoth(), adapt=Adaptive())


def _dense(density: float | None) -> AttentionSpec:
    """All of it, as it is, by dqtk's own kernel where there is one."""
    if density is not None:
        raise ValueError(f"attention: density must be left out for dense, got {density}. Take paro.")
    return AttentionSpec()


def _sage(density: float | None) -> AttentionSpec:
    """An installed SageAttention."""
    if density is not None:
        raise ValueError(f"attention: density must be left out for sage, got {density}. Take paro-int8.")
    return AttentionSpec(kernel=Sage())


ATTENTION: dict[str, Callable[[float | None], AttentionSpec]] = {
    "dense": _dense,
    "paro": partial(_paro, bits=None),
    "paro-int8": partial(_paro, bits=8),
    "paro-int4": partial(_paro, bits=4),
    "paro-adaptive": _adaptive,
    "sage": _sage,
}
"""How attention is computed, by name; a function of the density, which is ``DENSITY`` where it is None and there is one. As recipes
of their own they leave layers at 16 bits."""


def attention_named(name: str, density: float | None = None) -> AttentionSpec:
    """How one attention is computed: for ``dqtk.plan``'s ``overrides`` and for rules (its ``attention`` takes names as they are).

    density: share of the blocks that are computed; None: ``DENSITY``, where there is one. Raises ``ValueError`` with a suggestion
    for an unknown name, and for a density of what has none (dense, sage).
    """
    if name not in ATTENTION:
        raise ValueError(f"attention: name must be one of {', '.join(ATTENTION)}, got {name!r}.{did_you_mean(name, ATTENTION)}")
    return ATTENTION[name](density)


def attention_recipe(name: str, density: float | None = None) -> Recipe:
    """The recipe of one attention alone; layers keep 16 bits. Raises ``ValueError`` as ``attention_named`` does."""
    return Recipe(name=name, rules=(Rule(spec=attention_named(name, density), why=f"{name}: attention alone"),))


def with_density(
    recipe: str | Recipe, attention: AttentionSpec | str | None, density: float | None
) -> tuple[str | Recipe, AttentionSpec | None]:
    """What ``dqtk.plan`` is asked for, names looked up: the recipe, and the spec of all attentions beside it (None: it has its own,
    or none).

    density: of the one that is given by name; None: ``DENSITY``. Raises ``ValueError`` for a density without such a name, and for
    an attention beside a recipe that is one.
    """
    if attention is not None and not isinstance(attention, AttentionSpec | str):
        raise ValueError(f"plan: attention must be an AttentionSpec, a name or None, got {attention!r}. For example 'paro-int8'.")
    itself = recipe if isinstance(recipe, str) and recipe in ATTENTION else None
    if itself is not None and attention is not None:
        raise ValueError(f"plan: attention must be left out with recipe {itself!r}, got {attention!r}. It is one already.")
    if density is None:
        return recipe, attention_named(attention) if isinstance(attention, str) else attention
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise ValueError(f"plan: density must be a number in (0, 1], got {density!r}. Half of the blocks is 0.5.")
    if itself is not None:
        return attention_recipe(itself, density), None
    if attention is None:
        raise ValueError("plan: density must come with attention or recipe 'paro-...', got it without. It is of their blocks.")
    if isinstance(attention, AttentionSpec):
        raise ValueError(
            f"plan: density must come with the name of an attention, got {density} with an AttentionSpec. Write it into its mask: "
            f"StaticBlocks(density={density})."
        )
    return recipe, attention_named(attention, density)
