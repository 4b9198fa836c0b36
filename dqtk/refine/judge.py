"""The judge on pictures: whole runs of the pipeline, for prompts that nothing was learned from.

Less error in a call is not less error in a picture: what a loss over calls gained at the least noise, pictures lost again at the
most (the lab log). So the student may be asked to paint: how far its final latents are from the original's, from the same noise.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dqtk.calls import final_latents
from dqtk.spec import FinalLatents

from .team import ALONE, Team

LEAST = 1e-12  # a prompt whose error is 0 counts as this


class Painter:
    """Compares what a pipeline paints now with what it painted when this was made."""

    def __init__(self, pipe: Any, choice: FinalLatents, call_kwargs: Mapping[str, Any] | None, team: Team = ALONE):
        """``pipe``: not yet quantized. Processes of a ``team`` share the prompts; prompt i starts from generator seed + i.

        Raises ``ValueError`` for a bare denoiser and for a pipeline that takes no prompts.
        """
        if isinstance(pipe, nn.Module):
            raise ValueError(
                f"refine: judge must be None for a bare denoiser, which paints nothing, got one for {type(pipe).__name__}. "
                "Pass the pipeline."
            )
        self.pipe, self.choice, self.call_kwargs, self.team = pipe, choice, call_kwargs, team
        self.mine = range(team.rank, len(choice.prompts), team.world)
        self.exact = [self._latents(index) for index in self.mine]

    @torch.no_grad()
    def _latents(self, index: int) -> torch.Tensor:
        choice = self.choice
        return final_latents(self.pipe, [choice.prompts[index]], choice.seed + index, self.call_kwargs, "refine")

    def error(self) -> float:
        """Geometric mean over prompts of the mean squared error of final latents, as the exact ones' share; the same in every
        process."""
        shares = [
            float((self._latents(index) - exact).square().sum() / exact.square().sum())
            for index, exact in zip(self.mine, self.exact, strict=True)
        ]
        total = torch.tensor([math.fsum(math.log(max(share, LEAST)) for share in shares)], dtype=torch.float64)
        self.team.add(total)
        return math.exp(float(total) / len(self.choice.prompts))
