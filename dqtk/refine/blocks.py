"""Block reconstruction: one block after the other learns what the original block answers, at all noise levels (BRECQ, Li et al.
2021, arXiv 2102.05426; QDrop, Wei et al. 2022, arXiv 2203.05740).

A block's inputs are those of the model as it is quantized up to there, mixed with those of the original number by number (QDrop's
input part; inputs of the layers inside are always rounded). Its answer should be the original block's on the original's inputs, so
a block may also undo what the blocks before it did wrong. BRECQ weighs outputs by the Fisher information and learns roundings; here
the error is plain, and codes move as in distillation (``trained.py``).

Originals are the layers that were replaced. What else a block holds (norms, tables) stays as it is, because the original computes
with it too. One block's inputs and answers are held at a time, on the CPU. Some runs are held out; a block keeps what lowers its
error on them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from dqtk.calibrate.replay import Call, arguments_for, counted
from dqtk.checkpoint import quantized_layers
from dqtk.nn import Quantized
from dqtk.nn.noise import noise_states
from dqtk.sites import repeated_block
from dqtk.spec import Reconstruct, canonical

from .descent import call_at
from .learning import Lesson, Refined, learn, seen_and_unseen, start_digest
from .refinable import check_learners


@dataclass(frozen=True, slots=True)
class _Met:
    """One call of a block: its arguments and what it returned, on the CPU."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any


def reconstruct(
    module: nn.Module,
    originals: Mapping[str, nn.Module],
    calls: Sequence[Call],
    choice: Reconstruct,
    *,
    name: str = "model",
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, Refined]:
    """Train the quantized layers of a denoiser in place, block after block; what became of every block, by path.

    Args:
        module: quantized denoiser.
        originals: the layers that were replaced, by path.
        calls: of at least two runs.
        choice: how.
        name: of the denoiser, in words and in files.
        folder: for a file per block, from which an interrupted run goes on.
        progress: show bars.
    Raises:
        ValueError: nothing is quantized, calls of one run, what ``check_learners`` refuses, a loss that is no number, or a file of
            another run.
    """
    layers = {path: layer for path, layer in quantized_layers(module).items() if path in originals}
    seen, unseen = seen_and_unseen(name, layers, [call.run for call in calls])
    check_learners(name, module, choice, {path: layer.spec for path, layer in layers.items()}, originals)
    blocks: dict[str, dict[str, Quantized]] = {}
    for path in counted(module, calls[0], layers):
        blocks.setdefault(repeated_block(path), {})[path] = layers[path]
    found = {}
    for path, mine in tqdm(blocks.items(), desc=f"reconstruct {name}", unit="block", disable=not progress):
        with _original(layers, originals):
            teacher = _met(module, path, calls)
        student = _met(module, path, calls)
        file = None if folder is None else folder / f"{name}-{path}.safetensors"
        lessons = _Lessons(module, module.get_submodule(path), calls, teacher, student, originals)
        answers = [tensor for met in teacher for tensor in _tensors(met.output)]
        facts = {"model": name, "block": path, "choice": canonical(choice), "start": start_digest(module, answers)}
        lesson = lessons.lesson(mine, choice, seen, unseen, facts)
        found[path] = learn(lesson, choice, file, f"reconstruct {path}", False)
    if progress:
        kept = sum(block.kept for block in found.values())
        tqdm.write(f"reconstruct {name}: {kept} of {len(found)} blocks are better on calls they have not seen; the others stay")
    return found


@dataclass(frozen=True, slots=True)
class _Lessons:
    """What a block learns from: per call of the model, what the original block met and what the quantized one did."""

    module: nn.Module
    block: nn.Module
    calls: Sequence[Call]
    teacher: Sequence[_Met]
    student: Sequence[_Met]
    originals: Mapping[str, nn.Module]

    def error(self, index: int, drop: float = 0.0, draw: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the block's answer in one call."""
        for state in noise_states(self.module):  # a block alone does not know the noise level of its call
            state.see(self.module, (), self.calls[index].kwargs)
        given = _mixed(self.student[index], self.teacher[index], drop, draw)
        return _squared_error(_answer(self.block, given), self.teacher[index].output)

    def lesson(
        self,
        layers: Mapping[str, Quantized],
        choice: Reconstruct,
        seen: Sequence[int],
        unseen: Sequence[int],
        facts: Mapping[str, object],
    ) -> Lesson:
        biases = {id(layer.bias) for layer in layers.values()}  # type: ignore[attr-defined]

        def loss(iteration: int) -> Tensor:
            draw = torch.Generator().manual_seed(choice.seed * 1_000_003 + iteration)
            return self.error(seen[call_at(iteration, len(seen), choice.seed)], choice.drop, draw)

        return Lesson(
            layers=layers,
            module=self.block,
            others=lambda path, parameter: id(parameter) in biases,
            loss=loss,
            judge=lambda: sum(float(self.error(index)) for index in unseen) / len(unseen),
            watch=None,
            facts=facts,
            num_calls=len(seen),
            exact=self.originals,
        )


# --- what a block meets ----------------------------------------------------------------------------------------------


class _Enough(Exception):
    """The block has been called."""


@torch.no_grad()
def _met(module: nn.Module, path: str, calls: Sequence[Call]) -> list[_Met]:
    """The first call of a block in each of the model's calls."""
    found: list[_Met] = []

    def see(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        copied: Callable = lambda x: x.detach().cpu().clone() if isinstance(x, Tensor) else x  # noqa: E731
        found.append(_Met(tree_map(copied, args), tree_map(copied, kwargs), tree_map(copied, output)))
        raise _Enough

    handle = module.get_submodule(path).register_forward_hook(see, with_kwargs=True)
    try:
        for call in calls:
            with suppress(_Enough):
                module(**arguments_for(module, call))
    finally:
        handle.remove()
    return found


@contextmanager
def _original(layers: Mapping[str, Quantized], originals: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, layers compute what they did before they were quantized."""
    with ExitStack() as ends:
        for path, layer in layers.items():
            vars(layer)["forward"] = originals[path].forward
            ends.callback(vars(layer).pop, "forward")
        yield


def _answer(block: nn.Module, met: _Met) -> Any:
    """What a block says to these arguments, where it is."""
    device = next(block.parameters()).device
    args, kwargs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (met.args, met.kwargs))
    return block(*args, **kwargs)


def _mixed(student: _Met, teacher: _Met, drop: float, draw: torch.Generator | None) -> _Met:
    """The student's arguments, a share ``drop`` of whose floating numbers is the teacher's."""
    if not drop:
        return student

    def mix(mine: Any, other: Any) -> Any:
        if not (isinstance(mine, Tensor) and mine.is_floating_point()):
            return mine
        return torch.where(torch.rand(mine.shape, generator=draw) < drop, other, mine)

    args, kwargs = tree_map(mix, (student.args, student.kwargs), (teacher.args, teacher.kwargs))
    return _Met(args, kwargs, student.output)


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in tree_leaves(output) if isinstance(value, Tensor) and value.is_floating_point()]


def _squared_error(output: Any, exact: Any) -> Tensor:
    """Mean over all numbers of an output, which may be several tensors."""
    pairs = list(zip(_tensors(output), _tensors(exact), strict=True))
    total = sum((got.float() - wanted.to(got.device).float()).square().sum() for got, wanted in pairs)
    return torch.as_tensor(total) / sum(got.numel() for got, _ in pairs)
