"""Stages 2 and 3 of a set of variants whose pictures exist: features and pair scores (each process its share), then records (one).

``Measures`` is what was asked for, resolved; a job makes it from its file, ``dqtk evaluate`` from its arguments. Whatever was asked
for and is not measured becomes a record that says why (``unmeasured``), under the name that its number would have.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dqtk.report import environment
from dqtk.report.records import Record
from dqtk.resolve import extractor_for, oracle_of_pictures, scores
from dqtk.spec import did_you_mean

from .features import (
    Picture,
    check_sizes,
    encode,
    encode_texts,
    judge_identity,
    judge_pictures,
    load_features,
    load_texts,
    pair_identity,
    score_pairs,
    text_chunks,
)
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


ORACLE_SCORES = {
    "oracle_mean": OracleScore(name="oracle_mean", label="Oracle"),
    "oracle_all_correct": OracleScore(name="oracle_all_correct", label="All correct"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """A variant and its pictures in batches. ``original``: name of the variant that it is paired with. ``made``: where and in what
    it was painted (versions, hardware, dtype, plan_hash); None where nobody knows."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Scores by name, the functions of pair scores, extractors by name, an oracle; why some of it is missing, by name."""

    scores: dict[str, Any]
    pairs: dict[str, Callable]
    extractors: dict[str, Any]
    judge: Callable | None
    missing: dict[str, str] = field(default_factory=dict)
    missing_extractors: dict[str, str] = field(default_factory=dict)

    def of(self, kind: str) -> list[Any]:
        """Scores of one kind: "PairScore", "TextScore", "SetScore", "ClassScore"."""
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
        return {name: e for name, e in self.extractors.items() if hasattr(e, "encode_texts")} if self.of("TextScore") else {}


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
    pairs, found = {}, {}
    missing: dict[str, str] = {}
    missing_extractors: dict[str, str] = {}
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
            missing_extractors[name] = str(error)
    return Measures(
        scores=wanted, pairs=pairs, extractors=found, judge=None, missing=missing, missing_extractors=missing_extractors
    )


def with_oracle(asked: Measures, names: Sequence[str], shown: Sequence[Shown]) -> Measures:
    """The same with an oracle of these pictures if one was asked for and there is one; else with the reason."""
    if ORACLE not in names:
        return asked
    pictures = [picture for variant in shown for picture in variant.pictures]
    judge = None
    if all(picture.prompt for picture in pictures):
        judge = oracle_of_pictures(check_sizes(pictures[:1]), [picture.prompt or "" for picture in pictures])
    if judge is None:
        reason = {ORACLE: "no oracle knows these prompts and pictures: it reads the embedded world's captions and 64x64 pictures"}
        return replace(asked, missing={**asked.missing, **reason})
    return replace(asked, judge=judge)


def _chunks(shown: Sequence[Shown]) -> list[list[str]]:
    return text_chunks([prompt for variant in shown for prompt in variant.prompts if prompt])


def observe(
    asked: Measures, shown: Sequence[Shown], references: Sequence[list[Picture]], cache: Path, processes: Processes
) -> None:
    """Stage 2: this process's share of features, pair scores and verdicts, into the cache.

    Raises ``ValueError`` for a set of pictures of more than one size.
    """
    if processes.first:
        for pictures in [*(variant.pictures for variant in shown), [p for batch in references for p in batch]]:
            if pictures:
                check_sizes(pictures)
    originals = {variant.name: variant for variant in shown}
    work: list[tuple[str, Callable[[], Any]]] = []
    sets = [(variant.name, batch) for variant in shown for batch in variant.batches] + [("references", b) for b in references]
    for label, batch in sets:
        for extractor in asked.extractors.values():
            work.append((label, partial(encode, cache, extractor, batch, asked.heads(extractor))))
    for extractor in asked.readers().values():
        work += [("prompts", partial(encode_texts, cache, extractor, chunk)) for chunk in _chunks(shown)]
    judged = judge_identity(asked.judge) if asked.judge is not None else ""
    for variant in shown:
        original = originals[variant.original]
        for mine, theirs in zip(variant.batches, original.batches, strict=True):
            if asked.judge is not None:
                work.append((variant.name, partial(judge_pictures, cache, judged, asked.judge, mine)))
            for name, function in asked.pairs.items():
                if variant.role != "original":
                    work.append((variant.name, partial(score_pairs, cache, asked.pair_key(name), function, mine, theirs)))
    share = processes.mine(work)
    if not share:
        return
    with tqdm(share, desc="features", unit="batch") as bar:
        for _, (label, make) in bar:
            bar.set_postfix_str(label)
            make()


def clusters(pictures: Sequence[Picture]) -> list[int]:
    """Whose pictures belong together in a bootstrap: equal prompts are one, however often a list repeats them; a picture without
    one belongs to its index."""
    keys = [picture.prompt or picture.prompt_index for picture in pictures]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]


def gather(asked: Measures, variant: Shown, original: Shown, chunks: Sequence[list[str]], cache: Path) -> Values:
    """Everything that stage 2 found of one variant. Raises ``ValueError`` that names what is missing."""
    paired = list(zip(variant.batches, original.batches, strict=True))
    values = Values(name=variant.name, role=variant.role, prompts=clusters(variant.pictures))
    if variant.role != "original":
        for name, function in asked.pairs.items():
            key = asked.pair_key(name)
            values.pairs[name] = [v for a, b in paired for v in score_pairs(cache, key, function, a, b)]
    if asked.judge is not None:
        judged = judge_identity(asked.judge)
        said = [row for batch in variant.batches for row in judge_pictures(cache, judged, asked.judge, batch)]
        values.oracle.update({f"oracle_{key}": [row[key] for row in said] for key in ("mean", "all_correct")})
    values.features.update(_features(asked, variant.batches, cache))
    for name, extractor in asked.readers().items():
        texts = None
        for score in asked.of("TextScore"):
            if _unfit_prompts(score, variant) is None:
                known = [prompt for prompt in variant.prompts if prompt]
                texts = load_texts(cache, extractor, chunks, known) if texts is None else texts
                values.texts[score.name, name] = score.function(values.features[name, None], texts).tolist()
    return values


def _unfit_prompts(score: Any, variant: Shown) -> str | None:
    """Why a text score cannot be taken of a variant, if it cannot."""
    without = [picture.id for picture in variant.pictures if not picture.prompt]
    if without:
        return f"{score.label} needs the prompt of every picture, got none for {len(without)}, such as {without[0]}"
    num = len(set(variant.prompts))
    return f"{score.label} needs at least {score.least} different prompts, got {num}" if num < score.least else None


def reduce(
    asked: Measures,
    shown: Sequence[Shown],
    references: Sequence[list[Picture]],
    cache: Path,
    seed: int,
    extra: Mapping[str, Any],
    *,
    device: Any = "cpu",
    failed: Mapping[str, str] | None = None,
) -> tuple[list[Record], dict[str, Values]]:
    """Stage 3: records of every variant, and its values per picture. ``failed``: variants without pictures, and why."""
    by_name = {variant.name: variant for variant in shown}
    chunks = _chunks(shown)
    found = {variant.name: gather(asked, variant, by_name[variant.original], chunks, cache) for variant in shown}
    real = _features(asked, references, cache) if references else {}
    here = {"versions": environment.versions(), "hardware": environment.hardware(device)}
    context = Context(
        seed=seed,
        created=environment.now(),
        here=here,
        made={variant.name: variant.made for variant in shown if variant.made is not None},
        extra=dict(extra),
        extractors=asked.extractors,
    )
    records: list[Record] = []
    for variant in shown:
        values, original = found[variant.name], found[variant.original]
        records += pair_records(values, asked.scores, context)
        records += change_records(values, original, "oracle", ORACLE_SCORES, context)
        records += change_records(values, original, "texts", asked.scores, context)
        if variant.role != "original":
            records += set_records(values, original.features, asked.of("SetScore"), context, paired=True)
        if real:
            records += set_records(values, real, asked.of("SetScore"), context, paired=False)
        records += class_records(values, asked.of("ClassScore"), context)
    for score, name, model, why in unmeasured(asked, shown, bool(real), failed or {}):
        records.append(context.record(model, score, name, 0, value=None, not_measured=why))
    return records, found


# --- what was not measured -------------------------------------------------------------------------------------------


def unmeasured(
    asked: Measures, shown: Sequence[Shown], real: bool, failed: Mapping[str, str]
) -> Iterator[tuple[Any, str, str, str]]:
    """(score, the name its record would have, variant or "" for all, why) of everything asked for that has no number."""
    paired = any(variant.role != "original" for variant in shown) or bool(failed)
    every = [*asked.extractors, *asked.missing_extractors]
    for score in asked.scores.values():
        kind = type(score).__name__
        names = partial(_names, score, paired=paired, real=real)
        if score.name in asked.missing:
            yield from ((score, name, "", asked.missing[score.name]) for name in names(every))
            continue
        if kind == "PairScore" and not paired:
            yield from ((score, name, "", "no picture has a partner: there is nothing but originals") for name in names(every))
        if kind == "SetScore" and not paired and not real:
            yield from ((score, name, "", "there is nothing but originals, and no references") for name in names(every))
        if kind != "PairScore":
            for extractor, why in asked.missing_extractors.items():
                yield from ((score, name, "", why) for name in names([extractor]))
        yield from _lacking(asked, score, names, shown)
        yield from ((score, name, model, why) for model, why in failed.items() for name in names(every))
    for name, score in ORACLE_SCORES.items():
        if ORACLE in asked.missing:
            yield score, name, "", asked.missing[ORACLE]
        elif asked.judge is not None:
            yield from ((score, name, model, why) for model, why in failed.items())


def _lacking(asked: Measures, score: Any, names: Callable, shown: Sequence[Shown]) -> Iterator[tuple[Any, str, str, str]]:
    """What the extractors that are here lack for a score: a text tower, a head; or the variants: prompts."""
    if type(score).__name__ == "TextScore":
        for extractor in asked.extractors:
            if extractor not in asked.readers():
                why = f"{score.label} needs an extractor with a text tower, got {extractor}"
                yield from ((score, name, "", why) for name in names([extractor]))
                continue
            for variant in shown:
                if (why_not := _unfit_prompts(score, variant)) is not None:
                    yield from ((score, name, variant.name, why_not) for name in names([extractor]))
    head = getattr(score, "head", None)
    headless = head is not None and not any(has_head(extractor, head) for extractor in asked.extractors.values())
    if headless and asked.extractors and not asked.missing_extractors:
        why = f"{score.label} needs {head} features of an extractor such as inception2015, got {', '.join(asked.extractors)}"
        yield from ((score, name, "", why) for name in names(list(asked.extractors)))


def _names(score: Any, extractors: Sequence[str], *, paired: bool, real: bool) -> list[str]:
    """The names that records of a score have."""
    kind = type(score).__name__
    if kind == "PairScore":
        return [f"{score.name}@vs_original"]
    if kind != "SetScore":
        return [f"{score.name}[{extractor}]" for extractor in extractors]
    against = ["vs_original(paired)"] * paired + ["vs_real"] * (real or not paired)
    return [f"{score.name}[{extractor}]@{where}" for extractor in extractors for where in against]


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
    return check_sizes([picture])


def _features(asked: Measures, batches: Sequence[list[Picture]], cache: Path) -> dict[tuple[str, str | None], Any]:
    """(extractor, head) -> rows; head None is the extractor's own feature."""
    found: dict[tuple[str, str | None], Any] = {}
    for name, extractor in asked.extractors.items():
        found[name, None] = load_features(cache, extractor, batches)
        found |= {(name, head): load_features(cache, extractor, batches, head) for head in asked.heads(extractor)}
    return found


def doubts_of(records: Sequence[Record]) -> list[str]:
    """What numbers say against themselves: too few pictures for their features, not comparable with published ones."""
    said: dict[str, list[str]] = {}
    for record in records:
        if (warning := record.extra.get("warning")) is not None:
            said.setdefault(str(warning), []).append(record.name)
    lines = [f"{', '.join(dict.fromkeys(names))}: {warning}" for warning, names in said.items()]
    private = dict.fromkeys(
        record.name for record in records if record.extra.get("comparable") is False and record.value is not None
    )
    return [*lines, f"\N{DAGGER} not comparable with published numbers: {', '.join(private)}"] if private else lines


def gaps_of(records: Sequence[Record]) -> list[str]:
    """What was not measured, and why; one line per reason."""
    said: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record.not_measured is not None:
            said.setdefault((record.model, record.not_measured), []).append(record.name)
    return [f"not measured{f' of {model}' * bool(model)}: {', '.join(names)}: {why}" for (model, why), names in said.items()]


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
