"""What a report or a job must know of a score beside its number. A file of this folder offers its scores as ``SCORES``.

Six kinds, by what they look at; the type is the key. Nothing here loads weights: ``PairScore.load`` does when it is called.

Of clips (uint8 [F, 3, H, W] RGB, F frames of one prompt and seed) two kinds are made: ``FrameScore`` looks at what an extractor of
pictures says of each frame, ``ClipScore`` at the frames themselves. The four others are of pictures and stay so: of a clip, a pair
score and a text score are taken frame by frame and averaged over its frames (an infinite value counts as the score's cap, unless
every frame's is infinite), a set score sees all frames of all clips. An extractor of clips (``encode_clips``) gives one row per
clip instead, to text scores and set scores alike.
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

    ``least``: different prompts that it cannot do without. ``of_clips``: it is of extractors of clips only. ``scaled``: the value
    is multiplied with the extractor's ``logit_scale``. ``only``: patterns of the names of extractors that it is taken with; none:
    with all. ``published``: see ``comparable``.
    """

    name: str
    label: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    unit: str = ""
    digits: int = 2
    least: int = 1
    of_clips: bool = False
    scaled: bool = False
    only: tuple[str, ...] = ()
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameScore:
    """Of one clip, from what an extractor of pictures gives for each frame: ``function(rows [F, D], text)`` -> a number.

    ``higher_is_better``: None where neither is. ``gives``: what the rows have to be, which an extractor says of itself under the
    same name ("embedding" where it says nothing). ``text``: which text's embedding [1, D] the function gets: the clip's "prompt",
    or its "style", which a suite of prompts names; None: none, and ``text`` is None. ``least``: frames that it cannot do without.
    ``published``: see ``comparable``.
    """

    name: str
    label: str
    higher_is_better: bool | None
    function: Callable[[Tensor, Tensor | None], float]
    unit: str = ""
    digits: int = 4
    gives: str = "embedding"
    text: str | None = None
    least: int = 1
    published: tuple[tuple[str, str], ...] = ANY


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipScore:
    """Of one clip, from its frames: ``function(frames uint8 [F, 3, H, W], fps, tool)`` -> a number, or None where the clip is not
    among those that the score is of.

    ``higher_is_better``: None where neither is. ``needs``: the method that a tool must have ("flow", "interpolate"), None: no tool,
    and ``tool`` is None. ``needs_fps``: it means nothing without the frame rate; else ``fps`` may be None. ``least``: frames that
    it cannot do without. ``version``: as of ``PairScore``. ``published``: see ``comparable``; without a tool, whether it is
    published at all. ``boolean``: its numbers are 0 or 1, and changes are flips.
    """

    name: str
    label: str
    higher_is_better: bool | None
    function: Callable[[Tensor, float | None, Any], float | None]
    unit: str = ""
    digits: int = 4
    needs: str | None = None
    needs_fps: bool = False
    least: int = 2
    version: str = "1"
    boolean: bool = False
    published: tuple[tuple[str, str], ...] = ANY


Score = PairScore | TextScore | SetScore | ClassScore | FrameScore | ClipScore


def serves(score: Score, extractor: Any) -> bool:
    """Whether a score can look at what an extractor gives, text towers and heads aside."""
    if isinstance(score, PairScore):
        return False
    if isinstance(score, ClipScore):
        return score.needs is not None and hasattr(extractor, score.needs)
    if isinstance(score, FrameScore):
        return hasattr(extractor, "encode_images") and gives(extractor) == score.gives
    if isinstance(score, TextScore) and score.only and not _matches(extractor.name, score.only):
        return False
    if isinstance(score, TextScore) and score.of_clips:
        return hasattr(extractor, "encode_clips")
    return gives(extractor) == "embedding" and (hasattr(extractor, "encode_images") or hasattr(extractor, "encode_clips"))


def gives(extractor: Any) -> str:
    """What an extractor's rows are: "embedding", or a name that scores ask for ("aesthetic", "quality")."""
    return str(getattr(extractor, "gives", "embedding"))


def comparable(score: TextScore | SetScore | ClassScore | FrameScore | ClipScore, extractor: Any, *, to_original: bool) -> bool:
    """Whether a number may stand beside published ones of its name.

    That takes more than known weights (``extractor.comparable``): a score is published with certain networks and certain
    preprocessing (``published``: patterns of extractor names and of its ``preprocess``), and never with the pictures of one's own
    original as the reference (``to_original``).
    """
    return bool(extractor.comparable) and as_published(score, extractor) and not to_original


def as_published(score: TextScore | SetScore | ClassScore | FrameScore | ClipScore, extractor: Any) -> bool:
    """Whether a score is published with networks of this name and preprocessing, whatever the weights are."""
    return any(
        _matches(extractor.name, (name,)) and fnmatchcase(extractor.preprocess, preprocess) for name, preprocess in score.published
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(_plain(name), _plain(pattern)) for pattern in patterns)


def _plain(text: str) -> str:
    """Without what ``fnmatch`` reads as a set of letters, and without regard to capitals."""
    return text.replace("[", "(").replace("]", ")").lower()
