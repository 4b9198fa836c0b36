"""The one place that picks a refiner, by the type of the choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dqtk.calibrate.replay import Call
from dqtk.spec import Distill, Reconstruct, Refiner

from .blocks import reconstruct
from .distill import distill
from .judge import Painter
from .team import ALONE, Team
from .whole_runs import Runs


def needs_originals(choice: Refiner | None) -> bool:
    """Whether the layers that were replaced must be kept until it has run."""
    return isinstance(choice, Reconstruct) or (isinstance(choice, Distill) and (choice.decay is not None or choice.exact_start))


@dataclass(frozen=True, kw_only=True, slots=True)
class Painted:
    """What a pipeline painted before its first layer was replaced: to judge by, and to learn from; None: not asked for."""

    judge: Painter | None = None
    runs: Runs | None = None


def painted(choice: Refiner | None, pipe: Any, call_kwargs: Mapping[str, Any] | None, team: Team = ALONE) -> Painted:
    """Let a pipeline that is not yet quantized paint what a refiner asks for. Raises ``ValueError`` where it paints nothing."""
    if not isinstance(choice, Distill):
        return Painted()
    judge = None if choice.judge is None else Painter(pipe, choice.judge, call_kwargs, team)
    return Painted(judge=judge, runs=None if choice.runs is None else Runs(pipe, choice.runs, call_kwargs))


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
    pictures: Painted = Painted(),
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
        pictures: what the original pipeline painted for this choice.
        team: processes that learn together; block reconstruction is left to one.
    """
    if isinstance(choice, Distill):
        file = None if folder is None else folder / f"{name}.safetensors"
        how: dict[str, Any] = {"name": name, "file": file, "team": team, "progress": progress}
        distill(module, calls, exact, choice, originals=originals, painter=pictures.judge, runs=pictures.runs, **how)
    else:
        assert isinstance(choice, Reconstruct)
        reconstruct(module, originals, calls, choice, name=name, folder=folder, progress=progress)
