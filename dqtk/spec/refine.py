"""Refiners: what is trained after all layers have their codes. The code is in dqtk/refine, one file each."""

from .frozen import frozen


@frozen
class Distill:
    """Train codes, scales, biases and norms of the whole denoiser on what the original answered to the calls of calibration.

    No pictures are needed: the calls are those of the original's own trajectories (EfficientDM, He et al. 2023, arXiv 2310.03270).
    iterations: Adam steps, one call each. rank: of the two matrices whose product moves a layer's codes; None moves every code by
    itself. weight_rate: learning rate of codes, in steps of the grid; scale_rate: of scales, relative; bias_rate: of biases, norms
    and tables that stay at 16 bits. seed: of the order of calls and the start of the matrices.
    """

    iterations: int = 400
    rank: int | None = None
    weight_rate: float = 0.02
    scale_rate: float = 0.001
    bias_rate: float = 0.0001
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "rank"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"Distill: {name} must be a positive integer, got {value!r}. See dqtk/spec/refine.py.")
        for name in ("weight_rate", "scale_rate", "bias_rate"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"Distill: {name} must be from 0 to 1, got {value!r}. 0 leaves those numbers as they are.")


Refiner = Distill
