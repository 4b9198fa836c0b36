"""Two groups of sites, each with losses of one kind: content, and quality (MixDQ, arXiv 2405.17873, section 4.2).

Cross-attention and feed-forwards mostly decide what a picture shows, everything else how well. The groups are measured in
different ways, whose numbers do not add up; so each gets a budget and a program of its own. Where both are measured alike
(no ratio given), one program over all sites is better, because it may move bits from one group to the other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dqtk.recipes import CONTENT_ROLES
from dqtk.sites import Site

from .budget import divided
from .program import Allocation, Candidates, allocate

CONTENT, QUALITY, ALL = "content", "quality", "all"


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouped:
    """One group's program: its budget in the unit of the costs, and the choices made."""

    budget: float
    allocation: Allocation


def group_of(site: Site, content: Sequence[str] = (), quality: Sequence[str] = ()) -> str:
    """ "content" or "quality": by globs on path or id where one matches (content first), else by role."""
    if any(site.matches(pattern) for pattern in content):
        return CONTENT
    if any(site.matches(pattern) for pattern in quality):
        return QUALITY
    return CONTENT if site.role in CONTENT_ROLES else QUALITY


def group_of_name(layer: str, content: Sequence[str]) -> str:
    """The same where only names are known: content is what a glob matches."""
    return CONTENT if any(fnmatchcase(layer, pattern) for pattern in content) else QUALITY


def check_globs(patterns: Sequence[str], names: Sequence[str]) -> None:
    """Raises ``ValueError`` for a glob that matches none of the names (paths, or ids with their component)."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) or fnmatchcase(name.partition(":")[2], pattern) for name in names):
            raise ValueError(
                f"allocate: a group's pattern must match one of {len(names)} layers, got {pattern!r}. "
                f"They are named like {names[0]!r}; patterns are globs, such as '*.ff.*'."
            )


def allocate_groups(
    candidates: Candidates,
    budget: float,
    groups: Mapping[str, str],
    ratio: float | None,
    at_16_bits: Mapping[str, float],
    said: Callable[[float], str] = "{:.6g}".format,
) -> dict[str, Grouped]:
    """One program over all sites (no ratio), or one per group.

    Args:
        candidates: site -> its candidates.
        budget: of all sites, in the unit of the costs.
        groups: site -> group.
        ratio: content's share of its cost at 16 bits over quality's; None: the groups share one budget and one program.
        at_16_bits: site -> its cost at 16 bits.
        said: a cost in words, for errors.
    Raises:
        ValueError: a budget that is too small; of two groups the error names the one.
    """
    if ratio is None:
        return {ALL: Grouped(budget=budget, allocation=allocate(candidates, budget, said))}
    full: dict[str, float] = {}
    for site, group in groups.items():
        full[group] = full.get(group, 0.0) + at_16_bits[site]
    found = {}
    for group, mine in divided(budget, full, ratio).items():
        own = {site: options for site, options in candidates.items() if groups[site] == group}
        try:
            found[group] = Grouped(budget=mine, allocation=allocate(own, mine, said))
        except ValueError as error:
            what = str(error).removeprefix("allocate: ")
            raise ValueError(f"allocate: of group {group} with ratio {ratio:g}, {what}") from error
    return found
