"""What a report or a job must know of a score beside its number. A file of this folder offers its scores as ``SCORES``.

Four kinds, by what they look at; the type is the key. Nothing here loads weights: ``PairScore.load`` does when it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScore:
    """Closeness of a picture to the original's picture of the same prompt and seed.

    ``load(**options)`` returns the function (candidate, reference) -> [B] of float batches [B, 3, H, W] in [0, 1]. ``cap``: what
    larger values count for in a mean (``None``: the score is bounded).
    """

    name: str
    label: str
    higher_is_better: bool
    load: Callable[..., Callable[[Tensor, Tensor], Tensor]]
    unit: str = ""
    digits: int = 4
    cap: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScore:
    """How well a picture fits its prompt: ``function`` maps embeddings of pictures and prompts, [N, D] each, to [N].

    ``least``: different prompts that it cannot do without.
    """

    name: str
    label: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    unit: str = ""
    digits: int = 2
    least: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SetScore:
    """Distance of two sets of pictures: ``function(generated [N, D], reference [M, D], paired)`` -> a number.

    ``paired``: row i of both is of the same prompt and seed (against the original), not of the same world (against photographs).
    Estimators that leave out equal items need to know; others ignore it. ``least``: rows that it cannot do without. ``head``: what
    the rows are, where it is not the extractor's own feature but another that its ``encode_all`` gives. ``full_rank``: whether it
    means little with fewer rows than features.
    """

    name: str
    label: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor, bool], float]
    unit: str = ""
    digits: int = 4
    least: int = 2
    head: str | None = None
    full_rank: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """Of one set alone, from a classifier's logits [N, C]: ``function(logits)`` -> (value, standard deviation over splits).

    ``head``: which of the extractor's ``encode_all`` they are. ``least``: rows that it cannot do without.
    """

    name: str
    label: str
    higher_is_better: bool
    function: Callable[[Tensor], tuple[float, float]]
    unit: str = ""
    digits: int = 3
    least: int = 2
    head: str = "logits"


Score = PairScore | TextScore | SetScore | ClassScore
