"""What was asked for, resolved: scores, extractors and an oracle by their names, and the variants that they look at.

A job makes ``Measures`` from its file, ``dqtk evaluate`` from its arguments. What lacks its weights is left out with the reason.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dqtk.report.scores import scores_on_offer as scores
from dqtk.report.scores import serves
from dqtk.resolve import extractor_for, oracle_of_clips, oracle_of_pictures, stand_in
from dqtk.spec import did_you_mean

from .features import Picture, check_sizes, pair_identity

ORACLE = "oracle"
_ALSO_KNOWN = {
    "fid": "frechet with the extractor inception2015",
    "is": "inception_score",
    "clip": "clip_score with an extractor that reads texts",
    "lpips_alex": "lpips",
    "mmd": "kid or cmmd",
    "fvd": "frechet with an extractor of clips, such as i3d:rgb_imagenet",
    "clip_temporal": "clip_temp",
    "image_reward": "a worker of that name (docs/preference.md)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleFigure:
    """What records say of the oracle's two figures."""

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 3
    boolean: bool = False


ORACLE_SCORES = {
    "oracle_mean": OracleFigure(name="oracle_mean", label="Oracle"),
    "oracle_all_correct": OracleFigure(name="oracle_all_correct", label="All correct", boolean=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A variant and its samples in batches: pictures or clips, and what is shown together is of one kind. ``original``: name of the
    variant that it is paired with. ``made``: where and in what it was painted (versions, hardware, dtype, plan_hash); None where
    nobody knows."""

    name: str
    role: str
    original: str
    batches: list[list[Picture]]
    made: dict[str, Any] | None = None

    @property
    def pictures(self) -> list[Picture]:
        return [picture for batch in self.batches for picture in batch]

    @property
    def prompts(self) -> list[str | None]:
        return [picture.prompt for picture in self.pictures]

    @property
    def of_clips(self) -> bool:
        return bool(self.batches[0][0].frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Scores by name, the functions of pair scores, extractors by name, an oracle; why some of it is missing, by name; commands of
    workers by the names of their scores."""

    scores: dict[str, Any]
    pairs: dict[str, Callable]
    extractors: dict[str, Any]
    judge: Callable | None
    missing: dict[str, str] = field(default_factory=dict)
    missing_extractors: dict[str, str] = field(default_factory=dict)
    workers: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> list[Any]:
        """Scores of one kind: "PairScore", "TextScore", "SetScore", "ClassScore", "FrameScore", "ClipScore"."""
        return [score for score in self.scores.values() if type(score).__name__ == kind]

    def heads(self, extractor: Any) -> list[str]:
        """What scores want of this extractor beside its own feature, as far as it has it."""
        wanted = dict.fromkeys(score.head for score in self.scores.values() if getattr(score, "head", None) is not None)
        return [head for head in wanted if has_head(extractor, head)]

    def pair_key(self, name: str) -> str:
        """What cached values of a pair score are filed under."""
        return pair_identity(self.scores[name], self.pairs[name])

    def readers(self) -> dict[str, Any]:
        """Extractors with a text tower, if a score wants one."""
        wanting = [*self.of("TextScore"), *(score for score in self.of("FrameScore") if score.text is not None)]
        return {name: e for name, e in self.extractors.items() if hasattr(e, "encode_texts") and any(serves(s, e) for s in wanting)}

    def serving(self, score: Any) -> list[str]:
        """Extractors that a score can look at."""
        return [name for name, extractor in self.extractors.items() if serves(score, extractor)]

    def lacking(self, score: Any) -> list[str]:
        """Extractors that it could look at if their weights were here."""
        return [name for name in self.missing_extractors if serves(score, stand_in(name))]

    def encoders(self, *, clips: bool) -> dict[str, Any]:
        """Extractors that give rows of pictures, and of clips if the samples are clips."""
        known = self.extractors.items()
        return {name: e for name, e in known if hasattr(e, "encode_images") or (clips and hasattr(e, "encode_clips"))}

    def tools(self, score: Any) -> dict[str | None, Any]:
        """What a ``ClipScore`` is computed with, by name: None by itself, or each extractor that has what it needs."""
        if score.needs is None:
            return {None: None}
        return {name: e for name, e in self.extractors.items() if serves(score, e)}


def needs_clips(score: Any, extractor: str, got: str) -> str:
    """Why a score has no number by an extractor of clips where there are none."""
    return f"{score.label} by {extractor} needs clips, got {got}"


def has_head(extractor: Any, head: str) -> bool:
    """Whether ``encode_all`` of an extractor gives this."""
    return head in getattr(extractor, "heads", ())


def measures(
    names: Sequence[str], extractors: Sequence[str], device: Any = "cpu", workers: Mapping[str, str] | None = None
) -> Measures:
    """Everything that the names ask for, loaded. What lacks its weights is left out with the reason. Workers are not started yet.

    Raises:
        ValueError: an unknown score or extractor, a score of features without an extractor, or a worker by the name of a score.
    """
    known = scores()
    taken = sorted({*known, ORACLE, *ORACLE_SCORES} & set(workers or {}))
    if taken:
        raise ValueError(f"workers: names must differ from those of scores, got {', '.join(taken)}. Rename them.")
    wanted = {}
    for name in names:
        if name == ORACLE:
            continue
        if name not in known:
            allowed = [*known, ORACLE]
            other = _ALSO_KNOWN.get(name.lower())
            hint = f" Take {other}." if other is not None else did_you_mean(name, allowed)
            raise ValueError(f"metrics: name must be one of {', '.join(allowed)}, got {name!r}.{hint}")
        wanted[name] = known[name]
    pairs, found = {}, {}
    missing: dict[str, str] = {}
    missing_extractors: dict[str, str] = {}
    for name in [name for name, score in wanted.items() if hasattr(score, "load")]:
        try:
            pairs[name] = wanted[name].load()
        except FileNotFoundError as error:
            missing[name] = str(error)
    needy = [name for name, score in wanted.items() if not hasattr(score, "load") and getattr(score, "needs", "") is not None]
    if needy and not extractors:
        raise ValueError(f"metrics: {', '.join(needy)} must have an extractor of features, got none. For example tiny-clip.")
    for name in extractors:
        try:
            found[name] = extractor_for(name, device)
        except FileNotFoundError as error:
            missing_extractors[name] = str(error)
    return Measures(
        scores=wanted,
        pairs=pairs,
        extractors=found,
        judge=None,
        missing=missing,
        missing_extractors=missing_extractors,
        workers=dict(workers or {}),
    )


def fitting(asked: Measures, shown: Sequence[Shown]) -> Measures:
    """The same without pair scores of whole clips where the samples are pictures, and why."""
    unfit = [name for name in asked.pairs if asked.scores[name].clips and not shown[0].of_clips]
    pairs = {name: function for name, function in asked.pairs.items() if name not in unfit}
    return replace(asked, pairs=pairs, missing=asked.missing | dict.fromkeys(unfit, "it scores clips, and these are pictures"))


def with_oracle(asked: Measures, names: Sequence[str], shown: Sequence[Shown]) -> Measures:
    """The same with an oracle of these pictures if one was asked for and there is one; else with the reason."""
    if ORACLE not in names:
        return asked
    pictures = [picture for variant in shown for picture in variant.pictures]
    judge = None
    if all(picture.prompt for picture in pictures):
        find = oracle_of_clips if shown[0].of_clips else oracle_of_pictures
        judge = find(check_sizes(pictures[:1]), [picture.prompt or "" for picture in pictures])
    if judge is None:
        reason = {ORACLE: "no oracle knows these prompts and pictures: it reads the embedded world's captions and 64x64 pictures"}
        return replace(asked, missing={**asked.missing, **reason})
    return replace(asked, judge=judge)
