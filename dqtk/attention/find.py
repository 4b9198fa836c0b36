"""Where a denoiser attends to itself, found by structure."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSite:
    """One self-attention or joint attention. id: ``component:path``. heads: of the queries."""

    id: str
    heads: int

    @property
    def component(self) -> str:
        return self.id.partition(":")[0]

    @property
    def path(self) -> str:
        return self.id.partition(":")[2]

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches the id or the path."""
        return fnmatchcase(self.path, pattern) or fnmatchcase(self.id, pattern)


def find_attention(module: nn.Module, component: str = "model") -> list[AttentionSite]:
    """All places of a denoiser where a sequence attends to itself: modules with a processor (as diffusers has them) and heads that
    are not made for another sequence. Works on the meta device."""
    found = []
    for path, part in module.named_modules():
        heads = heads_of(part)
        if heads is not None and not getattr(part, "is_cross_attention", False):
            found.append(AttentionSite(id=f"{component}:{path}", heads=heads))
    return found


def heads_of(part: Any) -> int | None:
    """Number of heads of an attention module; None for other modules."""
    heads = getattr(part, "heads", None)
    return heads if isinstance(heads, int) and hasattr(part, "processor") else None
