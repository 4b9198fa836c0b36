"""What rounding left of a weight that learns: the original's, in the basis of the stored one, minus what is stored."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtk.kernels.conv import to_matrix
from dqtk.methods.shortcut_split import columns_of

if TYPE_CHECKING:
    from .trained import Trained


@torch.no_grad()
def left_over(mine: "Trained", original: Any) -> Tensor:
    """float32 [N, K] of a layer or part, in steps of the grid; 0 where a step is. ``original``: the layer before it was quantized.

    A stored branch counts as stored.
    """
    layer, stored = mine.layer, mine.stored
    weight = to_matrix(original.weight.detach().float().to(mine.start.device))
    if (part := getattr(stored, "part", None)) is not None:
        weight = weight[:, columns_of(part, layer.k, layer.k // layer.taps).to(weight.device)]
    weight = stored.basis.redo(weight, stored.smooth, stored.signs)
    if stored.down is not None:
        weight = weight - stored.up.float() @ stored.down.float()
    steps = mine.steps()
    return torch.where(steps == 0, 0.0, (weight - mine.weight()) / torch.where(steps == 0, 1.0, steps))
