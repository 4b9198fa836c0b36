"""Which image scores a comparison computes: names to functions, and what could not be measured and why.

The only module of the report that imports ``dqtk.metrics``, and inside its functions: the engine takes scores as callables, so
a comparison with scores of one's own needs neither torchmetrics nor anything else from there.
"""

import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dqtk.resolve import scores as scores_in_files

DEFAULT_SCORES = ("psnr", "ssim", "ms_ssim", "lpips")
FRAMES = 32  # scored at a time: a long clip as float tensors is gigabytes
SCORES_OF_CLIPS = ("frame_changes",)  # beside them, of clips


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """A paired image score: ``function`` maps two float batches [B, 3, H, W] in [0, 1] (candidate, reference) to [B].

    Of clips it is taken frame by frame; with ``clips`` it takes whole ones, [B, F, 3, H, W]. ``cap`` is what an infinite value
    counts for in a mean (``None``: the score is always finite); ``digits`` are shown after the point.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    digits: int = 3
    cap: float | None = None
    clips: bool = False


def scores_on_offer() -> dict[str, Any]:
    """Every score of ``dqtk.metrics`` by name. Raises ``ValueError`` that names a file which cannot be imported."""
    try:
        return scores_in_files()
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError) as error:
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent.name == "metrics"]
        where = f"{places[-1].filename}:{places[-1].lineno}" if places else "dqtk.metrics"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}:{error.lineno}"
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"metrics: {where} must be importable, got {type(error).__name__}: {said}. Mend or remove it.") from error


def one_per_picture(name: str, function: Any, values: Any, num: int) -> Tensor:
    """What a score returned for ``num`` pictures, [B]. Raises ``ValueError`` that names its file for anything else."""
    if not isinstance(values, Tensor) or list(values.shape) != [num]:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"metrics: {name} ({_file_of(function)}) must return one number per picture, a tensor of shape [{num}], got {got}. "
            "Do not average over the batch."
        )
    return values


def one_number(name: str, function: Any, value: Any) -> float:
    """What a score of sets returned. Raises ``ValueError`` that names its file for anything but a number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"metrics: {name} ({_file_of(function)}) must return one number, got {got}. Mend it.")
    return float(value)


def _file_of(function: Any) -> str:
    try:
        return inspect.getsourcefile(inspect.unwrap(function)) or "unknown file"
    except TypeError:  # an object that is called
        return f"{type(function).__module__}.{type(function).__qualname__}"


def resolve_scores(
    scores: Sequence[str | ImageScore] = DEFAULT_SCORES, *, lpips_net: str = "alex", lpips_weights: str | Path | None = None
) -> tuple[tuple[ImageScore, ...], dict[str, str]]:
    """Scores by name or as they are; and, by name, why a score is left out (no weights). Raises ``ValueError`` for others."""
    known = {name: score for name, score in scores_on_offer().items() if hasattr(score, "load")}
    found: list[ImageScore] = []
    missing: dict[str, str] = {}
    for score in scores:
        if isinstance(score, ImageScore):
            found.append(score)
        elif score not in known:
            raise ValueError(
                f"compare: scores must be among {sorted(known)} or ImageScore objects, got {score!r}. Wrap your own in ImageScore."
            )
        else:
            try:
                function = known[score].load(net=lpips_net, weights=lpips_weights)
            except FileNotFoundError as error:  # MissingWeights: its text says which and where
                missing[score] = str(error)
                continue
            shared = ("name", "label", "unit", "higher_is_better", "digits", "cap", "clips")
            found.append(ImageScore(function=function, **{name: getattr(known[score], name) for name in shared}))
    return tuple(found), missing


def capped(values: Sequence[float], cap: float | None) -> list[float]:
    """What values count for in a mean: exact matches are infinite."""
    return list(values) if cap is None else [min(value, cap) for value in values]


def mean_over_frames(values: Sequence[float], cap: float | None) -> float:
    """What a clip counts for, from its frames: the mean of their capped values; infinite where all are. One value is itself."""
    if len(values) == 1 or all(value == math.inf for value in values):
        return values[0]
    return sum(capped(values, cap)) / len(values)


def values_of_frames(name: str, function: Any, num: int, pair_of: Callable[[slice], tuple[Tensor, Tensor]]) -> list[float]:
    """A pair score of ``num`` pictures or frames, ``FRAMES`` at a time. ``pair_of``: (candidate, reference) of some, float batches
    [B, 3, H, W] in [0, 1], made when they are asked for.

    Raises ``ValueError`` that names the score's file for anything but one number each.
    """
    values: list[float] = []
    for start in range(0, num, FRAMES):
        candidate, reference = pair_of(slice(start, min(start + FRAMES, num)))
        values += one_per_picture(name, function, function(candidate, reference), len(candidate)).tolist()
    return values


def flip_counts(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """Verdicts (0 or 1) that changed, in both directions, and McNemar's p-value."""
    found = flips([value == 1 for value in before], [value == 1 for value in after])
    return {"right_to_wrong": found.right_to_wrong, "wrong_to_right": found.wrong_to_right, "mcnemar_p": found.p_value}


def bootstrap(values: Sequence[float], prompts: Sequence[int], seed: int) -> Any:
    """``dqtk.metrics.bootstrap.paired_bootstrap`` with the report's settings: an object with ``estimate``, ``low``, ``high``."""
    from dqtk.metrics.bootstrap import paired_bootstrap

    return paired_bootstrap(values, prompts, seed=seed)


def distance_quantiles(values: Sequence[float], higher_is_better: bool) -> dict[str, float]:
    """``dqtk.metrics.bootstrap.distance_quantiles``: p5, p50, p95 and the worst."""
    from dqtk.metrics.bootstrap import distance_quantiles as quantiles

    return quantiles(values, higher_is_better=higher_is_better)


def pair_sums(approximation: Tensor, reference: Tensor, num_samples: int) -> Any:
    """``dqtk.metrics.sqnr.PairSums`` of one denoiser call."""
    from dqtk.metrics.sqnr import PairSums

    return PairSums.of(approximation, reference, num_samples=num_samples)


def pool_db(values: Sequence[float]) -> float:
    """Pooled PSNR in dB of values per image."""
    import torch

    from dqtk.metrics.psnr import pool_db as pool

    return pool(torch.tensor(values, dtype=torch.float64))


def flips(before: Sequence[bool], after: Sequence[bool]) -> Any:
    """``dqtk.metrics.flips.flips``: counts of changed verdicts and McNemar's p-value."""
    from dqtk.metrics.flips import flips as count

    return count(before, after)


def change_interval(before: Sequence[float], after: Sequence[float], prompts: Sequence[int], seed: int) -> Any:
    """``dqtk.metrics.flips.change_interval``: the mean change of verdicts (0 or 1), which is not certain where none flipped."""
    from dqtk.metrics.flips import change_interval as interval

    return interval(before, after, prompts, seed=seed)


def rank_warning(num: int, dim: int, num_reference: int) -> str | None:
    """``dqtk.metrics.frechet.rank_warning``: what to say of a covariance of fewer rows than columns."""
    from dqtk.metrics.frechet import rank_warning as warning

    return warning(num, dim, num_reference)


def checked_heads(extractor: Any, images: Tensor, heads: Sequence[str]) -> dict[str, Tensor]:
    """ "features" of uint8 images, float32 [B, D], and the named ``heads``, with the extractors' contract checked."""
    from dqtk.metrics.extractors.contract import checked_heads as encoded

    return encoded(extractor, images, heads)


def checked_clip(encoder: Any, frames: Tensor) -> Tensor:
    """``encode_clips`` of one clip, uint8 [F, 3, H, W] -> float32 [1, D], with the contract checked."""
    from dqtk.metrics.extractors.contract import checked_clips

    return checked_clips(encoder, frames[None])


def serves(score: Any, extractor: Any) -> bool:
    """``dqtk.metrics.score.serves``: whether a score can look at what an extractor gives."""
    from dqtk.metrics.score import serves as judged

    return judged(score, extractor)


def identity(extractor: Any) -> str:
    """``dqtk.metrics.extractors.contract.identity``: what an extractor's features are filed under."""
    from dqtk.metrics.extractors.contract import identity as said

    return said(extractor)


def as_published(score: Any, extractor: Any) -> bool:
    """``dqtk.metrics.score.as_published``: whether a score is published with networks of this name."""
    from dqtk.metrics.score import as_published as judged

    return judged(score, extractor)


def comparable(score: Any, extractor: Any, to_original: bool) -> bool:
    """``dqtk.metrics.score.comparable``: whether a number may stand beside published ones."""
    from dqtk.metrics.score import comparable as judged

    return judged(score, extractor, to_original=to_original)
