"""What refiners share: which numbers learn, what is judged, and that only what helps is kept."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.checkpoint import digest
from dqtk.nn import Quantized
from dqtk.spec import Distill, Reconstruct, Refiner

from .descent import Descent, Kept, identity_of
from .discrete import Steps
from .rank_decay import Branch
from .team import ALONE, Team
from .trained import CODES, DECAYING, FACTORS, SCALES, ZEROS, Trained, training
from .trained_vectors import LOGITS, TrainedVectors

HELD_OUT = 8  # every eighth run, and at least one, is not learned from


@dataclass(frozen=True, kw_only=True, slots=True)
class Refined:
    """Error on what was held out, before and after learning."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether what was learned was stored."""
        return self.after < self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """What is learned.

    layers: quantized ones whose codes and scales learn, by path. module: what they stand in. others: whether a parameter of it, by
    name, learns too. loss: number of a call -> scalar. judge: error on what is held out, the same in every process. watch: error on
    a little of what is learned from, which must not rise, the same too; None: nothing is watched. facts: what a file of the run
    must belong to. num_calls: different ones that the loss is of. exact: path -> the layer before it was quantized, where something
    learns from it.
    """

    layers: Mapping[str, Quantized]
    module: nn.Module
    others: Callable[[str, nn.Parameter], bool]
    loss: Callable[[int], Tensor]
    judge: Callable[[], float]
    watch: Callable[[], float] | None
    facts: Mapping[str, object]
    num_calls: int
    exact: Mapping[str, nn.Module] = field(default_factory=dict)


def learn(lesson: Lesson, choice: Refiner, file: Path | None, words: str, progress: bool, team: Team = ALONE) -> Refined:
    """Learn, and keep it if the judge finds less error than before. Whatever interrupts it, the module is then as it was.

    Raises:
        ValueError: a loss that is no number, or a file of another run.
    """
    draw = torch.Generator().manual_seed(choice.seed)
    candidates = choice.candidates if isinstance(choice, Reconstruct) else 1
    how = training(lesson.layers, choice.rank, draw, lesson.exact, candidates)
    with how as trained, _learning(lesson.module, lesson.others) as kept:
        with torch.no_grad():
            before = lesson.judge()
        decay, batch = (choice.decay, choice.batch) if isinstance(choice, Distill) else (None, 1)
        levels = [mine for mine in trained.values() if isinstance(mine, Trained)]
        for mine in levels:
            if isinstance(choice, Distill) and choice.exact_start:
                mine.begin_at(lesson.exact[mine.path])
            if decay is not None:
                mine.branch = Branch.of(mine, lesson.exact, decay, choice.iterations)

        def begin(iteration: int) -> list[nn.Parameter]:
            return [number for mine in levels if mine.branch is not None for number in mine.branch.begin(iteration)]

        def loss(call: int) -> Tensor:
            return _with_doubt(lesson.loss(call), trained)

        steps = None
        if isinstance(choice, Distill) and choice.discrete is not None:
            steps = Steps(trained, choice.discrete, lesson.loss, batch, team, lesson.num_calls)
        more: dict[str, Any] = {} if steps is None else {"after": steps.after, "pace": steps.choice.every, "forget": steps.forget}
        held = {} if steps is None else steps.held
        descent = Descent(_groups(lesson, trained, kept, choice), list(kept.values()), choice.iterations, batch, team, held)
        with torch.enable_grad():
            descent.run(loss, file, identity_of(**lesson.facts), words, progress, begin, watch=lesson.watch, **more)
        begin(choice.iterations)
        with torch.no_grad():
            found = Refined(before=before, after=lesson.judge())
        for numbers in trained.values() if found.kept else ():
            numbers.store()
        for number in kept.values() if not found.kept else ():
            number.restore()
    return found


def _with_doubt(loss: Tensor, trained: Mapping[str, Trained | TrainedVectors]) -> Tensor:
    """The loss, and as much again where no vector has decided on a word (VQ4DiT's second term, in the unit of the first)."""
    doubts = [mine.doubt() for mine in trained.values() if isinstance(mine, TrainedVectors)]
    undecided = [doubt for doubt in doubts if doubt is not None]
    return loss + loss.detach() * torch.stack(undecided).mean() if undecided else loss


def seen_and_unseen(name: str, layers: Collection[str], runs: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which calls, whose runs these are, are learned from and which are held out.

    Raises ``ValueError`` where there is nothing to train, or only one run.
    """
    different = sorted(set(runs))
    if not layers or len(different) < 2:
        raise ValueError(
            f"refine: {name} must have quantized layers and calls of at least two calibration runs, got {len(layers)} and "
            f"{len(different)}. Calibrate with more prompts, or a smaller batch."
        )
    held = set(different[::-HELD_OUT])
    unseen = [index for index, run in enumerate(runs) if run in held]
    return [index for index, run in enumerate(runs) if run not in held], unseen


def start_digest(module: nn.Module, answers: Sequence[Tensor]) -> str:
    """Of what is learned from and where learning starts."""
    texts = [digest(tensor) for tensor in (*module.state_dict().values(), *answers)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def is_matrix(module: nn.Module, path: str) -> bool:
    """Whether a parameter is the weight of a linear or convolution: large, and in another unit than biases and norms."""
    parent, _, name = path.rpartition(".")
    return name == "weight" and isinstance(module.get_submodule(parent), nn.Linear | nn.modules.conv._ConvNd)


def is_table(module: nn.Module, path: str) -> bool:
    """Whether a parameter is an embedding, which a call sees a few rows of."""
    return isinstance(module.get_submodule(path.rpartition(".")[0]), nn.Embedding)


def _groups(
    lesson: Lesson, trained: Mapping[str, Trained | TrainedVectors], kept: Mapping[str, Kept], choice: Refiner
) -> list[tuple[float, dict[str, nn.Parameter]]]:
    """Learning rate -> numbers by name; those whose rate is 0 take no gradient."""
    rates = {CODES: choice.weight_rate, LOGITS: choice.weight_rate, SCALES: choice.scale_rate}
    if isinstance(choice, Distill):
        rates |= {ZEROS: choice.zero_rate, FACTORS: choice.branch_rate, DECAYING: choice.decay.rate if choice.decay else 0.0}
    numbers = {f"{path}.{name}": p for path, mine in trained.items() for name, p in mine.parameters.items()}
    matrices = {name: mine.learned for name, mine in kept.items() if is_matrix(lesson.module, name)}
    groups = [(choice.bias_rate, {name: mine.learned for name, mine in kept.items() if name not in matrices})]
    if isinstance(choice, Distill):
        sizes = {name: float(matrix.detach().square().mean().sqrt()) for name, matrix in matrices.items()}
        groups += [(choice.matrix_rate * sizes[name], {name: matrix}) for name, matrix in matrices.items()]
    for kind in (CODES, LOGITS, SCALES, ZEROS, FACTORS, DECAYING):
        mine, rate = {name: p for name, p in numbers.items() if name.rpartition(".")[2] in kind}, rates.get(kind, 0.0)
        groups.append((rate, mine))
        for parameter in mine.values():
            parameter.requires_grad_(rate > 0)
    return [(rate, mine) for rate, mine in groups if rate and mine]


@contextmanager
def _learning(module: nn.Module, which: Callable[[str, nn.Parameter], bool]) -> Iterator[dict[str, Kept]]:
    """While open, only these parameters take gradients; if it fails, they are as they were."""
    named = dict(module.named_parameters())
    required = {name: parameter.requires_grad for name, parameter in named.items()}
    for name, parameter in named.items():
        parameter.requires_grad_(parameter.is_floating_point() and parameter.numel() > 0 and which(name, parameter))
    kept = {name: Kept(parameter) for name, parameter in named.items() if parameter.requires_grad}
    try:
        yield kept
    except BaseException:  # whatever stopped the learning
        for number in kept.values():
            number.restore()
        raise
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None
