"""``compare``: what quantization (or any change) cost, measured on pairs.

The same prompt and the same starting noise through both pipelines, image by image or clip by clip; scores of the pairs with
intervals over prompts; the denoiser's error per step; times; sizes. Paired scores come first because unpaired ones cannot see
small damage, and quantized models often *improve* them. With ``floor`` (say, the reference in bf16 when the reference is fp32)
the same pipeline with another rounding is scored beside the candidate: a distance means little until one knows what rounding
alone does.

Images are scored as 8-bit pixels, which is what ``Comparison.save`` writes: every number can be recomputed from the files. The
price: differences below half a level vanish, so a PSNR above about 58 dB means "a few pixels differ by one level".

Wall times alternate batch by batch between the pipelines, and so does who goes first: a machine that slows down slows down both.
The median per image is reported. The first batch (allocation, caches) and batches with recording hooks are left out; where nothing
else was made, the first batch is made again twice by both.
"""

import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dqtk.calls import call_arguments, check_call_names, check_prompts, denoisers, makes_clips
from dqtk.sites import find_sites

from . import environment
from .comparison import Comparison, Curve, Row, SizePair, Timing
from .film import noun_of
from .generate import Batch, Task, check_call_kwargs, generate, make_tasks
from .measures import curve_of, score_measures, step_measures
from .ranges import Widths, range_curves, ranges_seen
from .rounding import check_rounding, other_rounding
from .rows import Oracle, rows_of
from .scores import DEFAULT_SCORES, SCORES_OF_CLIPS, ImageScore, resolve_scores
from .sizes import pipeline_sizes
from .trajectory import Call, StepSums, TrajectoryMismatch, compute_dtype, own_trajectory, recorded, same_inputs


@dataclass(kw_only=True, slots=True)
class _Steps:
    """Step errors of one pipeline against the reference, gathered over batches; or why they cannot be paired."""

    own: StepSums | None = None
    same: StepSums | None = None
    why_own: str | None = None
    why_same: str | None = None

    def add(self, pipe: Any, reference: list[Call], calls: list[Call], num_images: int) -> None:
        if self.why_own is None:
            try:
                new = own_trajectory(reference, calls, num_images)
                self.own = new if self.own is None else self.own.concatenated(new)
            except TrajectoryMismatch as error:
                self.own, self.why_own = None, str(error)
        if self.why_same is None:
            try:
                new = same_inputs(pipe, reference, num_images)
                self.same = new if self.same is None else self.same.concatenated(new)
            except TrajectoryMismatch as error:
                self.same, self.why_same = None, str(error)


@dataclass(kw_only=True, slots=True)
class _Found:
    """What grows batch by batch. ``seconds`` are per image: (reference, candidate, whether hooks were recording)."""

    steps: dict[str, _Steps]
    rounding: str | None = None
    rows: list[Row] = field(default_factory=list)
    seconds: list[tuple[float, float, bool]] = field(default_factory=list)
    turn: int = 0
    widths: Widths = field(default_factory=dict)

    def add(
        self, reference: Any, others: Mapping[str, Any], batch: list[Task], kwargs: dict[str, Any], *, hooked: bool
    ) -> dict[str, Batch]:
        """Generate one batch with every pipeline, one after the other; who begins changes from batch to batch."""
        self.turn += 1
        pipes = {"reference": reference, **others}
        made = {}
        for name in list(pipes) if self.turn % 2 else reversed(pipes):
            first = hooked and name == "reference" and not self.widths
            ranges: AbstractContextManager[Widths] = ranges_seen(pipes[name]) if first else nullcontext({})
            with other_rounding(self.rounding if name == "floor" else None), ranges as seen:
                made[name] = _run(pipes[name], batch, kwargs, hooked=hooked, inputs=name == "reference")
            self.widths |= seen
        if hooked:
            for name, pipe in others.items():
                with other_rounding(self.rounding if name == "floor" else None):
                    self.steps[name].add(pipe, made["reference"][1], made[name][1], len(batch))
        outputs = {name: made[name][0] for name in pipes}
        seconds = [outputs[name].seconds / len(batch) for name in ("reference", "candidate")]
        self.seconds.append((seconds[0], seconds[1], hooked))
        return outputs

    def time_again(self, reference: Any, others: Mapping[str, Any], batch: list[Task], kwargs: dict[str, Any]) -> None:
        """Two more rounds of a batch, for its time only, unless a batch without hooks was made after the first."""
        if all(hooked for _, _, hooked in self.seconds[1:]):
            for _ in range(2):
                self.add(reference, {"candidate": others["candidate"]}, batch, kwargs, hooked=False)

    def curves(self) -> tuple[Curve, ...]:
        found = [(name, kind, sums) for name, s in self.steps.items() for kind, sums in (("own", s.own), ("same", s.same))]
        return tuple(curve_of(name, kind, sums) for name, kind, sums in found if sums is not None)

    @property
    def num_frames(self) -> int:
        return self.rows[0].num_frames

    def timing(self, batch_size: int) -> Timing:
        timed = [times for times in self.seconds[1:] if not times[2]]
        note = "first batch and recorded batches left out"
        batches = "batch" if len(timed) == 1 else "batches"
        return Timing(
            reference=statistics.median(times[0] for times in timed),
            candidate=statistics.median(times[1] for times in timed),
            num_batches=len(timed),
            batch_size=batch_size,
            note=f"median of {len(timed)} interleaved {batches} of up to {batch_size} {noun_of(self.num_frames)}s, {note}",
        )


def compare(
    reference: Any,
    candidate: Any,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    seeds_per_prompt: int = 1,
    batch_size: int = 8,
    call_kwargs: Mapping[str, Any] | None = None,
    scores: Sequence[str | ImageScore] = DEFAULT_SCORES,
    lpips_net: str = "alex",
    lpips_weights: str | Path | None = None,
    num_trajectory: int = 8,
    oracle: Oracle | None = None,
    floor: Any | None = None,
    reference_name: str = "reference",
    candidate_name: str = "candidate",
    floor_name: str = "noise floor",
    reference_folder: str | Path | None = None,
    candidate_folder: str | Path | None = None,
    plan_summary: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Comparison:
    """Generate with both pipelines and score the pairs.

    ``reference`` and ``candidate`` are diffusers pipelines for pictures or clips that take ``prompt`` (or ``class_labels``: prompts
    are then numbers or label names), and may be one object; ``call_kwargs`` goes to both (steps, guidance, size, frames), over what
    the family needs. Clips are scored frame by frame and by their changes between frames (``rows.py``). ``num_trajectory``
    prompts are also compared inside, step by step (0: none). ``oracle(image, prompt)``, of a clip with uint8 frames [F, H, W, 3],
    returns a number in [0, 1] or an object with ``mean`` and ``all_correct``. ``floor`` is a third pipeline scored like the
    candidate, or the reference itself with "kernels" or "threads" of another kind (``rounding.py``). Folders add sizes on disk;
    ``plan_summary`` (plain data) is carried into the records and the page. Raises ``ValueError`` for no or empty prompts,
    counts below 1, reserved ``call_kwargs``, unknown scores, or pipelines that return neither pictures nor clips.
    """
    _check(prompts, seeds_per_prompt, batch_size, num_trajectory, seed)
    kwargs = check_call_kwargs(call_arguments(reference, call_kwargs))
    by_default = tuple(scores) == DEFAULT_SCORES
    wanted = (*scores, *SCORES_OF_CLIPS) if by_default else scores
    image_scores, missing = resolve_scores(wanted, lpips_net=lpips_net, lpips_weights=lpips_weights)
    if makes_clips(reference) != makes_clips(candidate):
        raise ValueError(
            "compare: both pipelines must make pictures, or both clips, got "
            f"{type(reference).__name__} and {type(candidate).__name__}. Compare a pipeline with what was made from it."
        )
    for pipe in (reference, candidate):
        check_call_names(pipe, kwargs, "compare: call_kwargs")
    tasks = make_tasks(prompts, seed, seeds_per_prompt)
    num_recorded = min(num_trajectory, len(prompts)) * seeds_per_prompt if denoisers(reference) else 0
    rounding = floor if isinstance(floor, str) else None
    others = {"candidate": candidate} | ({"floor": floor if rounding is None else reference} if floor is not None else {})
    with other_rounding(rounding):
        pass  # a wrong word fails before any picture is made
    check_rounding("compare", rounding, getattr(reference, "_execution_device", "cpu"))
    found = _Found(steps={name: _Steps() for name in others}, rounding=rounding)
    with tqdm(total=len(tasks), desc="compare", unit="pair", disable=not progress) as bar:
        for batch, hooked in _batches(tasks, batch_size, num_recorded):
            outputs = found.add(reference, others, batch, kwargs, hooked=hooked)
            found.rows += rows_of(batch, outputs, image_scores, oracle)
            bar.update(len(batch))
        found.time_again(reference, others, tasks[:batch_size], kwargs)
    unfit = [score for score in image_scores if score.clips and found.num_frames == 1]
    image_scores = tuple(score for score in image_scores if score not in unfit)
    missing |= {score.name: "it scores clips, and these are pictures" for score in unfit if not by_default}
    recorded_prompts = [task.prompt_index for task in tasks[:num_recorded]]
    step_input = {name: {"own": s.own or s.why_own, "same": s.same or s.why_same} for name, s in found.steps.items()}
    return Comparison(
        reference_name=reference_name,
        candidate_name=candidate_name,
        floor_name=floor_name if floor is not None else None,
        rows=tuple(found.rows),
        measures=(*score_measures(found.rows, image_scores, missing, seed), *step_measures(step_input, recorded_prompts, seed)),
        curves=found.curves(),
        timing=found.timing(batch_size),
        sizes=_sizes(reference, candidate, reference_folder, candidate_folder),
        dtype=_dtype_of(reference),
        floor_dtype=_dtype_of(others["floor"]) if floor is not None else None,
        seed=seed,
        seeds_per_prompt=seeds_per_prompt,
        call_kwargs={
            key: value if isinstance(value, (int, float, str, bool, type(None))) else repr(value) for key, value in kwargs.items()
        },
        versions=environment.versions(),
        hardware=environment.hardware(getattr(candidate, "_execution_device", "cpu")),
        created=environment.now(),
        plan_summary=dict(plan_summary) if plan_summary is not None else None,
        ranges=range_curves(found.widths, [s for name, part in denoisers(reference).items() for s in find_sites(part, name)]),
    )


def _check(prompts: Sequence[str], seeds_per_prompt: int, batch_size: int, num_trajectory: int, seed: int) -> None:
    check_prompts(prompts, "compare", "Pass --prompts or prompts=[...].")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"compare: prompts must be non-empty texts, got {prompt!r} at index {index}. Remove it.")
    for name, value, least in (
        ("seeds_per_prompt", seeds_per_prompt, 1),
        ("batch_size", batch_size, 1),
        ("num_trajectory", num_trajectory, 0),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"compare: {name} must be at least {least}, got {value}. Choose a larger one.")


def _batches(tasks: list[Task], batch_size: int, num_recorded: int) -> list[tuple[list[Task], bool]]:
    """Batches with the recorded images first, in batches of their own: (tasks, recorded)."""
    found = []
    for part, hooked in ((tasks[:num_recorded], True), (tasks[num_recorded:], False)):
        found += [(part[start : start + batch_size], hooked) for start in range(0, len(part), batch_size)]
    return found


def _run(pipe: Any, batch: list[Task], kwargs: dict[str, Any], *, hooked: bool, inputs: bool) -> tuple[Batch, list[Call]]:
    if not hooked:
        return generate(pipe, batch, kwargs), []
    with recorded(pipe, inputs=inputs) as calls:
        return generate(pipe, batch, kwargs), calls


def _dtype_of(pipe: Any) -> str:
    """The compute dtype of the denoisers, in words."""
    found = {str(compute_dtype(module)).removeprefix("torch.") for module in denoisers(pipe).values()}
    return ", ".join(sorted(found)) or "unknown"


def _sizes(
    reference: Any, candidate: Any, reference_folder: str | Path | None, candidate_folder: str | Path | None
) -> tuple[SizePair, ...]:
    before = {size.name: size for size in pipeline_sizes(reference, reference_folder)}
    after = {size.name: size for size in pipeline_sizes(candidate, candidate_folder)}
    names = list(before) + [name for name in after if name not in before]
    return tuple(SizePair(name=name, reference=before.get(name), candidate=after.get(name)) for name in names)
