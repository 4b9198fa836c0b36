"""Stages 2 and 3 of a set of variants whose pictures exist: features and pair scores (each process its share), then records (one).

Whatever was asked for and is not measured becomes a record that says why (``doubts.unmeasured``), under the name that its number
would have.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dqtk.processes import Processes
from dqtk.report import environment
from dqtk.report.records import Record
from dqtk.report.scores import one_per_picture

from .asked import ORACLE_SCORES, Measures, Shown
from .doubts import unfit_prompts, unmeasured
from .features import (
    Picture,
    check_sizes,
    encode,
    encode_texts,
    judge_identity,
    judge_pictures,
    load_features,
    load_texts,
    score_pairs,
    text_chunks,
)
from .reduce import Context, Values, change_records, class_records, pair_records, set_records


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
    keys = {name: asked.pair_key(name) for name in asked.pairs}
    for variant in shown:
        original = originals[variant.original]
        for mine, theirs in zip(variant.batches, original.batches, strict=True):
            if asked.judge is not None:
                work.append((variant.name, partial(judge_pictures, cache, judged, asked.judge, mine)))
            for name, function in asked.pairs.items():
                if variant.role != "original":
                    work.append((variant.name, partial(score_pairs, cache, keys[name], function, mine, theirs)))
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
            if unfit_prompts(score, variant) is None:
                known = [prompt for prompt in variant.prompts if prompt]
                texts = load_texts(cache, extractor, chunks, known) if texts is None else texts
                found = score.function(values.features[name, None], texts)
                values.texts[score.name, name] = one_per_picture(score.name, score.function, found, len(known)).tolist()
    return values


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


def _features(asked: Measures, batches: Sequence[list[Picture]], cache: Path) -> dict[tuple[str, str | None], Any]:
    """(extractor, head) -> rows; head None is the extractor's own feature."""
    found: dict[tuple[str, str | None], Any] = {}
    for name, extractor in asked.extractors.items():
        found[name, None] = load_features(cache, extractor, batches)
        found |= {(name, head): load_features(cache, extractor, batches, head) for head in asked.heads(extractor)}
    return found
