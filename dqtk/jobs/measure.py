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
from dqtk.report.scores import one_per_picture, serves

from .asked import ORACLE_SCORES, Measures, Shown
from .clip_scores import score_clip, score_frames, text_for, unfit_clips
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
    looked_at,
    score_clip_pair,
    score_pairs,
    text_chunks,
)
from .reduce import Context, Values, change_records, class_records, clip_records, pair_records, set_records, worker_records
from .worker_scores import answers, ask


def _chunks(asked: Measures, shown: Sequence[Shown]) -> list[list[str]]:
    """Every text that some score looks at, in chunks."""
    prompts = [prompt for variant in shown for prompt in variant.prompts if prompt]
    others = [text_for(score, clip) for score in asked.of("FrameScore") for variant in shown for clip in variant.pictures]
    return text_chunks([*prompts, *(text for text in others if text)])


def observe(
    asked: Measures,
    shown: Sequence[Shown],
    references: Sequence[list[Picture]],
    cache: Path,
    processes: Processes,
    fps: float | None = None,
) -> None:
    """Stage 2: this process's share of features, pair scores, verdicts and scores of clips, into the cache.

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
        for extractor in asked.encoders(clips=bool(batch[0].frames)).values():
            work += [(label, partial(encode, cache, extractor, part, asked.heads(extractor))) for part in looked_at([batch])]
    for extractor in asked.readers().values():
        work += [("prompts", partial(encode_texts, cache, extractor, chunk)) for chunk in _chunks(asked, shown)]
    judged = judge_identity(asked.judge) if asked.judge is not None else ""
    keys = {name: asked.pair_key(name) for name in asked.pairs}
    for variant in shown:
        original = originals[variant.original]
        for mine, theirs in zip(variant.batches, original.batches, strict=True):
            if asked.judge is not None:
                work.append((variant.name, partial(judge_pictures, cache, judged, asked.judge, mine)))
            for name, function in asked.pairs.items() if variant.role != "original" else ():
                pairs = zip(looked_at([mine]), looked_at([theirs]), strict=True)
                whole = asked.scores[name].clips
                work += [(variant.name, partial(score_pairs, cache, keys[name], function, a, b, whole=whole)) for a, b in pairs]
        for score in asked.of("ClipScore"):
            if unfit_clips(score, variant.pictures, fps) is None:
                work += [
                    (variant.name, partial(score_clip, cache, score, tool, clip, fps))
                    for tool in asked.tools(score).values()
                    for clip in variant.pictures
                ]
    share = processes.mine(work)
    if share:
        with tqdm(share, desc="features", unit="batch") as bar:
            for _, (label, make) in bar:
                bar.set_postfix_str(label)
                make()
    samples = [sample for _, sample in processes.mine([sample for variant in shown for sample in variant.pictures])]
    for name, command in asked.workers.items():
        ask(cache, name, command, samples, processes.rank)


def clusters(pictures: Sequence[Picture]) -> list[int]:
    """Whose pictures belong together in a bootstrap: equal prompts are one, however often a list repeats them; a picture without
    one belongs to its index."""
    keys = [picture.prompt or picture.prompt_index for picture in pictures]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]


def gather(
    asked: Measures, variant: Shown, original: Shown, chunks: Sequence[list[str]], cache: Path, fps: float | None = None
) -> Values:
    """Everything that stage 2 found of one variant. Raises ``ValueError`` that names what is missing."""
    paired = list(zip(variant.batches, original.batches, strict=True))
    values = Values(name=variant.name, role=variant.role, prompts=clusters(variant.pictures))
    if variant.role != "original":
        for name, function in asked.pairs.items():
            key, score = asked.pair_key(name), asked.scores[name]
            if variant.of_clips:
                clips = zip(variant.pictures, original.pictures, strict=True)
                values.pairs[name] = [score_clip_pair(cache, key, function, score, a, b) for a, b in clips]
            else:
                values.pairs[name] = [v for a, b in paired for v in score_pairs(cache, key, function, a, b)]
    if asked.judge is not None:
        judged = judge_identity(asked.judge)
        said = [row for batch in variant.batches for row in judge_pictures(cache, judged, asked.judge, batch)]
        values.oracle.update({f"oracle_{key}": [row[key] for row in said] for key in ("mean", "all_correct")})
    values.features.update(_features(asked, variant.batches, cache))
    for name, extractor in asked.readers().items():
        for score in (score for score in asked.of("TextScore") if serves(score, extractor)):
            if unfit_prompts(score, variant) is None and (name, None) in values.features:
                values.texts[score.name, name] = _text_values(score, extractor, variant, values.features[name, None], chunks, cache)
    _clip_values(asked, variant, values, chunks, cache, fps)
    values.workers.update({name: answers(cache, name, how, variant.pictures) for name, how in asked.workers.items()})
    return values


def _text_values(
    score: Any, extractor: Any, variant: Shown, rows: Any, chunks: Sequence[list[str]], cache: Path
) -> list[float | None]:
    """A text score of every sample; of a clip by an extractor of pictures the mean over its frames."""
    counts = [len(sample.frames) if sample.frames and len(rows) != len(variant.pictures) else 1 for sample in variant.pictures]
    known = [prompt for prompt, count in zip(variant.prompts, counts, strict=True) for _ in range(count) if prompt]
    found = score.function(rows, load_texts(cache, extractor, chunks, known))
    if score.scaled:
        found = found * extractor.logit_scale
    each = one_per_picture(score.name, score.function, found, len(known)).double().split(counts)
    means = [float(part.mean()) for part in each]
    return [None if score.name in sample.left_out else mean for sample, mean in zip(variant.pictures, means, strict=True)]


def _clip_values(
    asked: Measures, variant: Shown, values: Values, chunks: Sequence[list[str]], cache: Path, fps: float | None
) -> None:
    """Scores of single clips, into ``values.clips``."""
    clips = variant.pictures
    for score in asked.of("ClipScore"):
        if unfit_clips(score, clips, fps) is None:
            for name, tool in asked.tools(score).items():
                values.clips[score.name, name] = [score_clip(cache, score, tool, clip, fps) for clip in clips]
    for score in asked.of("FrameScore"):
        if unfit_clips(score, clips, fps) is not None:
            continue
        for name, extractor in asked.extractors.items():
            if serves(score, extractor) and (score.text is None or hasattr(extractor, "encode_texts")):
                rows = values.features[name, None].split([len(clip.frames) for clip in clips])
                text_of = partial(_embedding, cache, extractor, chunks)
                values.clips[score.name, name] = score_frames(score, clips, rows, text_of)


def _embedding(cache: Path, extractor: Any, chunks: Sequence[list[str]], text: str) -> Any:
    return load_texts(cache, extractor, chunks, [text])[0]


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
    fps: float | None = None,
) -> tuple[list[Record], dict[str, Values]]:
    """Stage 3: records of every variant, and its values per picture. ``failed``: variants without pictures, and why."""
    by_name = {variant.name: variant for variant in shown}
    chunks = _chunks(asked, shown)
    found = {variant.name: gather(asked, variant, by_name[variant.original], chunks, cache, fps) for variant in shown}
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
        records += clip_records(values, original, asked.scores, context)
        records += worker_records(values, original, context)
        if variant.role != "original":
            records += set_records(values, original.features, asked.of("SetScore"), context, paired=True)
        if references:
            records += set_records(values, real, asked.of("SetScore"), context, paired=False)
        records += class_records(values, asked.of("ClassScore"), context)
    for score, name, model, why in unmeasured(asked, shown, bool(references), failed or {}, fps):
        records.append(context.record(model, score, name, 0, value=None, not_measured=why))
    return records, found


def _features(asked: Measures, batches: Sequence[list[Picture]], cache: Path) -> dict[tuple[str, str | None], Any]:
    """(extractor, head) -> rows; head None is the extractor's own feature."""
    found: dict[tuple[str, str | None], Any] = {}
    looks = looked_at(batches)
    for name, extractor in asked.encoders(clips=bool(batches[0][0].frames)).items():
        found[name, None] = load_features(cache, extractor, looks)
        found |= {(name, head): load_features(cache, extractor, looks, head) for head in asked.heads(extractor)}
    return found
