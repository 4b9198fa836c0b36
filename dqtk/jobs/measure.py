"""Stages 2 and 3 of a set of variants whose pictures exist: features and pair scores (each process its share), then records (one).

``Measures`` is what was asked for, resolved; a job makes it from its file, ``dqtk evaluate`` from its arguments.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from dqtk.report import environment
from dqtk.report.records import Record
from dqtk.report.scores import checked_rows
from dqtk.resolve import extractor_for, oracle_of_pictures, scores
from dqtk.spec import did_you_mean

from .features import Picture, encode, judge_pictures, load_features, score_pairs
from .processes import Processes
from .reduce import Context, Values, change_records, class_records, pair_records, set_records

ORACLE = "oracle"


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleScore:
    """What records say of the oracle's two figures."""

    name: str
    label: str
    unit: str = ""
    higher_is_better: bool = True
    digits: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A variant and its pictures in batches. ``original``: name of the variant that it is paired with."""

    name: str
    role: str
    original: str
    batches: list[list[Picture]]

    @property
    def pictures(self) -> list[Picture]:
        return [picture for batch in self.batches for picture in batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Scores by kind, the functions of pair scores, extractors by name, an oracle; why some of it is missing."""

    scores: dict[str, Any]
    pairs: dict[str, Callable]
    extractors: dict[str, Any]
    judge: Callable | None
    missing: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> list[Any]:
        """Scores of one kind: "PairScore", "TextScore", "SetScore", "ClassScore"."""
        return [score for score in self.scores.values() if type(score).__name__ == kind]

    def heads(self, extractor: Any) -> list[str]:
        """What scores want of this extractor beside its own feature, as far as it has it."""
        wanted = dict.fromkeys(score.head for score in self.scores.values() if getattr(score, "head", None) is not None)
        return [head for head in wanted if has_head(extractor, head)]


def has_head(extractor: Any, head: str) -> bool:
    """Whether ``encode_all`` of an extractor gives this."""
    return head in getattr(extractor, "heads", ())


def measures(names: Sequence[str], extractors: Sequence[str], device: Any = "cpu") -> Measures:
    """Everything that the names ask for, loaded. What lacks its weights is left out with the reason.

    Raises:
        ValueError: an unknown score or extractor, or a score of features without an extractor.
    """
    known = scores()
    wanted = {}
    for name in names:
        if name == ORACLE:
            continue
        if name not in known:
            allowed = [*known, ORACLE]
            raise ValueError(f"metrics: name must be one of {', '.join(allowed)}, got {name!r}.{did_you_mean(name, allowed)}")
        wanted[name] = known[name]
    missing, pairs, found = {}, {}, {}
    for name in [name for name, score in wanted.items() if hasattr(score, "load")]:
        try:
            pairs[name] = wanted[name].load()
        except FileNotFoundError as error:
            missing[name] = str(error)
    needy = [name for name, score in wanted.items() if not hasattr(score, "load")]
    if needy and not extractors:
        raise ValueError(f"metrics: {', '.join(needy)} must have an extractor of features, got none. For example tiny-clip.")
    for name in extractors:
        try:
            found[name] = extractor_for(name, device)
        except FileNotFoundError as error:
            missing[name] = str(error)
    return Measures(scores=wanted, pairs=pairs, extractors=found, judge=None, missing=missing)


def with_oracle(asked: Measures, names: Sequence[str], shown: Sequence[Shown]) -> Measures:
    """The same with an oracle of these pictures if one was asked for and there is one; else with the reason."""
    if ORACLE not in names:
        return asked
    pictures = [picture for variant in shown for picture in variant.pictures]
    judge = None
    if all(picture.prompt for picture in pictures):
        with Image.open(pictures[0].file) as image:
            judge = oracle_of_pictures(image.size, [picture.prompt or "" for picture in pictures])
    if judge is None:
        reason = {ORACLE: "no oracle knows these prompts and pictures: it reads the embedded world's captions and 64x64 pictures"}
        return replace(asked, missing={**asked.missing, **reason})
    return replace(asked, judge=judge)


def observe(
    asked: Measures, shown: Sequence[Shown], references: Sequence[list[Picture]], cache: Path, processes: Processes
) -> None:
    """Stage 2: this process's share of features, pair scores and verdicts, into the cache."""
    originals = {variant.name: variant for variant in shown}
    work: list[tuple[str, Callable[[], Any]]] = []
    sets = [(variant.name, batch) for variant in shown for batch in variant.batches] + [("references", b) for b in references]
    for label, batch in sets:
        for extractor in asked.extractors.values():
            work.append((label, partial(encode, cache, extractor, batch, checked_rows, asked.heads(extractor))))
    for variant in shown:
        original = originals[variant.original]
        for mine, theirs in zip(variant.batches, original.batches, strict=True):
            if asked.judge is not None:
                work.append((variant.name, partial(judge_pictures, cache, ORACLE, asked.judge, mine)))
            for name, function in asked.pairs.items():
                if variant.role != "original":
                    work.append((variant.name, partial(score_pairs, cache, name, function, mine, theirs)))
    share = processes.mine(work)
    if not share:
        return
    with tqdm(share, desc="features", unit="batch") as bar:
        for _, (label, make) in bar:
            bar.set_postfix_str(label)
            make()


def gather(asked: Measures, variant: Shown, original: Shown, cache: Path) -> Values:
    """Everything that stage 2 found of one variant. Raises ``ValueError`` that names what is missing."""
    paired = list(zip(variant.batches, original.batches, strict=True))
    values = Values(name=variant.name, role=variant.role, prompts=[picture.prompt_index for picture in variant.pictures])
    if variant.role != "original":
        for name, function in asked.pairs.items():
            values.pairs[name] = [v for a, b in paired for v in score_pairs(cache, name, function, a, b)]
    if asked.judge is not None:
        said = [row for batch in variant.batches for row in judge_pictures(cache, ORACLE, asked.judge, batch)]
        values.oracle.update({f"oracle_{key}": [row[key] for row in said] for key in ("mean", "all_correct")})
    values.features.update(_features(asked, variant.batches, cache))
    for name, extractor in asked.extractors.items():
        prompts = [picture.prompt for picture in variant.pictures]
        if hasattr(extractor, "encode_texts") and all(prompts):
            texts = extractor.encode_texts(prompts)
            for score in asked.of("TextScore"):
                if len(set(prompts)) < score.least:
                    continue  # reduce says so
                values.texts[f"{score.name}[{name}]"] = score.function(values.features[name, None], texts).tolist()
    return values


def reduce(
    asked: Measures, shown: Sequence[Shown], references: Sequence[list[Picture]], cache: Path, seed: int, extra: Mapping[str, Any]
) -> tuple[list[Record], dict[str, Values]]:
    """Stage 3: records of every variant, and its values per picture."""
    by_name = {variant.name: variant for variant in shown}
    found = {variant.name: gather(asked, variant, by_name[variant.original], cache) for variant in shown}
    real = _features(asked, references, cache) if references else {}
    context = Context(
        seed=seed,
        created=environment.now(),
        versions=environment.versions(),
        hardware=environment.hardware("cpu"),
        extra=dict(extra),
        comparable={name: extractor.comparable for name, extractor in asked.extractors.items()},
    )
    oracle = {
        "oracle_mean": OracleScore(name="oracle_mean", label="Oracle"),
        "oracle_all_correct": OracleScore(name="oracle_all_correct", label="All correct"),
    }
    records: list[Record] = []
    for variant in shown:
        values, original = found[variant.name], found[variant.original]
        records += pair_records(values, asked.scores, context)
        records += change_records(values, original, "oracle", oracle, context)
        records += change_records(values, original, "texts", asked.scores, context)
        if variant.role != "original":
            records += set_records(values, original.features, asked.of("SetScore"), context, paired=True)
        if real:
            records += set_records(values, real, asked.of("SetScore"), context, paired=False)
        records += class_records(values, asked.of("ClassScore"), context)
    num_texts = len({picture.prompt for variant in shown for picture in variant.pictures if picture.prompt})
    for score in asked.of("TextScore"):
        if num_texts < score.least:
            why = f"{score.label} needs at least {score.least} different prompts, got {num_texts}"
            records.append(context.record("", score, score.name, 0, value=None, not_measured=why))
    for score in [*asked.of("SetScore"), *asked.of("ClassScore")]:
        if score.head is not None and not any(has_head(extractor, score.head) for extractor in asked.extractors.values()):
            names = ", ".join(asked.extractors) or "none"
            why = f"{score.label} needs {score.head} features of an extractor such as inception2015, got {names}"
            records.append(context.record("", score, score.name, 0, value=None, not_measured=why))
    for name, why in asked.missing.items():
        score = asked.scores.get(name, OracleScore(name=name, label=name))
        records.append(context.record("", score, name, 0, value=None, not_measured=why))
    return records, found


def _size_warnings(asked: Measures, shown: Sequence[Shown], references: Sequence[list[Picture]]) -> list[str]:
    if not asked.extractors:
        return []
    sizes = {variant.name: _size(variant.pictures[0]) for variant in shown}
    if references:
        sizes["references"] = _size(references[0][0])
    said, texts = [], {name: f"{width} x {height}" for name, (width, height) in sizes.items()}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {text}" for name, text in texts.items())
        said.append(f"pictures differ in size ({listed}): each is resized by itself, and distances of sets see the resizing too")
    if any(width != height for width, height in sizes.values()):
        how = "; ".join(f"{name}: {extractor.preprocess}" for name, extractor in asked.extractors.items())
        said.append(f"pictures are not square, and extractors crop or squash them ({how})")
    return said


def _size(picture: Picture) -> tuple[int, int]:
    with Image.open(picture.file) as image:
        return image.size


def _features(asked: Measures, batches: Sequence[list[Picture]], cache: Path) -> dict[tuple[str, str | None], Any]:
    """(extractor, head) -> rows; head None is the extractor's own feature."""
    found: dict[tuple[str, str | None], Any] = {}
    for name, extractor in asked.extractors.items():
        found[name, None] = load_features(cache, extractor, batches)
        found |= {(name, head): load_features(cache, extractor, batches, head) for head in asked.heads(extractor)}
    return found


def warnings_of(asked: Measures, shown: Sequence[Shown], references: Sequence[list[Picture]] = ()) -> list[str]:
    """What a reader should know before believing: lossy files, sizes that differ, shapes that are cut, prompts that are cut."""
    said = _size_warnings(asked, shown, references)
    for variant in shown:
        lossy = [picture.file.name for picture in variant.pictures if picture.file.suffix.lower() in (".jpg", ".jpeg", ".webp")]
        if lossy:
            said.append(f"{variant.name}: {len(lossy)} lossy files, such as {lossy[0]}; their compression is scored too")
    prompts = sorted({picture.prompt for variant in shown for picture in variant.pictures if picture.prompt})
    for name, extractor in asked.extractors.items():
        if prompts and hasattr(extractor, "truncated"):
            cut = sum(extractor.truncated(prompts))
            if cut:
                said.append(f"{name} cuts {cut} of {len(prompts)} prompts at {extractor.max_tokens} tokens")
    return said
