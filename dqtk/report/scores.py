"""Which image scores a comparison computes: names to functions, and what could not be measured and why.

The only module of the report that imports ``dqtk.metrics``, and inside its functions: the engine takes scores as callables, so
a comparison with scores of one's own needs neither torchmetrics nor anything else from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

DEFAULT_SCORES = ("psnr", "ssim", "ms_ssim", "lpips")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """A paired image score: ``function`` maps two float batches [B, 3, H, W] in [0, 1] (candidate, reference) to [B].

    ``cap`` is what an infinite value counts for in a mean (``None``: the score is always finite); ``digits`` are shown after
    the point.
    """

    name: str
    label: str
    unit: str
    higher_is_better: bool
    function: Callable[[Tensor, Tensor], Tensor]
    digits: int = 3
    cap: float | None = None


def resolve_scores(
    scores: Sequence[str | ImageScore] = DEFAULT_SCORES, *, lpips_net: str = "alex", lpips_weights: str | Path | None = None
) -> tuple[tuple[ImageScore, ...], dict[str, str]]:
    """Scores by name or as they are; and, by name, why a score is left out (no weights). Raises ``ValueError`` for others."""
    makers: Mapping[str, Callable[[], ImageScore]] = {
        "psnr": _psnr,
        "ssim": _ssim,
        "ms_ssim": _ms_ssim,
        "lpips": lambda: _lpips(lpips_net, lpips_weights),
    }
    found: list[ImageScore] = []
    missing: dict[str, str] = {}
    for score in scores:
        if isinstance(score, ImageScore):
            found.append(score)
        elif score not in makers:
            raise ValueError(
                f"compare: scores must be among {sorted(makers)} or ImageScore objects, got {score!r}. Wrap your own in ImageScore."
            )
        else:
            from dqtk.metrics.lpips import MissingWeights

            try:
                found.append(makers[score]())
            except MissingWeights as error:
                missing[score] = str(error)
    return tuple(found), missing


def _psnr() -> ImageScore:
    from dqtk.metrics.psnr import CAP_DB, psnr

    return ImageScore(name="psnr", label="PSNR", unit="dB", higher_is_better=True, function=psnr, digits=2, cap=CAP_DB)


def _ssim() -> ImageScore:
    from dqtk.metrics.ssim import ssim

    return ImageScore(name="ssim", label="SSIM", unit="", higher_is_better=True, function=ssim, digits=4)


def _ms_ssim() -> ImageScore:
    from dqtk.metrics.ssim import ms_ssim

    return ImageScore(name="ms_ssim", label="MS-SSIM", unit="", higher_is_better=True, function=ms_ssim, digits=4)


def _lpips(net: str, weights: str | Path | None) -> ImageScore:
    from dqtk.metrics.lpips import Lpips

    return ImageScore(name="lpips", label=f"LPIPS ({net})", unit="", higher_is_better=False, function=Lpips(net, weights), digits=4)


def bootstrap(values: Sequence[float], prompts: Sequence[int], seed: int) -> Any:
    """``dqtk.metrics.bootstrap.paired_bootstrap`` with the report's settings: an object with ``estimate``, ``low``, ``high``."""
    from dqtk.metrics.bootstrap import paired_bootstrap

    return paired_bootstrap(values, prompts, seed=seed)


def pair_sums(approximation: Tensor, reference: Tensor, num_samples: int) -> Any:
    """``dqtk.metrics.sqnr.PairSums`` of one denoiser call."""
    from dqtk.metrics.sqnr import PairSums

    return PairSums.of(approximation, reference, num_samples=num_samples)


def pool_db(values: Sequence[float]) -> float:
    """Pooled PSNR in dB of values per image."""
    import torch

    from dqtk.metrics.psnr import pool_db as pool

    return pool(torch.tensor(values, dtype=torch.float64))
