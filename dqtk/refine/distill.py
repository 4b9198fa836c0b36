"""Distillation: the whole quantized denoiser learns from the original's own answers, without pictures.

Of EfficientDM (He et al. 2023, arXiv 2310.03270) it takes the data, the original's trajectories from noise over all noise levels
and both halves of guidance, and weights that move on their own grid and are rounded in every forward, so that merging is exact
(``trained.py``). Every small number beside them learns too: biases, norms, modulation tables. The original's answers are found
before it is quantized: while the student learns, no second model is held. It does not follow the student's own trajectories.

Objective: mean squared error of what the scheduler sees over the kept calls: the output, or with ``guidance`` the two halves put
together as the pipeline does, whether they are one call or two (``calibrate/guidance.py``); of a step without guidance the output.
With ``influence`` calls count as their errors do in the final latents; they are drawn that often, those of one iteration from all
parts of a run.
While it learns the error of a few calls is watched, and rates that are too high are halved (``descent.py``). Some calibration runs
are held out; what does not lower the error on them, or on pictures (``judge.py``), is not kept.

Processes share the calls of an iteration (``descent.py``), and those of the judge.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dqtk.calibrate.guidance import ALL
from dqtk.calibrate.replay import Call, arguments_for
from dqtk.checkpoint import quantized_layers
from dqtk.nn.correction import output_of
from dqtk.spec import Distill, canonical

from .descent import call_at, drawn_at
from .judge import Painter
from .learning import Lesson, Refined, is_matrix, is_table, learn, seen_and_unseen, start_digest
from .refinable import check_learners, counts_of, lessons_of
from .selection import selected
from .team import ALONE, Team

LEAST_WATCHED = 4  # calls whose error must not rise while learning; the calls of an iteration, if there are more


def distill(
    module: nn.Module,
    calls: Sequence[Call],
    exact: Sequence[Tensor],
    choice: Distill,
    *,
    originals: Mapping[str, nn.Module] | None = None,
    name: str = "model",
    file: Path | None = None,
    painter: Painter | None = None,
    team: Team = ALONE,
    progress: bool = True,
) -> Refined:
    """Train a quantized denoiser in place.

    Args:
        module: quantized denoiser.
        calls: of at least two runs.
        exact: what the unquantized denoiser returned for them, [B, ...] each.
        choice: how.
        originals: the layers that were replaced, by path; asked for by ``decay`` and ``exact_start`` only.
        name: of the denoiser, in words and in the file.
        file: written while it runs and continued from if it exists; the result is then the same to the bit.
        painter: made of the original pipeline; asked for by ``judge`` only.
        team: processes that each have the same module, calls and answers; all end with the same numbers.
        progress: show a bar with the time left, and the error before and after.
    Raises:
        ValueError: nothing is quantized, calls of one run, guidance over calls without both halves, influence that counts no call,
            what ``check_learners`` refuses, a judge without a painter, a loss that is no number, or a file of another run.
    """
    layers = quantized_layers(module)
    lessons = lessons_of(name, module, calls, choice)
    firsts = [calls[lesson[0]] for lesson in lessons]
    seen, unseen = seen_and_unseen(name, layers, [call.run for call in firsts])
    check_learners(name, module, choice, {path: layer.spec for path, layer in layers.items()}, originals or {})
    counts = counts_of(name, firsts, choice, (seen, unseen))
    if choice.judge is not None and painter is None:
        raise ValueError(f"refine: judge must be None where {name} stands in no pipeline, got {choice.judge}. Use dqtk.quantize.")

    if choice.influence:
        seen = sorted(seen, key=lambda i: firsts[i].level or 0.0)

    def error(number: int) -> Tensor:
        mine = [calls[i] for i in lessons[number]]
        output = torch.cat([output_of(module(**arguments_for(module, call))) for call in mine])
        halves = [half for call in mine for half in call.branches or ()]
        guidance = None if halves == list(ALL) else choice.guidance  # a step in which the pipeline leaves it out
        return error_of(output, torch.cat([exact[i] for i in lessons[number]]), guidance, halves)

    def loss(turn: int) -> Tensor:
        weights = [counts[i] for i in seen]
        place = drawn_at(turn, weights, choice.seed, choice.batch) if choice.influence else call_at(turn, len(seen), choice.seed)
        return error(seen[place])

    def mean_error(numbers: Sequence[int]) -> float:
        mine = [i for i in numbers if counts[i]][team.rank :: team.world]
        total = torch.tensor([math.fsum(counts[i] * float(error(i)) for i in mine)])
        team.add(total)
        return float(total) / math.fsum(counts[i] for i in numbers)

    @torch.no_grad()
    def watch() -> float:
        return mean_error(watched)

    watched = watched_of(seen, [call.level or 0.0 for call in firsts], counts, max(LEAST_WATCHED, choice.batch))
    lesson = Lesson(
        layers=selected(name, module, layers, choice.layers, loss, team),
        module=module,
        others=lambda path, parameter: not is_table(module, path) and (choice.matrix_rate > 0 or not is_matrix(module, path)),
        loss=loss,
        judge=(lambda: mean_error(unseen)) if painter is None else painter.error,
        watch=watch if choice.decay is None else None,  # the error rises where a branch fades
        facts={"model": name, "choice": canonical(choice), "calls": len(lessons), "start": start_digest(module, exact)},
        num_calls=len(seen),
        exact=originals or {},
    )
    found = learn(lesson, choice, file, f"distill {name}", progress, team)
    where = "on calls that it has not seen" if painter is None else "of final latents"
    if progress and team.rank == 0:
        tqdm.write(f"distill {name}: error {where} {found.before:.3e} -> {found.after:.3e}")
    if not found.kept:
        warnings.warn(
            f"quantize: distillation of {name} lowers no error {where} ({found.before:.3e} -> {found.after:.3e}); the model stays "
            "as it was. Calibrate with more prompts, or lower the rates.",
            stacklevel=2,
        )
    return found


def watched_of(seen: Sequence[int], levels: Sequence[float], counts: Sequence[float], num: int) -> list[int]:
    """Of these calls that count, at most ``num`` from all parts of a run: one of each of so many equal parts in the order of
    levels, at another place of every part, since calls of one level lie in the order of runs."""
    ordered = sorted((i for i in seen if counts[i]), key=lambda i: levels[i])
    num = min(num, len(ordered))
    return [ordered[int((part + (part + 0.5) / num) * len(ordered) / num)] for part in range(num)]


def error_of(output: Tensor, exact: Tensor, guidance: float | None = None, halves: Sequence[str] = ("uncond", "cond")) -> Tensor:
    """Mean squared error [] of an output [B, ...], or with ``guidance`` of both halves put together, which lie in the batch in the
    order of ``halves``."""
    error = output.float() - exact.to(output.device).float()
    if guidance is not None:
        parts = dict(zip(halves, error.chunk(2), strict=True))
        error = parts["uncond"] + guidance * (parts["cond"] - parts["uncond"])
    return error.square().mean()
