"""The one place that picks a refiner, by the type of the choice."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from dqtk.calibrate.replay import Call
from dqtk.spec import Distill, Reconstruct, Refiner

from .blocks import reconstruct
from .distill import distill


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
) -> None:
    """Train a quantized denoiser in place.

    Args:
        module: quantized denoiser.
        choice: which refiner, and how.
        calls: that calibration kept.
        exact: what the original answered to them.
        originals: the layers that were replaced, by path; asked for by ``Reconstruct`` only.
        name: of the denoiser.
        folder: for files from which an interrupted run goes on.
        progress: show bars.
    """
    if isinstance(choice, Distill):
        file = None if folder is None else folder / f"{name}.safetensors"
        distill(module, calls, exact, choice, name=name, file=file, progress=progress)
    else:
        assert isinstance(choice, Reconstruct)
        reconstruct(module, originals, calls, choice, name=name, folder=folder, progress=progress)
