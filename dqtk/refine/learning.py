"""What refiners share: which numbers learn, what is judged, and that only what helps is kept."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dqtk.checkpoint import digest
from dqtk.nn import Quantized
from dqtk.spec import Reconstruct, Refiner

from .descent import Descent, Kept, identity_of
from .trained import Trained, training
from .trained_vectors import TrainedVectors

HELD_OUT = 8  # every eighth run, and at least one, is not learned from


@dataclass(frozen=True, kw_only=True, slots=True)
class Refined:
    """Mean squared error on calls that were held out, before and after learning."""

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
    name, learns too. loss: iteration -> scalar. judge: error on what is held out. facts: what a file of the run must belong to.
    originals: the layers that were replaced, by path, where they are held.
    """

    layers: Mapping[str, Quantized]
    module: nn.Module
    others: Callable[[str, nn.Parameter], bool]
    loss: Callable[[int], Tensor]
    judge: Callable[[], float]
    facts: Mapping[str, object]
    originals: Mapping[str, nn.Module] = field(default_factory=dict)


def learn(lesson: Lesson, choice: Refiner, file: Path | None, words: str, progress: bool) -> Refined:
    """Learn, and keep it if the judge finds less error than before. Whatever interrupts it, the module is then as it was.

    Raises:
        ValueError: a loss that is no number, or a file of another run.
    """
    draw = torch.Generator().manual_seed(choice.seed)
    candidates = choice.candidates if isinstance(choice, Reconstruct) else 1
    how = training(lesson.layers, choice.rank, draw, lesson.originals, candidates)
    with how as trained, _learning(lesson.module, lesson.others) as kept:
        with torch.no_grad():
            before = lesson.judge()
        descent = Descent(_groups(trained, kept, choice), list(kept.values()), choice.iterations)
        with torch.enable_grad():
            descent.run(
                lambda iteration: _with_doubt(lesson.loss(iteration), trained), file, identity_of(**lesson.facts), words, progress
            )
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


def seen_and_unseen(name: str, layers: Mapping[str, Quantized], runs: Sequence[int]) -> tuple[list[int], list[int]]:
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


def _groups(
    trained: Mapping[str, Trained | TrainedVectors], kept: Mapping[str, Kept], choice: Refiner
) -> list[tuple[float, dict[str, nn.Parameter]]]:
    """Learning rate -> numbers by name; none where the rate is 0."""
    numbers = {f"{path}.{name}": p for path, mine in trained.items() for name, p in mine.parameters.items()}
    scales = {name: p for name, p in numbers.items() if name.endswith(".scale")}
    codes = {name: p for name, p in numbers.items() if name not in scales}
    rest = {name: mine.learned for name, mine in kept.items()}
    groups = ((choice.weight_rate, codes), (choice.scale_rate, scales), (choice.bias_rate, rest))
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
