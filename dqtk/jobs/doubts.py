"""What a reader should know before believing: what was not measured and why, and what numbers say against themselves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dqtk.recipes import recipe_named
from dqtk.report.records import Record
from dqtk.report.scores import serves

from .asked import ORACLE, ORACLE_SCORES, Measures, Shown, has_head, needs_clips
from .clip_scores import unfit_clips
from .features import Picture, check_sizes

OF_CLIPS = ("FrameScore", "ClipScore")  # kinds of scores of single clips
LOSSY = (".jpg", ".jpeg", ".webp")
_NEEDS = {"flow": "an optical flow, such as lucas-kanade", "interpolate": "an interpolator of frames, such as warp:lucas-kanade"}
_GIVES = {"aesthetic": "an aesthetic head, such as tiny-aesthetic", "quality": "a judge of single pictures, such as immerkaer"}


def unmeasured(
    asked: Measures, shown: Sequence[Shown], real: bool, failed: Mapping[str, str], fps: float | None = None
) -> Iterator[tuple[Any, str, str, str]]:
    """(score, the name its record would have, variant or "" for all, why) of everything asked for that has no number."""
    paired = any(variant.role != "original" for variant in shown) or bool(failed)
    for score in asked.scores.values():
        kind = type(score).__name__
        every = [*asked.serving(score), *asked.lacking(score)] or [*asked.extractors, *asked.missing_extractors]
        names = partial(_names, score, paired=paired, real=real)
        if score.name in asked.missing:
            yield from ((score, name, "", asked.missing[score.name]) for name in names(every))
            continue
        if kind in OF_CLIPS:
            yield from _unmeasured_clips(asked, score, shown, failed, fps)
            continue
        if kind == "PairScore" and not paired:
            yield from ((score, name, "", "no picture has a partner: there is nothing but originals") for name in names(every))
        if kind == "SetScore" and not paired and not real:
            yield from ((score, name, "", "there is nothing but originals, and no references") for name in names(every))
        if kind != "PairScore":
            if (lacking := _unserved(asked, score)) is not None:
                yield from ((score, name, "", lacking) for name in names(every))
                continue
            for extractor in asked.lacking(score):
                yield from ((score, name, "", asked.missing_extractors[extractor]) for name in names([extractor]))
        if kind == "SetScore" and (paired or real):
            yield from _without_clips(asked, score, names, shown)
        yield from _lacking(asked, score, names, shown)
        yield from ((score, name, model, why) for model, why in failed.items() for name in names(every))
    for name, score in ORACLE_SCORES.items():
        if ORACLE in asked.missing:
            yield score, name, "", asked.missing[ORACLE]
        elif asked.judge is not None:
            yield from ((score, name, model, why) for model, why in failed.items())


def _unserved(asked: Measures, score: Any) -> str | None:
    """That no extractor can be looked at by a score, if none can."""
    if asked.serving(score) or asked.lacking(score):
        return None
    needs = "an extractor of clips" if getattr(score, "of_clips", False) else "an extractor of pictures"
    if getattr(score, "only", ()):
        needs = f"the extractor {' or '.join(score.only)}"
    needs = _NEEDS.get(getattr(score, "needs", None) or "", _GIVES.get(getattr(score, "gives", ""), needs))
    return f"{score.label} needs {needs}, got {', '.join((*asked.extractors, *asked.missing_extractors)) or 'none'}"


def _unmeasured_clips(
    asked: Measures, score: Any, shown: Sequence[Shown], failed: Mapping[str, str], fps: float | None
) -> Iterator[tuple[Any, str, str, str]]:
    """The same of a score of single clips."""
    names = clip_names(asked, score)
    if getattr(score, "needs", "") is not None:
        if (lacking := _unserved(asked, score)) is not None:
            yield score, score.name, "", lacking
            return
        for extractor in asked.lacking(score):
            yield score, f"{score.name}[{extractor}]", "", asked.missing_extractors[extractor]
            names = [name for name in names if name != f"{score.name}[{extractor}]"]
    for variant in shown:
        if (why_not := unfit_clips(score, variant.pictures, fps)) is not None:
            yield from ((score, name, variant.name, why_not) for name in names)
    for extractor, reader in asked.extractors.items():
        if getattr(score, "text", None) is not None and serves(score, reader) and not hasattr(reader, "encode_texts"):
            yield score, f"{score.name}[{extractor}]", "", f"{score.label} needs an extractor with a text tower, got {extractor}"
    yield from ((score, name, model, why) for model, why in failed.items() for name in names)


def clip_names(asked: Measures, score: Any) -> list[str]:
    """Names of the records of a score of single clips."""
    if getattr(score, "needs", "") is None:
        return [score.name]
    return [f"{score.name}[{name}]" for name in (*asked.serving(score), *asked.lacking(score))] or [score.name]


def _lacking(asked: Measures, score: Any, names: Callable, shown: Sequence[Shown]) -> Iterator[tuple[Any, str, str, str]]:
    """What the extractors that are here lack for a score: a text tower, a head; or the variants: prompts."""
    if type(score).__name__ == "TextScore":
        for extractor, reader in asked.extractors.items():
            if not serves(score, reader):
                continue
            if not (hasattr(reader, "encode_images") or shown[0].of_clips):
                yield from ((score, name, "", needs_clips(score, extractor, "pictures")) for name in names([extractor]))
                continue
            if extractor not in asked.readers():
                why = f"{score.label} needs an extractor with a text tower, got {extractor}"
                yield from ((score, name, "", why) for name in names([extractor]))
                continue
            for variant in shown:
                if (why_not := unfit_prompts(score, variant)) is not None:
                    yield from ((score, name, variant.name, why_not) for name in names([extractor]))
    head = getattr(score, "head", None)
    headless = head is not None and not any(has_head(extractor, head) for extractor in asked.extractors.values())
    if headless and asked.extractors and not asked.missing_extractors:
        why = f"{score.label} needs {head} features of an extractor such as inception2015, got {', '.join(asked.extractors)}"
        yield from ((score, name, "", why) for name in names(list(asked.extractors)))


def _without_clips(asked: Measures, score: Any, names: Callable, shown: Sequence[Shown]) -> Iterator[tuple[Any, str, str, str]]:
    """Of a score of sets: extractors of clips that are here, where the samples are pictures."""
    for extractor, encoder in asked.extractors.items():
        able = serves(score, encoder) and (score.head is None or has_head(encoder, score.head))
        if able and not (hasattr(encoder, "encode_images") or shown[0].of_clips):
            yield from ((score, name, "", needs_clips(score, extractor, "pictures")) for name in names([extractor]))


def result_names(asked: Measures, metrics: Sequence[str], *, paired: bool, real: bool) -> list[str]:
    """The names that results will have, whether they can be measured or not."""
    found = []
    for score in asked.scores.values():
        if type(score).__name__ in OF_CLIPS:
            names = clip_names(asked, score)
            found += [*names, *(f"{name}@change" for name in names if paired)]
            continue
        head = getattr(score, "head", None)
        able = [name for name in asked.serving(score) if head is None or has_head(asked.extractors[name], head)]
        lacking = asked.lacking(score)
        every = [*able, *lacking] or [*asked.extractors, *asked.missing_extractors]
        names = _names(score, every, paired=paired, real=real)
        found += [*names, *(f"{name}@change" for name in names if paired and type(score).__name__ == "TextScore")]
    for name in (*(ORACLE_SCORES if ORACLE in metrics else ()), *asked.workers):
        found += [name, *([f"{name}@change"] if paired else [])]
    return found


def _names(score: Any, extractors: Sequence[str], *, paired: bool, real: bool) -> list[str]:
    """The names that records of a score have."""
    kind = type(score).__name__
    if kind == "PairScore":
        return [f"{score.name}@vs_original"]
    if kind != "SetScore":
        return [f"{score.name}[{extractor}]" for extractor in extractors]
    against = ["vs_original(paired)"] * paired + ["vs_real"] * (real or not paired)
    return [f"{score.name}[{extractor}]@{where}" for extractor in extractors for where in against]


def unfit_prompts(score: Any, variant: Shown) -> str | None:
    """Why a text score cannot be taken of a variant, if it cannot."""
    without = [picture.id for picture in variant.pictures if not picture.prompt]
    if without:
        return f"{score.label} needs the prompt of every picture, got none for {len(without)}, such as {without[0]}"
    num = len(set(variant.prompts))
    return f"{score.label} needs at least {score.least} different prompts, got {num}" if num < score.least else None


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
        able = asked.encoders(clips=shown[0].of_clips)
        how = "; ".join(f"{name}: {extractor.preprocess}" for name, extractor in able.items())
        said.append(f"pictures are not square, and extractors crop or squash them ({how})")
    return said


def _size(picture: Picture) -> tuple[int, int]:
    return check_sizes([picture])


def doubts_of(records: Sequence[Record]) -> list[str]:
    """What numbers say against themselves: too few pictures for their features, not comparable with published ones."""
    said: dict[str, list[str]] = {}
    for record in records:
        if (warning := record.extra.get("warning")) is not None:
            said.setdefault(str(warning), []).append(record.name)
    exact = [_exact(record) for record in records if record.extra.get("exact_matches")]
    lines = [f"{', '.join(dict.fromkeys(names))}: {warning}" for warning, names in said.items()]
    private = dict.fromkeys(
        record.name for record in records if record.extra.get("comparable") is False and record.value is not None
    )
    lines += exact
    return [*lines, f"\N{DAGGER} not comparable with published numbers: {', '.join(private)}"] if private else lines


def _exact(record: Record) -> str:
    num, cap = record.extra["exact_matches"], f"{record.extra['cap']:g} {record.unit}".strip()
    verbs = ("equals", "counts") if num == 1 else ("equal", "count")
    return (
        f"{record.model}: {record.name}: {num} of {record.num_samples} pictures {verbs[0]} the original's and {verbs[1]} as {cap}"
    )


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
        files = [frame.file for picture in variant.pictures for frame in picture.frames or (picture,)]
        lossy = [file.name for file in files if file.suffix.lower() in LOSSY]
        if lossy:
            said.append(f"{variant.name}: {len(lossy)} lossy files, such as {lossy[0]}; their compression is scored too")
    prompts = sorted({picture.prompt for variant in shown for picture in variant.pictures if picture.prompt})
    for name, extractor in asked.extractors.items():
        if prompts and hasattr(extractor, "truncated"):
            cut = sum(extractor.truncated(prompts))
            if cut:
                said.append(f"{name} cuts {cut} of {len(prompts)} prompts at {extractor.max_tokens} tokens")
    return said


def learned_here(recipes: Sequence[str]) -> list[str]:
    """That recipes which calibrate did so on prompts of the job itself: their scores on these are a little too good."""
    names = [name for name in recipes if any(r.spec is not None and r.spec.needs_stats for r in recipe_named(name).rules)]
    if not names:
        return []
    return [f"{', '.join(names)}: calibrated on the first prompts of this job, which are scored too; candidates learn elsewhere"]
