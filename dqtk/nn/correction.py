"""A small affine correction of a denoiser's output, per interval of the noise level and output channel.

``y' = gain[interval, channel] * y + shift[interval, channel]``. It is a child of the denoiser, so it is saved, moved and copied
with it, and a forward hook applies it: pipelines and their users see a denoiser like any other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .noise import following

NAME = "output_correction"


class OutputCorrection(nn.Module):
    """Buffers ``gain`` and ``shift``, float32 [L, C] whatever the model's dtype. ``dim``: of the channels in the output."""

    gain: Tensor
    shift: Tensor

    def __init__(self, edges: Sequence[float], channels: int, dim: int):
        super().__init__()
        self.edges, self.dim = tuple(edges), dim
        self.register_buffer("gain", torch.ones(len(self.edges) + 1, channels))
        self.register_buffer("shift", torch.zeros(len(self.edges) + 1, channels))
        self.noise: Any = None

    def attach(self, denoiser: nn.Module) -> None:
        """Become a part of this denoiser and correct its output from now on."""
        remove_correction(denoiser)
        denoiser.add_module(NAME, self)
        self.noise = following(denoiser, self.edges)
        denoiser.register_forward_hook(self.see)

    def see(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook. Raises ``ValueError`` for an output that is no tensor, tuple or structure with a ``sample``."""
        return replaced(output, self(output_of(output)))

    def forward(self, output: Tensor) -> Tensor:
        """The corrected output, in its dtype."""
        index = self.noise.index(output.device)
        shape = [1] * output.ndim
        shape[self.dim] = -1
        gain, shift = (table.index_select(0, index).view(shape) for table in (self.gain, self.shift))
        return (output.float() * gain + shift).to(output.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "OutputCorrection":
        kept = {"gain": self.gain, "shift": self.shift}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        changed = int(((self.gain != 1) | (self.shift != 0)).any(1).sum()) if not self.gain.is_meta else 0
        return f"corrects {changed} of {len(self.gain)} intervals, {self.gain.shape[1]} channels"


def output_of(output: Any) -> Tensor:
    """The prediction in what a denoiser returns. Raises ``ValueError`` where there is none in one tensor."""
    found = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else getattr(output, "sample", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"correct: a denoiser must return a tensor, a tuple that begins with one, or a sample, got {type(output).__name__}. "
            "Quantize without output correction."
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
    found = denoiser._modules.get(NAME)
    return found if isinstance(found, OutputCorrection) else None


def remove_correction(denoiser: nn.Module) -> None:
    """Take the correction out again."""
    found = correction_of(denoiser)
    if found is None:
        return
    del denoiser._modules[NAME]
    for key, hook in list(denoiser._forward_hooks.items()):
        if getattr(hook, "__self__", None) is found:
            del denoiser._forward_hooks[key]
