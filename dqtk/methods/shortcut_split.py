"""A concatenated input in parts, each with scales of its own, of weights and inputs (MixDQ, arXiv 2405.17873, section 4.1).

x W^T = sum over parts p of x_p W_p^T: the columns of the weight and the statistics of the input are cut alike, every part is solved
like a layer of its own, and the products add up. So it goes with every format, solver and transform, which then act within parts.
"""

from dataclasses import replace

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.storage import Part


def columns_of(part: Part, k: int, channels: int) -> Tensor:
    """int64: columns of a part in a weight matrix [N, K], K = (taps, channels)."""
    return torch.arange(k).view(-1, channels)[:, part.start : part.stop].flatten()


def inputs_of(part: Part, inputs: Inputs, channels: int) -> Inputs:
    """Statistics of a part of the input; exact."""
    columns = columns_of(part, len(inputs.mean), channels).to(inputs.mean.device)
    ends = inputs.ends
    if ends is not None:
        ends = ends.unflatten(1, (2, channels))[..., part.start : part.stop].flatten(1)
    return replace(
        inputs,
        gram=inputs.gram[columns][:, columns] if inputs.gram.numel() else inputs.gram,
        mean=inputs.mean[columns],
        sample=inputs.sample[:, columns],
        low=inputs.low[columns],
        high=inputs.high[columns],
        peaks=inputs.peaks[:, columns],
        ends=ends,
    )
