"""What a report or a job must know of a score beside its number. A file of this folder offers its scores as ``SCORES``.

Four kinds, by what they look at; the type is the key. Nothing here loads weights: ``PairScore.load`` does when it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

ANY = (("*", "*"),)  # published with whatever comparable extractor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairScore:
    """Closeness of a picture to the original's picture of the same prompt and seed.

    ``load(**options)`` returns the function (candidate, reference) -> [B] of float batches [B, 3, H, W] in [0, 1]; with ``clips``,
    of [B, F, 3, H, W] (other scores take the frames of a clip one by one). ``cap``: what larger values count for in a mean
    (``None``: the score is bounded). ``version``: of the code; another one may give other numbers, so cached values are filed under
    it. A function that depends on files says on which in its ``identity``.
    """

    name: str
    label: str
    higher_is_better: bool
    load: Callable[..., Callable[[Tensor, Tensor], Tensor]]
    unit: str = ""
    digits: int = 4
    cap: float | None = None
    version: str = "1"
    clips: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TextScore:
    """How well a picture fits its prompt: ``function`` maps embeddings of pictures and prompts, [N, D] each, to [N].

    ``least``: different prompts that it cannot do without. ``published``: see ``comparable``.
    """

    name: str
    label: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    unit: str = ""
    digits: int = 2
    least: int = 1
    published: tuple[tuple[str, str], ...] = ANY


@dataclass(frozen=True, kw_only=True, slots=True)
class SetScore:
    """Distance of two sets of pictures: ``function(generated [N, D], reference [M, D], paired)`` -> a number.

    ``paired``: row i of both is of the same prompt and seed (against the original), not of the same world (against photographs).
    Estimators that leave out equal items need to know; others ignore it. ``least``: rows that it cannot do without. ``head``: what
    the rows are, where it is not the extractor's own feature but another that its ``encode_all`` gives. ``full_rank``: whether it
    means little with fewer rows than features. ``published``: see ``comparable``.
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
    published: tuple[tuple[str, str], ...] = ANY


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """Of one set alone, from a classifier's logits [N, C]: ``function(logits)`` -> (value, standard deviation over splits).

    ``head``: which of the extractor's ``encode_all`` they are. ``least``: rows that it cannot do without. ``published``: see
    ``comparable``.
    """

    name: str
    label: str
    higher_is_better: bool
    function: Callable[[Tensor], tuple[float, float]]
    unit: str = ""
    digits: int = 3
    least: int = 2
    head: str = "logits"
    published: tuple[tuple[str, str], ...] = ANY


Score = PairScore | TextScore | SetScore | ClassScore


def comparable(score: TextScore | SetScore | ClassScore, extractor: Any, *, to_original: bool) -> bool:
    """Whether a number may stand beside published ones of its name.

    That takes more than known weights (``extractor.comparable``): a score is published with certain networks and certain
    preprocessing (``published``: patterns of extractor names and of its ``preprocess``), and never with the pictures of one's own
    original as the reference (``to_original``).
    """
    named = any(
        fnmatchcase(_plain(extractor.name), _plain(name)) and fnmatchcase(extractor.preprocess, preprocess)
        for name, preprocess in score.published
    )
    return bool(extractor.comparable) and named and not to_original


def _plain(text: str) -> str:
    """Without what ``fnmatch`` reads as a set of letters, and without regard to capitals."""
    return text.replace("[", "(").replace("]", ")").lower()
