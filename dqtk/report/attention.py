"""Pictures of attention: a head's map as tokens lie and as it reads them, the blocks it computes, how many at which noise level."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dqtk.attention.sums import probabilities
from dqtk.attention.watch import Given, watching
from dqtk.calibrate.replay import Call, arguments_for
from dqtk.calls import layouts_of
from dqtk.nn.attention import Blocks, blocks_of
from dqtk.numerics.block_masks import counts, unpack
from dqtk.numerics.layout import Layout

MOST_TOKENS = 4096  # of a map that is drawn


@torch.no_grad()
def maps(module: nn.Module, call: Call, path: str) -> tuple[Layout, Tensor]:
    """What an attention of an unquantized denoiser does in a kept call: its layout, and float32 [H, N, N] of the first sample.

    Raises:
        ValueError: a sequence of more than ``MOST_TOKENS`` tokens, of which no map can be drawn.
    """
    arguments, found = arguments_for(module, call), {}

    def see(_: str, given: Given) -> None:
        q = given.q
        if q.shape[2] > MOST_TOKENS:
            raise ValueError(f"maps: a sequence must have at most {MOST_TOKENS} tokens to be drawn, got {q.shape[2]}.")
        every = torch.arange(q.shape[2], device=q.device)
        one = next(given.samples())
        rows = [part for _, part in probabilities(one.q, one.k, one.mask, one.scale, every)]
        found[path] = layouts_of(module, arguments)[q.shape[2]], torch.cat(rows, dim=1).cpu()

    with watching(module, [path], see):
        module(**arguments)
    return found[path]


def map_picture(attention: Tensor, layout: Layout, order: int = 0, keep: Tensor | None = None, *, side: int = 288) -> Image.Image:
    """One head's map [N, N], read in an order: the more attention the darker (square root of its share of the largest). Blocks that
    are not computed (``keep`` bool [R, C] is False) are tinted."""
    index = layout.index(order).long()
    shown = attention[index][:, index]
    dark = (shown / shown.amax().clamp(min=1e-12)).clamp(0, 1).sqrt()
    paper, ink = torch.tensor([252.0, 251.0, 249.0]), torch.tensor([28.0, 30.0, 33.0])
    pixels = paper + dark[..., None] * (ink - paper)
    if keep is not None:
        size = [-(-length // number) for length, number in zip(shown.shape, keep.shape, strict=True)]
        dead = ~keep.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[: shown.shape[0], : shown.shape[1]]
        pixels = torch.where(dead[..., None], 0.55 * pixels + 0.45 * torch.tensor([196.0, 94.0, 60.0]), pixels)
    image = Image.fromarray(pixels.round().to(torch.uint8).numpy())
    return image.resize((side, side), Image.Resampling.BOX)


def mask_picture(blocks: Blocks, *, group: int = 0, cell: int = 3) -> Image.Image:
    """All heads' masks in one interval of the noise level, side by side: computed blocks dark."""
    return masks_picture(masks_of(blocks)[group], cell=cell)


def masks_picture(keep: Tensor, *, cell: int = 3) -> Image.Image:
    """Masks bool [H, R, C] side by side."""
    heads, rows, columns = keep.shape
    gap = 4
    canvas = np.full((rows * cell, heads * (columns * cell + gap) - gap, 3), 252, dtype=np.uint8)
    for head in range(heads):
        tile = np.where(keep[head].numpy()[..., None], np.array([52, 78, 110]), np.array([228, 226, 220])).astype(np.uint8)
        start = head * (columns * cell + gap)
        canvas[:, start : start + columns * cell] = tile.repeat(cell, 0).repeat(cell, 1)
    return Image.fromarray(canvas)


def masks_of(blocks: Blocks) -> Tensor:
    """bool [G, H, R, C]: static masks of an attention, for the layout that calibration saw. Raises ``ValueError`` without any."""
    if blocks.live is None:
        raise ValueError("masks_of: blocks must be static to be drawn, got none that calibration found. Plan StaticBlocks.")
    return unpack(blocks.live.cpu(), counts(Layout(*blocks.spec.layout), blocks.spec.block)[1])


def densities(denoiser: nn.Module) -> Mapping[str, list[Any]]:
    """Path of an attention -> share of its blocks that are computed, per interval of the noise level from the least time up."""
    found = {path: blocks for path, blocks in blocks_of(denoiser).items() if blocks.live is not None}
    return {path: masks_of(blocks).float().mean((1, 2, 3)).tolist() for path, blocks in found.items()}
