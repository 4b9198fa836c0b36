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
        _check(self)


@frozen
class Reconstruct:
    """Train codes, scales and biases of one block after the other, on what the original block answers (BRECQ, Li et al. 2021, arXiv
    2102.05426), at all noise levels.

    iterations: Adam steps per block, one call each. drop: share of a block's input numbers that are taken from the original model,
    drawn anew at every step (QDrop, Wei et al. 2022, arXiv 2203.05740); the rest are those of the quantized model. candidates:
    where a weight is words of one book and not transformed, every vector chooses among so many of the words nearest to the
    original (VQ4DiT, Deng et al. 2024, arXiv 2408.17131, which takes 2); 1: codes of vectors stay. The others are those of
    ``Distill``.
    """

    iterations: int = 100
    rank: int | None = None
    drop: float = 0.5
    weight_rate: float = 0.02
    scale_rate: float = 0.001
    bias_rate: float = 0.001
    seed: int = 0
    candidates: int = 1

    def __post_init__(self) -> None:
        _check(self)
        if not (isinstance(self.candidates, int) and 1 <= self.candidates <= 4):
            raise ValueError(f"Reconstruct: candidates must be an integer from 1 to 4, got {self.candidates!r}. VQ4DiT takes 2.")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"Reconstruct: drop must be from 0 to 1, got {self.drop!r}. The usual value is 0.5.")


def _check(choice: Distill | Reconstruct) -> None:
    for name in ("iterations", "rank"):
        value = getattr(choice, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{type(choice).__name__}: {name} must be a positive integer, got {value!r}. See dqtk/spec/refine.py.")
    for name in ("weight_rate", "scale_rate", "bias_rate"):
        value = getattr(choice, name)
        if not 0 <= value < 1:
            raise ValueError(
                f"{type(choice).__name__}: {name} must be from 0 to 1, got {value!r}. 0 leaves those numbers as they are."
            )


Refiner = Distill | Reconstruct
