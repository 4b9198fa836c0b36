"""Refiners: what is trained after all layers have their codes. The code is in dqtk/refine, one file each."""

import math

from .frozen import frozen


@frozen
class OfRoles:
    """Only the codes of layers with one of these roles learn (QuEST, Wang et al. 2024, arXiv 2402.03666: what sees the noise level,
    and feed-forwards, whose inputs fail first at 4 bits)."""

    roles: tuple[str, ...] = ("time_embedding", "modulation", "ff.up", "ff.down")

    def __post_init__(self) -> None:
        if not self.roles:
            raise ValueError("OfRoles: roles must name at least one role, got none. Leave layers=None: all learn.")


@frozen
class MostSensitive:
    """Only the codes of the layers to which the error is most sensitive learn: those with the largest mean gradient per code, by a
    look at some calls, up to a share of all weights (QuEST trains 7 %, chosen by hand).

    share: of the quantized weights, at least one layer. calls: how many are looked at.
    """

    share: float = 0.07
    calls: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"MostSensitive: share must be above 0 and at most 1, got {self.share!r}. QuEST takes 0.07.")
        _check_counts(self, "calls")


Selection = OfRoles | MostSensitive


@frozen
class RankDecay:
    """A branch of low rank beside every layer's rounded weight, on the same rounded input, that starts as the best approximation of
    what rounding left over, learns with the codes, and whose rank is halved until nothing is left: the stored form has no branch
    (QVGen, Huang et al. 2025, arXiv 2505.11497).

    rank: at the start. rate: learning rate of its two factors, in the root of a step of the grid (their product is in steps).
    """

    rank: int = 32
    rate: float = 0.002

    def __post_init__(self) -> None:
        _check_counts(self, "rank")
        _check_rates(self, "rate")


@frozen
class DiscreteSteps:
    """Words of vectors (``VectorCodebook``) change too: a few at a time get another word of the same book (the V step of PV-Tuning,
    Malinovskii et al. 2024, arXiv 2405.14852, which changes 1 % at most).

    share: of every layer's vectors, at most, that a step gives another word. every: iterations between steps; their gradients say
    which vectors and words. calls: the next ones, on which a step must lower the error by more than its standard error, or fewer
    vectors are tried.
    """

    share: float = 0.01
    every: int = 10
    calls: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"DiscreteSteps: share must be above 0 and at most 1, got {self.share!r}. PV-Tuning takes 0.01.")
        _check_counts(self, "every", "calls")
        if self.calls < 2:
            raise ValueError("DiscreteSteps: calls must be at least 2, got 1. One error cannot be told from chance.")


@frozen
class FinalLatents:
    """What was learned is kept where pictures confirm it: where the pipeline's final latents for these prompts, which should not be
    those of calibration, are nearer to the original's than before.

    prompts: at least one; each is a run of the pipeline before it is quantized and two more per denoiser. seed: prompt i starts
    from generator seed + i.
    """

    prompts: tuple[str, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(
                f"FinalLatents: prompts must be a tuple of at least one text, got {self.prompts!r}. Eight that calibration has not "
                "seen show most of it."
            )


@frozen
class Distill:
    """Train codes, scales, biases and norms of the whole denoiser on what the original answered to the calls of calibration.

    No pictures are needed: the calls are those of the original's own trajectories (EfficientDM, He et al. 2023, arXiv 2310.03270).
    iterations: Adam steps of ``batch`` calls each. rank: of the two matrices whose product moves a layer's codes (QALoRA of
    EfficientDM); None moves every code by itself. weight_rate: learning rate of codes, in steps of the grid; zero_rate: of zero
    points, in the same unit, where there are some (with ``rank`` a product of two matrices too: QA-LoRA, Xu et al. 2023, arXiv
    2309.14717); scale_rate: of scales, relative; branch_rate: of the factors of stored low-rank branches, relative to their mean
    size; bias_rate: of biases, norms and tables that stay at 16 bits; matrix_rate: of the 16-bit weights of layers that are not
    quantized, relative to their mean size. All rates are halved where the error of calls learned from rises to four times the least
    so far, and learning goes back to where it was near that. seed: of the order of calls and the start of the matrices.

    guidance: the pipeline's guidance scale, where its steps have both halves, in one call or in two. The error is then that of
    uncond + guidance (cond - uncond), which is what the scheduler sees; errors of the halves that are alike cancel. Steps in
    which the pipeline leaves guidance out count as they are. influence: how much an error counts in each of equal intervals of
    the noise level's angle; ``refine.influence.influence_of`` measures it. Calls are then drawn as often as they count. layers:
    whose codes, zero points, scales and branches learn; None: of all. decay: a branch that helps while learning, and is gone at
    the end. exact_start: a code begins to move from where the original's weight lies in its cell and not from the middle, so that
    what was nearly another code becomes one first. ``MostSensitive``, decay and exact_start are for numbers on a grid, and an
    error where weights that are vectors learn. judge: what decides whether what was learned is kept; None: the error on calls
    that were held out. discrete: words of vectors change, an error where trellises learn or no words do; None: vectors keep their
    words. Numbers on a grid need no such steps.
    """

    iterations: int = 400
    rank: int | None = None
    weight_rate: float = 0.02
    scale_rate: float = 0.001
    bias_rate: float = 0.0001
    seed: int = 0
    batch: int = 1
    zero_rate: float = 0.0
    branch_rate: float = 0.0
    matrix_rate: float = 0.0
    guidance: float | None = None
    influence: tuple[float, ...] = ()
    layers: Selection | None = None
    decay: RankDecay | None = None
    exact_start: bool = False
    judge: FinalLatents | None = None
    discrete: DiscreteSteps | None = None

    def __post_init__(self) -> None:
        _check(self)
        _check_counts(self, "batch")
        _check_rates(self, "zero_rate", "branch_rate", "matrix_rate")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"Distill: guidance must be a number or None, got {self.guidance!r}. It is the pipeline's own scale.")
        if self.influence and not (all(0 <= value < math.inf for value in self.influence) and any(self.influence)):
            raise ValueError(
                f"Distill: influence must be numbers from 0 up, not all 0, got {self.influence!r}. "
                "Measure it: refine.influence.influence_of."
            )
        if self.discrete is not None and self.discrete.every > self.iterations:
            raise ValueError(
                f"Distill: every of discrete must be at most the {self.iterations} iterations, got {self.discrete.every}. No step "
                "would be made."
            )


@frozen
class Reconstruct:
    """Train codes, scales and biases of one block after the other, on what the original block answers (BRECQ, Li et al. 2021, arXiv
    2102.05426), at all noise levels.

    iterations: Adam steps per block, one call each. drop: share of a block's input numbers that are taken from the original model,
    drawn anew at every step (QDrop, Wei et al. 2022, arXiv 2203.05740); the rest are those of the quantized model. candidates:
    where weights are words of one book and not transformed (an error for other vectors), every vector chooses among so many of the
    words nearest to the original (VQ4DiT, Deng et al. 2024, arXiv 2408.17131, which takes 2); 1: codes of vectors stay. The others
    are those of ``Distill``.
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


Refiner = Distill | Reconstruct


def _check(choice: Distill | Reconstruct) -> None:
    _check_counts(choice, "iterations", "rank")
    _check_rates(choice, "weight_rate", "scale_rate", "bias_rate")


def _check_counts(choice: object, *names: str) -> None:
    for name in names:
        value = getattr(choice, name)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{type(choice).__name__}: {name} must be a positive integer, got {value!r}. See dqtk/spec/refine.py.")


def _check_rates(choice: object, *names: str) -> None:
    for name in names:
        value = getattr(choice, name)
        if not 0 <= value < 1:
            raise ValueError(
                f"{type(choice).__name__}: {name} must be from 0 to 1, got {value!r}. 0 leaves those numbers as they are."
            )
