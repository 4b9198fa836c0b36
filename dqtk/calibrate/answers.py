"""What denoisers answer to the calls that calibration kept: what a quantized denoiser is corrected by and learns from."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from dqtk.nn.correction import output_of

from .replay import Call, made
from .stats import Stats


def outputs(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    """What a denoiser returns for these calls, on the CPU."""
    return [output_of(found).detach().cpu() for found in made(module, calls)]


def exact_outputs(parts: Mapping[str, nn.Module], stats: Stats) -> dict[str, list[Tensor]]:
    """Outputs of the kept calls of these denoisers, not yet quantized, by name.

    Raises:
        ValueError: a denoiser that returns no tensor; calls of fewer than two runs, which could confirm nothing.
    """
    found = {}
    for name, part in parts.items():
        calls = [call for call in stats.calls if call.component == name]
        runs = len({call.run for call in calls})
        if runs < 2:
            raise ValueError(
                f"quantize: correct and refine must have calls of at least two calibration runs of {name}, got {runs}. "
                "Calibrate with keep_calls=True and more prompts, or a smaller batch."
            )
        found[name] = outputs(part, calls)
    return found
