"""Groups of sites, each measured in its own way (MixDQ, arXiv 2405.17873, section 4.2; ViDiT-Q, arXiv 2406.02540, section 3.4).

Of pictures there are two: ``content`` (cross-attentions and feed-forwards decide what a picture shows) and ``quality`` (how well).
Of clips three: ``text`` (cross-attentions, and streams of the text's own: what a clip shows), ``temporal`` (attention over frames,
and all else that mixes them: whether it moves as it should) and ``spatial`` (how good its frames are). Where attention over frames
is no module of its own, as in most video transformers today, self-attention is all that sees more than one frame, and is temporal.

Numbers of different measures do not add up; so each group gets a budget and a program of its own. Where all are measured alike (no
ratio given), one program over all sites is better, because it may move bits from one group to another.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dqtk.recipes import CONTENT_ROLES
from dqtk.sites import Site
from dqtk.spec import did_you_mean

from .budget import divided
from .program import Allocation, Candidates, allocate

CONTENT, QUALITY = "content", "quality"
TEXT, TEMPORAL, SPATIAL = "text", "temporal", "spatial"
PICTURES, CLIPS = (CONTENT, QUALITY), (TEXT, TEMPORAL, SPATIAL)
RESTS = (QUALITY, SPATIAL)  # what no other group takes; budgets of the others are relative to its
ALL = "all"

_OVER_FRAMES = re.compile(r"temp(oral)?_|_temp(oral)?|motion_")  # Latte, AnimateDiff, Stable Video Diffusion, Open-Sora
_OF_TEXT = re.compile(r"context|add_[qkv]_proj|to_add_out")  # streams of their own beside that of the latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouped:
    """One group's program: its budget in the unit of the costs, and the choices made."""

    budget: float
    allocation: Allocation


def groups_of(sites: Sequence[Site], patterns: Mapping[str, Sequence[str]] | None = None, *, clips: bool = False) -> dict[str, str]:
    """Site id -> its group: by globs on path or id where one matches (groups in their order), else by role.

    Args:
        sites: all of a model; whether attention over frames is a module of its own is seen from them.
        patterns: group -> globs.
        clips: the groups of clips, not of pictures.
    Raises:
        ValueError: an unknown group, a glob that matches nothing.
    """
    names, given = (CLIPS if clips else PICTURES), dict(patterns or {})
    check_groups(given, names, "clips" if clips else "pictures")
    check_globs([glob for globs in given.values() for glob in globs], [site.id for site in sites])
    apart = any(_OVER_FRAMES.search(site.path) for site in sites)

    def group(site: Site) -> str:
        named = next((name for name in names for glob in given.get(name, ()) if site.matches(glob)), None)
        return named or (_group_of_clips(site, apart=apart) if clips else _group_of_pictures(site))

    return {site.id: group(site) for site in sites}


def _group_of_pictures(site: Site) -> str:
    return CONTENT if site.role in CONTENT_ROLES else QUALITY


def _group_of_clips(site: Site, *, apart: bool) -> str:
    if site.role.startswith("cross_attn.") or site.role == "text_projection" or _OF_TEXT.search(site.path):
        return TEXT
    over_frames = bool(_OVER_FRAMES.search(site.path)) if apart else site.role.startswith("self_attn.")
    return TEMPORAL if over_frames else SPATIAL


def groups_of_names(layers: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The same where only names are known: what no glob matches is the rest. Raises ``ValueError`` as ``groups_of``."""
    names = CLIPS if set(patterns) & {TEXT, TEMPORAL} else PICTURES
    check_groups(patterns, names, "a log")
    check_globs([glob for globs in patterns.values() for glob in globs], layers)

    def group(layer: str) -> str:
        return next((name for name in names for glob in patterns.get(name, ()) if fnmatchcase(layer, glob)), names[-1])

    return {layer: group(layer) for layer in layers}


def check_groups(given: Mapping[str, object], names: Sequence[str], what: str) -> None:
    """Raises ``ValueError`` with a suggestion for a group that is none of the names."""
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ValueError(f"allocate: a group of {what} must be one of {', '.join(names)}, got {name!r}.{hint}")


def check_globs(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ``ValueError`` for a glob that matches none of the names (paths, or ids with their component)."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) or fnmatchcase(name.partition(":")[2], pattern) for name in names):
            raise ValueError(
                f"allocate: a group's pattern must match one of {len(names)} layers, got {pattern!r}. "
                f"They are named like {names[0]!r}; patterns are globs, such as '*.ff.*'."
            )


Ratios = Mapping[str, float]  # group -> its share of its cost at 16 bits, over that of the rest


def ratios_of(ratio: float | Ratios | None, groups: Mapping[str, str]) -> dict[str, float] | None:
    """One ratio for every group but the rest where a number is given. ``groups``: site -> group.

    Raises ``ValueError`` for a group that has no ratio or no sites.
    """
    if ratio is None:
        return None
    names = others_of(groups)
    if not isinstance(ratio, Mapping):
        return dict.fromkeys(names or [CONTENT], float(ratio))
    if set(ratio) != set(names):
        raise ValueError(
            f"allocate: ratio must have a number for each of {', '.join(names)}, got it for {', '.join(ratio)}. "
            "It is a group's share of its cost at 16 bits over that of the rest."
        )
    return dict(ratio)


def others_of(groups: Mapping[str, str]) -> list[str]:
    """The groups beside the rest that have sites, in their order."""
    there = set(groups.values())
    return [name for name in (*PICTURES, *CLIPS) if name in there and name not in RESTS]


def say_ratios(ratios: Ratios) -> str:
    """ "ratio 0.5", or "text 0.5, temporal 1" where there are several."""
    if len(ratios) == 1:
        return f"ratio {next(iter(ratios.values())):g}"
    return ", ".join(f"{group} {ratio:g}" for group, ratio in ratios.items())


def allocate_groups(
    candidates: Candidates,
    budget: float,
    groups: Mapping[str, str],
    ratios: Ratios | None,
    at_16_bits: Mapping[str, float],
    said: Callable[[float], str] = "{:.6g}".format,
) -> dict[str, Grouped]:
    """One program over all sites (no ratios), or one per group.

    Args:
        candidates: site -> its candidates.
        budget: of all sites, in the unit of the costs.
        groups: site -> group.
        ratios: of ``ratios_of``; None: the groups share one budget and one program.
        at_16_bits: site -> its cost at 16 bits.
        said: a cost in words, for errors.
    Raises:
        ValueError: a budget that is too small; of several groups the error names the one.
    """
    if ratios is None:
        return {ALL: Grouped(budget=budget, allocation=allocate(candidates, budget, said))}
    full: dict[str, float] = {}
    for site, group in groups.items():
        full[group] = full.get(group, 0.0) + at_16_bits[site]
    found = {}
    for group, mine in divided(budget, full, ratios).items():
        own = {site: options for site, options in candidates.items() if groups[site] == group}
        try:
            found[group] = Grouped(budget=mine, allocation=allocate(own, mine, said))
        except ValueError as error:
            what = str(error).removeprefix("allocate: ")
            raise ValueError(f"allocate: of group {group} with {say_ratios(ratios)}, {what}") from error
    return found
