"""``dqtk evaluate A/ B/``: two folders of pictures, without any model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dqtk.processes import Processes
from dqtk.report.records import Record

from .asked import ORACLE, Measures, Shown, fitting, measures, with_oracle
from .doubts import LOSSY, result_names, warnings_of
from .features import Picture
from .files import key_of
from .folders import chunks, folder_pictures
from .gates import Gate, check_gates
from .measure import observe, reduce
from .results import write_results
from .run import claim
from .spec import check_workers


def evaluate(
    reference: str | Path,
    candidate: str | Path,
    output: str | Path,
    *,
    metrics: Sequence[str],
    extractors: Sequence[str] = (),
    unpaired: bool = False,
    seed: int = 0,
    gates: Sequence[Gate] = (),
    fps: float | None = None,
    workers: Mapping[str, str] | None = None,
) -> list[Record]:
    """Two folders of pictures against each other. Pictures of one name are a pair.

    Args:
        reference, candidate: folders.
        output: folder for results and features; new, empty, or that of an earlier evaluation of the same folders.
        metrics, extractors: as in a job.
        unpaired: the folders are of one world but not picture by picture the same; only distances of sets are taken.
        seed: of the bootstrap.
        fps: frames per second that clips are meant for; scores that count time need it.
        workers: names of scores that programs of the user's compute, and their commands (docs/preference.md).
        gates: conditions whose names are checked before anything is computed; ``tripped`` judges them afterwards.
    Returns:
        Records, which are also in ``output``.
    Raises:
        ValueError: names or prompts that do not match, unknown metrics, nothing to measure, unreadable pictures, a folder of
            something else.
    """
    if seed < 0:
        raise ValueError(f"evaluate: seed must be 0 or more, got {seed}. The default is 0.")
    if fps is not None and not fps > 0:
        raise ValueError(f"evaluate: fps must be a positive frame rate, got {fps}. For example 16.")
    names = list(metrics)
    first, second = folder_pictures(reference), folder_pictures(candidate)
    if not unpaired:
        first, second = _paired(first, second)
    _check_kinds(first, second)
    check_workers(workers or {}, "evaluate: workers")
    asked = measures(names, extractors, workers=workers)
    if unpaired:
        asked = _only_sets(asked, names)
    check_gates(gates, result_names(asked, names, paired=not unpaired, real=unpaired))
    folder = Path(output)
    of = {"reference": str(Path(reference).resolve()), "candidate": str(Path(candidate).resolve()), "unpaired": unpaired}
    claim(folder, "evaluation.json", {"hash": key_of(*map(str, of.values())), "evaluation": of}, "evaluation", list(of))
    a, b = Path(reference).name or "reference", Path(candidate).name or "candidate"
    a, b = (a, b) if a != b else (f"{a} (reference)", f"{b} (candidate)")
    me = Processes(0, 1, torch.device("cpu"), lambda: None)
    if unpaired:
        shown = [Shown(name=b, role="original", original=b, batches=chunks(second))]
        references = chunks(first)
    else:
        shown = [
            Shown(name=a, role="original", original=a, batches=chunks(first)),
            Shown(name=b, role="candidate", original=a, batches=chunks(second)),
        ]
        references = []
    asked = fitting(with_oracle(asked, names, shown), shown)
    observe(asked, shown, references, folder / "cache", me, fps)
    extra: dict[str, Any] = {"reference": str(reference), "candidate": str(candidate)} | ({"fps": fps} if fps else {})
    records, values = reduce(asked, shown, references, folder / "cache", seed, extra, fps=fps)
    job = {"name": f"{b} against {a}", "metrics": names, "extractors": list(extractors), "paired": not unpaired}
    write_results(folder, job, shown, records, values, {}, warnings_of(asked, shown, references))
    return records


def _paired(first: list[Picture], second: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """Both with the prompts that either knows. Raises ``ValueError`` where names or prompts do not match."""
    if [p.id for p in first] != [p.id for p in second]:
        alone = sorted({p.id for p in first} ^ {p.id for p in second})
        raise ValueError(
            f"evaluate: both folders must hold pictures of the same names, got {len(alone)} without a partner, such as {alone[0]}. "
            "Pass --unpaired to compare the sets only."
        )
    for a, b in zip(first, second, strict=True):
        if a.prompt is not None and b.prompt is not None and a.prompt != b.prompt:
            raise ValueError(
                f"evaluate: pictures of one name must be of one prompt, got {a.prompt!r:.60} and {b.prompt!r:.60} for {a.id}. "
                "Pass --unpaired to compare the sets only."
            )
    prompts = [a.prompt or b.prompt for a, b in zip(first, second, strict=True)]
    known = [[replace(p, prompt=prompt) for p, prompt in zip(side, prompts, strict=True)] for side in (first, second)]
    return known[0], known[1]


def _check_kinds(first: Sequence[Picture], second: Sequence[Picture]) -> None:
    """Raises ``ValueError`` for clips against pictures, and for lossy frames: their compression would be scored as error."""
    if bool(first[0].frames) != bool(second[0].frames):
        raise ValueError(
            "evaluate: both folders must hold clips, or both pictures, got one of each. The notes of clips (prompts.jsonl) belong "
            "beside their frames."
        )
    lossy = [f.file for clip in (*first, *second) for f in clip.frames if f.file.suffix.lower() in LOSSY]
    if lossy:
        raise ValueError(
            f"evaluate: frames of clips must be lossless files, got {len(lossy)} lossy ones, such as {lossy[0]}. Write PNG: "
            "compression hides noise and caps what can be measured."
        )


def _only_sets(asked: Measures, names: Sequence[str]) -> Measures:
    """Without what needs pairs, and why. Raises ``ValueError`` where nothing is left."""
    pairs = [score.name for score in asked.of("PairScore")]
    if len(pairs) == len(asked.scores) and ORACLE not in names:
        raise ValueError(
            f"evaluate: metrics must hold a score of sets with --unpaired, got {', '.join(pairs)}, which need pairs. "
            "For example --metrics frechet --extractors tiny-clip."
        )
    why = "it compares pictures of one name, and --unpaired takes the folders for sets"
    return replace(asked, pairs={}, missing=asked.missing | dict.fromkeys(pairs, why))
