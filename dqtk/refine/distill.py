"""Distillation: the whole quantized denoiser learns from the original's own answers, without pictures.

Of EfficientDM (He et al. 2023, arXiv 2310.03270) it takes the data, the original's trajectories from noise over all noise levels
and both halves of guidance, and weights that move on their own grid and are rounded in every forward, so that merging is exact
(``trained.py``). Every small number beside them learns too: biases, norms, modulation tables. The original's answers are found
before it is quantized: while the student learns, no second model is held. It does not follow the student's own trajectories.

Objective: mean squared error of the denoiser's output over the kept calls. Some calibration runs are held out; what does not
lower the error on them is not kept.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from tqdm import tqdm

from dqtk.calibrate.replay import Call, arguments_for, made
from dqtk.checkpoint import quantized_layers
from dqtk.nn.correction import output_of
from dqtk.spec import Distill, canonical

from .descent import call_at
from .learning import Lesson, Refined, learn, seen_and_unseen, start_digest


def distill(
    module: nn.Module,
    calls: Sequence[Call],
    exact: Sequence[Tensor],
    choice: Distill,
    *,
    name: str = "model",
    file: Path | None = None,
    progress: bool = True,
) -> Refined:
    """Train a quantized denoiser in place.

    Args:
        module: quantized denoiser.
        calls: of at least two runs.
        exact: what the unquantized denoiser returned for them, [B, ...] each.
        choice: how.
        name: of the denoiser, in words and in the file.
        file: written while it runs and continued from if it exists; the result is then the same to the bit.
        progress: show a bar with the time left, and the error before and after.
    Raises:
        ValueError: nothing is quantized, calls of one run, a loss that is no number, or a file of another run.
    """
    layers = quantized_layers(module)
    seen, unseen = seen_and_unseen(name, layers, [call.run for call in calls])

    def loss(iteration: int) -> Tensor:
        index = seen[call_at(iteration, len(seen), choice.seed)]
        return _squared_error(output_of(module(**arguments_for(module, calls[index]))), exact[index])

    lesson = Lesson(
        layers=layers,
        module=module,
        others=lambda path, parameter: not _is_matrix(module, path),
        loss=loss,
        judge=lambda: error_on(module, calls, exact, unseen),
        facts={"model": name, "choice": canonical(choice), "calls": len(calls), "start": start_digest(module, exact)},
    )
    found = learn(lesson, choice, file, f"distill {name}", progress)
    if progress:
        tqdm.write(f"distill {name}: error on calls it has not seen {found.before:.3e} -> {found.after:.3e}")
    if not found.kept:
        warnings.warn(
            f"quantize: distillation of {name} lowers no error on calls that it has not seen ({found.before:.3e} -> "
            f"{found.after:.3e}); the model stays as it was. Calibrate with more prompts, or lower the rates.",
            stacklevel=2,
        )
    return found


def _is_matrix(module: nn.Module, path: str) -> bool:
    """Whether a parameter is the weight of a linear, convolution or embedding: too large to learn, not to be rounded."""
    parent, _, name = path.rpartition(".")
    return name == "weight" and isinstance(module.get_submodule(parent), nn.Linear | nn.modules.conv._ConvNd | nn.Embedding)


def error_on(module: nn.Module, calls: Sequence[Call], exact: Sequence[Tensor], which: Sequence[int]) -> float:
    """Mean squared error of the outputs over some calls."""
    outputs = made(module, [calls[index] for index in which])
    return sum(float(_squared_error(output_of(y), exact[i])) for y, i in zip(outputs, which, strict=True)) / len(which)


def _squared_error(output: Tensor, exact: Tensor) -> Tensor:
    return (output.float() - exact.to(output.device).float()).square().mean()
