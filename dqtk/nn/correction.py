"""A small affine correction of a denoiser's output, per interval of the noise level and output channel.

``y' = gain[interval, channel] * y + shift[interval, channel]``, by a forward hook: pipelines and their users see a denoiser like
any other. Its numbers are no tensors of the model but a part of its configuration, so that casting, offloading and loading leave
them as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .noise import following

NAME = "output_correction"


class OutputCorrection:
    """edges: between L intervals, in the denoiser's own time. gain, shift: float32 [L, C]. dim: of the channels in the output."""

    def __init__(self, edges: Sequence[float], gain: Any, shift: Any, dim: int):
        """Raises ``ValueError`` for tables that are no finite numbers, two for every interval and channel."""
        self.edges, self.dim = tuple(float(edge) for edge in edges), int(dim)
        self.gain, self.shift = (torch.as_tensor(table, dtype=torch.float32, device="cpu") for table in (gain, shift))
        fits = self.gain.ndim == 2 and self.gain.shape == self.shift.shape and len(self.gain) == len(self.edges) + 1
        if not fits or not bool(torch.isfinite(self.gain).all() & torch.isfinite(self.shift).all()):
            raise ValueError(
                f"{NAME}: gain and shift must be finite numbers [{len(self.edges) + 1}, channels], got {list(self.gain.shape)} and "
                f"{list(self.shift.shape)}. Quantize again."
            )
        self.noise: Any = None
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def attach(self, denoiser: nn.Module) -> None:
        """Correct this denoiser's output from now on, in place of what corrected it before."""
        remove_correction(denoiser)
        self.noise = following(denoiser, self.edges)
        denoiser.register_forward_hook(self.see)

    def see(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook. Raises ``ValueError`` for an output that is no tensor, tuple or structure with a ``sample``."""
        return replaced(output, self(output_of(output)))

    def __call__(self, output: Tensor) -> Tensor:
        """The corrected output, in its dtype."""
        if output.device not in self._tables:
            with torch.inference_mode(False):
                self._tables[output.device] = self.gain.to(output.device), self.shift.to(output.device)
        index = self.noise.index(output.device)
        shape = [1] * output.ndim
        shape[self.dim] = -1
        gain, shift = (table.index_select(0, index).view(shape) for table in self._tables[output.device])
        return (output.float() * gain + shift).to(output.dtype)

    def __repr__(self) -> str:
        changed = int(((self.gain != 1) | (self.shift != 0)).any(1).sum())
        return f"OutputCorrection(corrects {changed} of {len(self.gain)} intervals, {self.gain.shape[1]} channels)"

    def to_json(self) -> dict[str, Any]:
        """As the configuration holds it; float32 numbers come back exactly."""
        return {"edges": list(self.edges), "dim": self.dim, "gain": self.gain.tolist(), "shift": self.shift.tolist()}


def output_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns. Raises ``ValueError`` where there is none in one tensor."""
    found = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"denoiser: its output must be a tensor, a tuple that begins with one, or have a sample, got {type(output).__name__}. "
            "Nothing here can judge or correct lists."
        )
    return found


def replaced(output: Any, prediction: Tensor) -> Any:
    """What a denoiser returned, with another prediction in it."""
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    output.sample = prediction
    return output


def correction_of(denoiser: nn.Module) -> OutputCorrection | None:
    """The correction of this denoiser, if it has one."""
    owners = (getattr(hook, "__self__", None) for hook in denoiser._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, OutputCorrection)), None)


def remove_correction(denoiser: nn.Module) -> None:
    """Take the correction out again."""
    for key, hook in list(denoiser._forward_hooks.items()):
        if isinstance(getattr(hook, "__self__", None), OutputCorrection):
            del denoiser._forward_hooks[key]
