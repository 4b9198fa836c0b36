"""The one place that picks a refiner, by the type of the choice."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from dqtk.calibrate.replay import Call
from dqtk.spec import Distill, FinalLatents, Reconstruct, Refiner

from .blocks import reconstruct
from .distill import distill
from .judge import Painter
from .team import ALONE, Team


def needs_originals(choice: Refiner | None) -> bool:
    """Whether the layers that were replaced must be kept until it has run."""
    return isinstance(choice, Reconstruct) or (isinstance(choice, Distill) and (choice.decay is not None or choice.exact_start))


def needs_pictures(choice: Refiner | None) -> FinalLatents | None:
    """What the pipeline must paint before its first layer is replaced, and again when it has learned."""
    return choice.judge if isinstance(choice, Distill) else None


def refined(
    module: nn.Module,
    choice: Refiner,
    calls: Sequence[Call],
    exact: Sequence[Tensor],
    originals: Mapping[str, nn.Module],
    *,
    name: str,
    folder: Path | None,
    progress: bool,
    painter: Painter | None = None,
    team: Team = ALONE,
) -> None:
    """Train a quantized denoiser in place.

    Args:
        module: quantized denoiser.
        choice: which refiner, and how.
        calls: that calibration kept.
        exact: what the original answered to them.
        originals: the layers that were replaced, by path; where ``needs_originals``.
        name: of the denoiser.
        folder: for files from which an interrupted run goes on.
        progress: show bars.
        painter: made of the original pipeline, where ``needs_pictures``.
        team: processes that learn together; block reconstruction is left to one.
    """
    if isinstance(choice, Distill):
        file = None if folder is None else folder / f"{name}.safetensors"
        distill(
            module, calls, exact, choice, originals=originals, name=name, file=file, painter=painter, team=team, progress=progress
        )
    else:
        assert isinstance(choice, Reconstruct)
        reconstruct(module, originals, calls, choice, name=name, folder=folder, progress=progress)
