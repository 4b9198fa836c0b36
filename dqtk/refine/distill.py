"""Distillation: the whole quantized denoiser learns from the original's own answers, without pictures.

Of EfficientDM (He et al. 2023, arXiv 2310.03270) it takes the data, the original's trajectories from noise over all noise levels
and both halves of guidance, and weights that move on their own grid and are rounded in every forward, so that merging is exact
(``trained.py``). Every small number beside them learns too: biases, norms, modulation tables. The original's answers are found
before it is quantized: while the student learns, no second model is held. It does not follow the student's own trajectories.

Objective: mean squared error of the denoiser's output over the kept calls. Some calibration runs are held out; what does not
lower the error on them is not kept.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dqtk.calibrate.replay import Call, arguments_for, made
from dqtk.checkpoint import digest, quantized_layers
from dqtk.nn.correction import output_of
from dqtk.spec import Distill, canonical

from .descent import Descent, Kept, call_at, identity_of
from .trained import Trained, training

HELD_OUT = 8  # every eighth run, and at least one, is not learned from


@dataclass(frozen=True, kw_only=True, slots=True)
class Refined:
    """Mean squared error on calls that were held out, before and after; ``kept``: whether what was learned was stored."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < self.before


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
    runs = sorted({call.run for call in calls})
    if not layers or len(runs) < 2:
        raise ValueError(
            f"refine: {name} must have quantized layers and calls of at least two calibration runs, got {len(layers)} and "
            f"{len(runs)}. Calibrate with more prompts, or a smaller batch."
        )
    held = set(runs[::-HELD_OUT])
    seen = [index for index, call in enumerate(calls) if call.run not in held]
    unseen = [index for index, call in enumerate(calls) if call.run in held]
    draw = torch.Generator().manual_seed(choice.seed)
    facts = {"model": name, "choice": canonical(choice), "calls": len(calls), "start": _digest(module, exact)}
    with training(module, choice.rank, draw) as trained, _small_numbers(module) as kept:
        before = error_on(module, calls, exact, unseen)

        def loss_of(iteration: int) -> Tensor:
            index = seen[call_at(iteration, len(seen), choice.seed)]
            return _squared_error(output_of(module(**arguments_for(module, calls[index]))), exact[index])

        descent = Descent(_groups(trained, kept, choice), list(kept.values()), choice.iterations)
        with torch.enable_grad():
            descent.run(loss_of, file, identity_of(**facts), f"distill {name}", progress)
        found = Refined(before=before, after=error_on(module, calls, exact, unseen))
        for numbers in trained.values() if found.kept else ():
            numbers.store()
        for number in kept.values() if not found.kept else ():
            number.restore()
    if progress:
        tqdm.write(f"distill {name}: error on calls it has not seen {found.before:.3e} -> {found.after:.3e}")
    if not found.kept:
        warnings.warn(
            f"quantize: distillation of {name} lowers no error on calls that it has not seen ({found.before:.3e} -> "
            f"{found.after:.3e}); the model stays as it was. Calibrate with more prompts, or lower the rates.",
            stacklevel=2,
        )
    return found


def error_on(module: nn.Module, calls: Sequence[Call], exact: Sequence[Tensor], which: Sequence[int]) -> float:
    """Mean squared error of the outputs over some calls."""
    outputs = made(module, [calls[index] for index in which])
    return sum(float(_squared_error(output_of(y), exact[i])) for y, i in zip(outputs, which, strict=True)) / len(which)


def _squared_error(output: Tensor, exact: Tensor) -> Tensor:
    return (output.float() - exact.to(output.device).float()).square().mean()


def _groups(trained: dict[str, Trained], kept: dict[str, Kept], choice: Distill) -> list[tuple[float, dict[str, nn.Parameter]]]:
    """Learning rate -> numbers by name; none where the rate is 0."""
    numbers = {f"{path}.{name}": p for path, mine in trained.items() for name, p in mine.parameters.items()}
    scales = {name: p for name, p in numbers.items() if name.endswith(".scale")}
    codes = {name: p for name, p in numbers.items() if name not in scales}
    rest = {name: mine.learned for name, mine in kept.items()}
    groups = ((choice.weight_rate, codes), (choice.scale_rate, scales), (choice.bias_rate, rest))
    return [(rate, mine) for rate, mine in groups if rate and mine]


@contextmanager
def _small_numbers(module: nn.Module) -> Iterator[dict[str, Kept]]:
    """Every parameter but the weights of linears, convolutions and embeddings: biases, norms, tables. Only they take gradients."""
    named = dict(module.named_parameters())
    required = {name: parameter.requires_grad for name, parameter in named.items()}
    small = {}
    for path, parameter in named.items():
        parent, _, name = path.rpartition(".")
        holds_matrix = isinstance(module.get_submodule(parent), nn.Linear | nn.modules.conv._ConvNd | nn.Embedding)
        learns = parameter.is_floating_point() and parameter.numel() > 0 and not (holds_matrix and name == "weight")
        parameter.requires_grad_(learns)
        if learns:
            small[path] = Kept(parameter)
    try:
        yield small
    except BaseException:  # whatever stopped the learning
        for number in small.values():
            number.restore()
        raise
    finally:
        for name, parameter in named.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None


def _digest(module: nn.Module, exact: Sequence[Tensor]) -> str:
    """Of what is learned from and where learning starts."""
    texts = [digest(tensor) for tensor in (*module.state_dict().values(), *exact)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
